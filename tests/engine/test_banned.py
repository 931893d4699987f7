"""Sequences that must not write certain strings, among others: their tokens, pace and failures."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from pipeserve.core.constraint import BannedStrings, TextWatch
from pipeserve.core.sampling import SamplingParams
from pipeserve.engine.generation import GeneratedToken, Generation
from pipeserve.engine.messages import FinishReason
from pipeserve.engine.sequence import SequenceStatus
from pipeserve.errors import GrammarError
from tests.engine.running import RunningEngine, running_engine
from tests.engine.scheduling import expect_short_outputs, fill, rig, run_all, run_step, sequence
from tests.engine.watching import BANNED, WATCHES, watch_for, watched_tokens
from tests.fakes import expected_tokens, facts

END = ord("e")
"""Any letter comes often in what fake stages say."""


def params(seed: int, max_tokens: int = 30, **changes: object) -> SamplingParams:
    return SamplingParams(seed=seed, max_tokens=max_tokens, **changes)  # type: ignore[arg-type]


async def collect(generation: Generation) -> list[GeneratedToken]:
    found: list[GeneratedToken] = []
    async with generation:
        async for tokens in generation:
            found += tokens
    return found


def generate(
    running: RunningEngine, prompt: Sequence[int], sampling: SamplingParams, banned: Sequence[str]
) -> Generation:
    return running.client.generate(prompt, sampling, banned=BannedStrings(strings=tuple(banned)))


@pytest.mark.parametrize("num_blocks", [33, 400])
@pytest.mark.parametrize("num_look_ahead", [0, 1])
async def test_many_sequences_write_what_the_definition_says(
    num_blocks: int, num_look_ahead: int
) -> None:
    """Also where they are preempted, and each knows its own tokens' log-probabilities."""
    small = facts(num_blocks=num_blocks, num_look_ahead=num_look_ahead)
    async with running_engine(pipeline_facts=small, watches=WATCHES.build) as running:
        asked = [
            ((1, 2, seed), params(seed, stop_token_ids=ends, num_logprobs=1), banned)
            for seed, (banned, ends) in enumerate(
                (banned, ends) for ends in ((), (END,)) for banned in (*BANNED, *BANNED)
            )
        ]
        plain = [params(100 + seed) for seed in range(6)]
        answers = await asyncio.gather(
            *(collect(generate(running, *each)) for each in asked),
            *(collect(running.client.generate((5,), sampling)) for sampling in plain),
        )
        stats = await running.client.stats()
    num_changed = 0
    for (prompt, sampling, banned), answer in zip(asked, answers, strict=False):
        expected = watched_tokens(prompt, sampling, banned)
        assert [token.token_id for token in answer] == expected
        assert [token.finish_reason for token in answer[:-1]] == [None] * (len(answer) - 1)
        assert answer[-1].finish_reason is not None
        for token in answer:
            assert token.logprobs is not None
            assert token.logprobs.top_ids == (token.token_id % 256,)
        num_changed += expected != expected_tokens(prompt, sampling)
    assert num_changed > len(asked) // 4
    for sampling, answer in zip(plain, answers[len(asked) :], strict=True):
        assert [token.token_id for token in answer] == expected_tokens((5,), sampling)
    assert stats.num_free_blocks == stats.num_blocks
    assert stats.num_generated_tokens == sum(map(len, answers))
    assert stats.num_prompt_tokens == 3 * len(asked) + len(plain)


async def test_where_nothing_is_left_to_say_the_sequence_ends_alone() -> None:
    everything = [chr(code) for code in range(128)] + ["\ufffd"]
    async with running_engine(watches=WATCHES.build) as running:
        other = asyncio.create_task(collect(generate(running, (1,), params(1), ("ab",))))
        with pytest.raises(GrammarError, match="banned_strings leave no likely token"):
            await collect(generate(running, (1,), params(2), everything))
        assert [token.token_id for token in await other] == watched_tokens((1,), params(1), ("ab",))
        stats = await running.client.stats()
        assert stats.num_free_blocks == stats.num_blocks
        assert stats.num_waiting == stats.num_running == 0


async def test_a_watch_that_cannot_be_made_ends_its_own_sequence() -> None:
    def build(banned: BannedStrings, prompt: Sequence[int]) -> TextWatch:
        raise ZeroDivisionError("oops")

    async with running_engine(watches=build) as running:
        with pytest.raises(GrammarError, match="cannot be watched for"):
            await collect(generate(running, (1,), params(1), ("a",)))
        found = await collect(running.client.generate((5,), params(9)))
        assert [token.token_id for token in found] == expected_tokens((5,), params(9))


