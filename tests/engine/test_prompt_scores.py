"""Scores of prompts through engine and client: each token once, however the prompt is computed."""

from __future__ import annotations

import asyncio

import numpy as np

from pipeserve.core.batch import PromptLogprobs
from pipeserve.core.sampling import SamplingParams
from pipeserve.engine.client import EngineClient
from tests.engine.running import running_engine
from tests.fakes import facts

SHARED = tuple(range(1, 20))


def sampling(seed: int, num_prompt_logprobs: int | None) -> SamplingParams:
    return SamplingParams(seed=seed, max_tokens=8, num_prompt_logprobs=num_prompt_logprobs)


async def scores(
    client: EngineClient, prompt: tuple[int, ...], params: SamplingParams
) -> list[float]:
    async with client.generate(prompt, params) as generation:
        num_at_first = None
        async for _ in generation:
            if num_at_first is None:
                num_at_first = len(generation.prompt_logprobs)
    assert num_at_first == len(generation.prompt_logprobs), "complete with the first token"
    for token, each in zip(prompt[1:], generation.prompt_logprobs, strict=False):
        assert each.top_ids == (token,) * (params.num_prompt_logprobs or 0)
    return [each.logprob for each in generation.prompt_logprobs]


async def test_every_prompt_token_but_the_first_is_scored_once() -> None:
    async with running_engine(pipeline_facts=facts(num_blocks=40)) as running:
        prompts = [(*SHARED, 50 + index) for index in range(12)]
        asked = [None if index % 3 == 2 else index % 3 for index in range(12)]
        found = await asyncio.gather(
            *(
                scores(running.client, prompt, sampling(index, count))
                for index, (prompt, count) in enumerate(zip(prompts, asked, strict=True))
            )
        )
    for prompt, count, each in zip(prompts, asked, found, strict=True):
        assert each == ([] if count is None else [-float(token) for token in prompt[1:]])


def scored(seq_id: int, first: int, end: int) -> PromptLogprobs:
    places = np.arange(first, end, dtype=np.float32)
    return PromptLogprobs(
        seq_id=seq_id,
        first=first,
        token_P=-places,
        top_ids_PK=np.zeros((len(places), 0), np.int32),
        top_PK=np.zeros((len(places), 0), np.float32),
    )


async def test_scores_that_come_again_replace_the_first() -> None:
    """As of a sequence that was preempted, and is computed in other chunks the second time."""
    client = EngineClient(facts=facts(), post=lambda message: None, max_queued_requests=8)
    generation = client.generate(SHARED[:6], sampling(0, 0))
    for first, end in ((1, 3), (3, 4), (1, 6)):
        client.deliver(scored(generation.seq_id, first, end))
    assert [each.logprob for each in generation.prompt_logprobs] == [-1, -2, -3, -4, -5]
    client.deliver(scored(99, 1, 6))  # of nobody any more


async def test_a_prompt_of_one_token_has_no_score() -> None:
    async with running_engine() as running:
        assert await scores(running.client, (5,), sampling(0, 2)) == []
