"""Generation: tokens reach whoever waits for them, and the function that they are fed to."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from pipeserve.engine.generation import GeneratedToken, Generation
from pipeserve.engine.messages import FinishReason
from pipeserve.errors import StageFailedError


class Sink:
    """Notes what it got; wants no more once it has seen the token 0."""

    def __init__(self) -> None:
        self.bunches: list[list[int]] = []

    def __call__(self, tokens: list[GeneratedToken]) -> bool:
        self.bunches.append([token.token_id for token in tokens])
        return 0 not in self.bunches[-1]


def make_generation() -> Generation:
    return Generation(7, num_prompt_tokens=1, on_end=lambda generation, message: None)


def push(generation: Generation, *token_ids: int, ends: bool = False) -> None:
    for position, token_id in enumerate(token_ids):
        is_last = ends and position == len(token_ids) - 1
        reason = FinishReason.LENGTH if is_last else None
        generation.push(GeneratedToken(token_id=token_id, finish_reason=reason, logprobs=None))


async def until_quiet() -> None:
    for _ in range(4):
        await asyncio.sleep(0)


async def test_tokens_that_come_together_are_fed_together() -> None:
    generation, sink = make_generation(), Sink()
    push(generation, 1, 2)
    feeding = asyncio.create_task(generation.feed(sink))
    await until_quiet()
    push(generation, 3, 4)
    await until_quiet()
    push(generation, 5)
    await until_quiet()
    assert not feeding.done()
    push(generation, 6, ends=True)
    await feeding
    assert sink.bunches == [[1, 2], [3, 4], [5], [6]]
    assert [token async for token in generation] == []


async def test_a_sink_that_wants_no_more_leaves_the_rest_for_iteration() -> None:
    generation, sink = make_generation(), Sink()
    feeding = asyncio.create_task(generation.feed(sink))
    await until_quiet()
    push(generation, 1, 0)
    await feeding
    push(generation, 2, 3, ends=True)
    assert [[each.token_id for each in tokens] async for tokens in generation] == [[2, 3]]
    assert sink.bunches == [[1, 0]]


async def test_a_sequence_that_has_ended_ends_the_feeding() -> None:
    generation, sink = make_generation(), Sink()
    push(generation, 1, ends=True)
    await generation.feed(sink)
    await generation.feed(sink)
    assert sink.bunches == [[1]]


async def test_tokens_come_before_the_failure_that_followed_them() -> None:
    generation, sink = make_generation(), Sink()
    feeding = asyncio.create_task(generation.feed(sink))
    await until_quiet()
    push(generation, 1)
    generation.fail(StageFailedError("stage 1 died"))
    with pytest.raises(StageFailedError, match="stage 1 died"):
        await feeding
    assert sink.bunches == [[1]]
    with pytest.raises(StageFailedError):
        await generation.feed(sink)


async def test_a_failure_after_the_last_that_was_wanted_is_nobodys() -> None:
    generation, sink = make_generation(), Sink()
    feeding = asyncio.create_task(generation.feed(sink))
    await until_quiet()
    push(generation, 0)
    generation.fail(StageFailedError("stage 1 died"))
    await feeding
    assert sink.bunches == [[0]]


async def test_what_the_sink_raises_is_raised() -> None:
    generation = make_generation()

    def sink(tokens: list[GeneratedToken]) -> bool:
        raise ConnectionResetError("the client is gone")

    feeding = asyncio.create_task(generation.feed(sink))
    await until_quiet()
    push(generation, 1)
    with pytest.raises(ConnectionResetError, match="the client is gone"):
        await feeding


async def test_nothing_is_fed_after_a_cancellation() -> None:
    generation, sink = make_generation(), Sink()
    feeding = asyncio.create_task(generation.feed(sink))
    await until_quiet()
    feeding.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await feeding
    push(generation, 1)
    await until_quiet()
    assert sink.bunches == []