async def test_a_sequence_may_go_before_its_watch_comes() -> None:
    async with running_engine(watches=WATCHES.build) as running:
        for _ in range(20):
            async with generate(running, (1,), params(1), ("a",)):
                pass
        found = await collect(generate(running, (1,), params(1), ("a",)))
        assert [token.token_id for token in found] == watched_tokens((1,), params(1), ("a",))
        stats = await running.client.stats()
        assert stats.num_waiting == 0


async def test_what_is_kept_back_comes_with_the_end() -> None:
    """In one message, of which the last token says why."""
    sampling = params(3, max_tokens=5)
    expected = expected_tokens((1,), sampling)
    banned = bytes(expected).decode() + "x"
    async with running_engine(watches=WATCHES.build) as running:
        async with generate(running, (1,), sampling, (banned,)) as generation:
            batches = [tokens async for tokens in generation]
    assert [[token.token_id for token in tokens] for tokens in batches] == [expected]
    assert batches[0][-1].finish_reason is FinishReason.LENGTH


def test_full_blocks_before_the_string_are_not_computed_again() -> None:
    scheduler, stages = rig(num_stages=1, num_look_ahead=1, block_size=4)
    plain = sequence(7, num_prompt=4, max_tokens=20)
    output = expected_tokens(plain.prompt_token_ids, plain.sampling)
    string = bytes(output[15:18]).decode()
    assert string not in bytes(output[:17]).decode()
    watched = sequence(7, num_prompt=4, max_tokens=20)
    watched.is_watched = True
    scheduler.add(watched)
    assert scheduler.schedule() is None
    scheduler.watch(watched, watch_for(string))
    while scheduler.num_withdrawals == 0:
        fill(scheduler, stages)
        run_step(scheduler, stages)
        scheduler.check_integrity()
    assert watched.status is SequenceStatus.RUNNING, "it keeps its row"
    assert watched.num_output_tokens == 15
    (batch,) = fill(scheduler, stages)[:1]
    assert batch.first_positions_S.tolist() == [16]
    assert batch.prefill_token_ids.tolist() == output[12:15]
    assert batch.masks is not None
    run_all(scheduler, stages)
    assert watched.token_ids[4:] == watched_tokens(
        watched.prompt_token_ids, watched.sampling, (string,)
    )
    assert scheduler.num_preemptions == 0


def test_one_that_is_withdrawn_from_does_not_queue_again() -> None:
    """Others come all the time, from accounts that got less: it keeps its row and its prompt."""
    scheduler, stages = rig(num_stages=1, num_rows=4, num_blocks=256, block_size=4)
    watched = sequence(7, num_prompt=8, max_tokens=60, account="watched", num_prompt_logprobs=0)
    watched.is_watched = True
    scheduler.add(watched)
    scheduler.watch(watched, watch_for("a", "b", "c", "d"))
    others: list[Sequence] = []
    num_steps = num_prefilled = 0
    while not watched.is_ended:
        others = [other for other in others if not other.is_ended]
        while len(others) < 12:
            name = f"account {(num_steps + len(others)) % 12}"
            seq_id = 100 + 100 * num_steps + len(others)
            others.append(sequence(seq_id, num_prompt=8, max_tokens=60, account=name))
            scheduler.add(others[-1])
        for batch in fill(scheduler, stages):
            is_watched = batch.rows_S == watched.row
            num_prefilled += int(batch.num_tokens_S[is_watched].sum())
        run_step(scheduler, stages)
        scheduler.check_integrity()
        num_steps += 1
    assert scheduler.num_withdrawals > 10
    assert num_steps < 8 * 60
    assert num_prefilled < 8 + 60 + 8 * scheduler.num_withdrawals, "a block or two for each"
    for other in others:
        if not other.is_ended:
            scheduler.end(other, SequenceStatus.ABORTED)
    run_all(scheduler, stages)


def test_preempted_at_the_place_of_a_ban_it_keeps_it() -> None:
    scheduler, stages = rig(num_stages=1, num_look_ahead=1)
    expect_short_outputs(scheduler)
    watched = sequence(3, max_tokens=12)
    expected = watched_tokens(watched.prompt_token_ids, watched.sampling, ("a", "b", "cd"))
    watched.is_watched = True
    scheduler.add(watched)
    scheduler.watch(watched, watch_for("a", "b", "cd"))
    while not watched.is_ended:
        fill(scheduler, stages)
        if watched.status is SequenceStatus.RUNNING and scheduler.num_steps % 3 == 0:
            scheduler._running.preempt(watched)
        run_step(scheduler, stages)
    assert watched.token_ids[4:] == expected
    assert scheduler.num_preemptions > 2
