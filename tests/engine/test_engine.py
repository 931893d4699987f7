"""Engine and client together on a fake pipeline: streams, ends, failures, limits."""

from __future__ import annotations

import asyncio
import random

import pytest

from pipeserve.core.sampling import SamplingParams
from pipeserve.engine.client import EngineClient
from pipeserve.engine.generation import Generation
from pipeserve.engine.messages import EngineFailed, FinishReason
from pipeserve.errors import (
    NotReadyError,
    PromptTooLongError,
    QueueFullError,
    StageFailedError,
    StageStalledError,
)
from tests.engine.running import running_engine
from tests.fakes import expected_tokens, facts


def sampling(seed: int = 0, max_tokens: int = 10, **changes: object) -> SamplingParams:
    return SamplingParams(seed=seed, max_tokens=max_tokens, **changes)  # type: ignore[arg-type]


async def collect(generation: Generation) -> tuple[list[int], FinishReason | None]:
    token_ids: list[int] = []
    reason = None
    async with generation:
        async for tokens in generation:
            assert tokens, "an empty batch is never yielded"
            token_ids += [token.token_id for token in tokens]
            reason = tokens[-1].finish_reason
    return token_ids, reason


async def wait_until_free(client: EngineClient) -> None:
    while (await client.stats()).num_free_blocks < client.facts.num_blocks:
        await asyncio.sleep(0.001)


async def test_many_sequences_get_their_own_tokens() -> None:
    async with running_engine() as running:
        jobs = [(tuple(range(i, i + 1 + i % 7)), sampling(i, 1 + i % 13)) for i in range(60)]
        results = await asyncio.gather(
            *(collect(running.client.generate(prompt, params)) for prompt, params in jobs)
        )
        for (prompt, params), (token_ids, reason) in zip(jobs, results, strict=True):
            assert token_ids == expected_tokens(prompt, params)
            assert reason is FinishReason.LENGTH
        stats = await running.client.stats()
        assert stats.num_free_blocks == stats.num_blocks
        assert stats.num_generated_tokens == sum(params.max_tokens for _, params in jobs)
        assert stats.num_prompt_tokens == sum(len(prompt) for prompt, _ in jobs)
        assert all(busy_s > 0 for busy_s in stats.stage_busy_s)


async def test_a_stop_token_ends_the_sequence_and_is_the_last_token() -> None:
    free_running = expected_tokens((1, 2), sampling(max_tokens=20))
    stop = free_running[5]
    async with running_engine() as running:
        params = sampling(max_tokens=20, stop_token_ids=(stop,))
        token_ids, reason = await collect(running.client.generate((1, 2), params))
    assert reason is FinishReason.STOP
    assert token_ids == free_running[: free_running.index(stop) + 1]


async def test_leaving_early_frees_the_blocks() -> None:
    async with running_engine(step_s=0.002) as running:
        async with running.client.generate((1, 2, 3), sampling(max_tokens=100)) as generation:
            await anext(generation)
        assert running.client.num_live == 0
        await wait_until_free(running.client)
        stats = await running.client.stats()
        assert stats.num_generated_tokens < 100


async def test_finish_ends_iteration_and_frees_the_blocks() -> None:
    async with running_engine(step_s=0.002) as running:
        async with running.client.generate((1, 2, 3), sampling(max_tokens=100)) as generation:
            async for _ in generation:
                generation.finish()
        await wait_until_free(running.client)


async def test_aborts_at_random_moments_leave_the_others_right() -> None:
    rng = random.Random(7)

    async def one(client: EngineClient, seed: int) -> None:
        prompt = tuple(rng.randrange(256) for _ in range(rng.randint(1, 40)))
        params = sampling(seed, rng.randint(1, 40))
        if rng.random() < 0.5:
            await asyncio.sleep(rng.random() * 0.01)
            async with client.generate(prompt, params) as generation:
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(rng.random() * 0.01):
                        async for _ in generation:
                            pass
                        raise TimeoutError
        else:
            token_ids, _ = await collect(client.generate(prompt, params))
            assert token_ids == expected_tokens(prompt, params)

    async with running_engine(pipeline_facts=facts(num_blocks=40, context_length=100)) as running:
        await asyncio.gather(*(one(running.client, seed) for seed in range(200)))
        await wait_until_free(running.client)
        stats = await running.client.stats()
        assert stats.num_running == stats.num_waiting == 0


