"""How much may wait, for how long, and what those are told who are turned away."""

from __future__ import annotations

import asyncio

import pytest

from pipeserve.core.admission import AdmissionParams
from pipeserve.core.sampling import SamplingParams
from pipeserve.engine.generation import Generation
from pipeserve.engine.service_rate import LONGEST_S, WINDOW, ServiceRate
from pipeserve.errors import QueueFullError, RequestTimeoutError
from tests.engine.running import RunningEngine, running_engine
from tests.fakes import facts


def sampling(max_tokens: int = 10) -> SamplingParams:
    return SamplingParams(seed=0, max_tokens=max_tokens)


async def read(generation: Generation) -> int:
    num_tokens = 0
    async with generation:
        async for tokens in generation:
            num_tokens += len(tokens)
    return num_tokens


async def until_all_is_free(running: RunningEngine) -> None:
    async with asyncio.timeout(10):
        while (await running.client.stats()).num_free_blocks < running.client.facts.num_blocks:
            await asyncio.sleep(0.001)


async def test_prompt_tokens_that_wait_are_limited() -> None:
    async with running_engine(max_queued_tokens=100) as running:
        client = running.client
        running.pipeline.gate.clear()
        held = [client.generate(tuple(range(60)), sampling())]
        with pytest.raises(QueueFullError, match=r"60 prompt tokens wait.*adds 41; at most 100"):
            client.check_capacity(1, 41)
        client.check_capacity(2, 40)
        held.append(client.generate(tuple(range(40)), sampling()))
        with pytest.raises(QueueFullError):
            client.check_capacity(1, 1)
        running.pipeline.gate.set()
        assert await asyncio.gather(*map(read, held)) == [10, 10]
        client.check_capacity(1, 100)


async def test_a_prompt_that_nothing_waits_before_is_always_taken() -> None:
    async with running_engine(max_queued_tokens=10) as running:
        assert await read(running.client.generate(tuple(range(60)), sampling())) == 10


async def test_sequences_of_one_request_are_weighed_together_and_once() -> None:
    async with running_engine(max_queued_tokens=100) as running:
        client = running.client
        client.check_capacity(4, 4 * 60)  # nothing waits before them
        held = [client.generate(tuple(range(60)), sampling()) for _ in range(4)]
        assert await asyncio.gather(*map(read, held)) == [10] * 4


async def test_a_prompt_waits_no_more_once_it_has_a_token_or_is_given_up() -> None:
    async with running_engine(max_queued_tokens=50, step_s=0.001) as running:
        client = running.client
        async with client.generate(tuple(range(50)), sampling(60)) as generation:
            await anext(generation)
            client.check_capacity(1, 50)
        running.pipeline.gate.clear()
        async with client.generate(tuple(range(50)), sampling()):
            with pytest.raises(QueueFullError):
                client.check_capacity(1, 1)
        client.check_capacity(1, 50)


@pytest.mark.parametrize("where", ["queued", "prefilling", "decoding"])
async def test_a_timeout_frees_all_wherever_the_sequence_stands(where: str) -> None:
    limits = facts(num_rows=1, max_batch_tokens=4, num_stages=1)
    block_at_step = 5 if where == "decoding" else None
    async with running_engine(pipeline_facts=limits, block_at_step=block_at_step) as running:
        client = running.client
        if where != "decoding":
            running.pipeline.gate.clear()
        held = client.generate((1, 2, 3), sampling(100)) if where == "queued" else None
        num_prompt = 100 if where == "prefilling" else 4
        generation = client.generate(tuple(range(num_prompt)), sampling(20), timeout_s=0.1)
        if where == "decoding":
            await anext(generation)
        with pytest.raises(RequestTimeoutError, match=r"not complete within 0\.1 s"):
            await read(generation)
        running.pipeline.gate.set()
        if held is not None:
            assert await read(held) == 100
        await until_all_is_free(running)
        assert client.num_live == 0


async def test_cached_tokens_reach_the_request() -> None:
    async with running_engine() as running:
        for num_cached in (0, 8):
            async with running.client.generate(tuple(range(10)), sampling()) as generation:
                async for _ in generation:
                    assert generation.num_cached_tokens == num_cached
        stats = await running.client.stats()
        assert (stats.num_prefix_queries, stats.num_prefix_hits) == (20, 8)


async def test_terms_of_admission_reach_the_scheduler() -> None:
    """The only row is taken: the line behind it is served by priority."""
    limits = facts(num_rows=1, num_stages=1)
    async with running_engine(pipeline_facts=limits) as running:
        running.pipeline.gate.clear()
        order: list[int] = []

        async def ask(priority: int) -> None:
            admission = AdmissionParams(priority=priority)
            await read(running.client.generate((1, 2), sampling(), admission))
            order.append(priority)

        first = asyncio.create_task(read(running.client.generate((3, 4), sampling())))
        await asyncio.sleep(0.05)
        async with asyncio.TaskGroup() as group:
            for priority in (2, -1, 0):
                group.create_task(ask(priority))
            await asyncio.sleep(0.05)
            running.pipeline.gate.set()
        await first
        assert order == [-1, 0, 2]


def test_the_service_rate_counts_busy_time_only() -> None:
    rate = ServiceRate()
    assert rate.seconds_until(100, 0.0) == 1
    rate.begin(0.0)
    for now_s in range(1, 11):
        rate.note(2, float(now_s))
    assert rate.seconds_until(20, 10.0) == 10
    rate.pause(10.0)
    assert rate.seconds_until(20, 5000.0) == 10
    rate.begin(5000.0)
    rate.note(2, 5001.0)
    assert rate.seconds_until(20, 5001.0) == 10


def test_the_service_rate_follows_and_is_bounded() -> None:
    rate = ServiceRate()
    rate.begin(0.0)
    for now_s in range(10):
        rate.note(1, 1000.0 * now_s)
    assert rate.seconds_until(10, 9000.0) == LONGEST_S
    for step in range(WINDOW):
        rate.note(1, 9000.0 + 0.5 * step)
    assert rate.seconds_until(10, 9000.0 + 0.5 * (WINDOW - 1)) == 5