async def test_logprobs_reach_the_request_that_asked() -> None:
    async with running_engine() as running:
        plain, asking = (
            running.client.generate((1,), sampling()),
            running.client.generate((2,), sampling(num_logprobs=3)),
        )
        async with plain, asking:
            (without, *_), (with_logprobs, *_) = await anext(plain), await anext(asking)
    assert without.logprobs is None
    assert with_logprobs.logprobs is not None
    assert len(with_logprobs.logprobs.top_ids) == len(with_logprobs.logprobs.top_logprobs) == 3


async def test_a_prompt_that_does_not_fit_is_refused() -> None:
    async with running_engine() as running:
        message = r"120 tokens and max_tokens is 9.*at most 128"
        with pytest.raises(PromptTooLongError, match=message):
            running.client.generate(tuple(range(120)), sampling(max_tokens=9))
        assert running.client.num_live == 0


async def test_a_full_queue_says_when_to_come_back() -> None:
    async with running_engine(pipeline_facts=facts(num_rows=2), max_queued_requests=1) as running:
        running.pipeline.gate.clear()
        held = [running.client.generate((1,), sampling()) for _ in range(3)]
        with pytest.raises(QueueFullError) as caught:
            running.client.generate((1,), sampling())
        assert caught.value.retry_after_s >= 1
        running.pipeline.gate.set()
        await asyncio.gather(*(collect(generation) for generation in held))
        await collect(running.client.generate((1,), sampling()))


async def test_a_stage_that_raises_fails_every_request_with_its_reason() -> None:
    async with running_engine(fail_at_step=3) as running:
        results = await asyncio.gather(
            *(collect(running.client.generate((i,), sampling(i, 50))) for i in range(5)),
            return_exceptions=True,
        )
        assert all(isinstance(result, StageFailedError) for result in results)
        assert "stage 0 failed: RuntimeError: told to fail" in str(results[0])
        assert isinstance(await running.client.wait_failed(), StageFailedError)
        with pytest.raises(StageFailedError):
            running.client.generate((1,), sampling())
        with pytest.raises(StageFailedError):
            await running.client.stats()


async def test_a_stage_that_blocks_for_ever_is_noticed() -> None:
    async with running_engine(block_at_step=2, stage_timeout_s=0.2) as running:
        with pytest.raises(StageStalledError, match=r"0.2 s \(stage_timeout_s\).*stage 0"):
            await collect(running.client.generate((1,), sampling(max_tokens=50)))
        assert isinstance(running.client.failure, StageStalledError)


async def test_a_shutdown_tells_whoever_waits() -> None:
    async with running_engine(step_s=0.002) as running:
        waiting = asyncio.create_task(
            collect(running.client.generate((1,), sampling(max_tokens=100)))
        )
        await asyncio.sleep(0)
        running.client.shut_down()
        with pytest.raises(NotReadyError, match="stopping"):
            await waiting
        assert running.client.num_live == 0
        with pytest.raises(NotReadyError):
            running.client.generate((1,), sampling())
        with pytest.raises(NotReadyError):
            await running.client.stats()


async def test_an_idle_engine_is_not_stalled() -> None:
    async with running_engine(stage_timeout_s=0.05) as running:
        await collect(running.client.generate((1,), sampling()))
        await asyncio.sleep(0.15)
        await collect(running.client.generate((1,), sampling()))
        assert running.client.failure is None


async def test_only_the_first_failure_counts() -> None:
    async with running_engine() as running:
        for error in ("stage 1 failed", "the engine process ended with status 1"):
            running.client.deliver(EngineFailed(error=error, stalled=False))
        assert str(await running.client.wait_failed()) == "stage 1 failed"
        assert str(running.client.failure) == "stage 1 failed"
