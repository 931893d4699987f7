"""Constrained sequences among others: their tokens, their pace, their failures."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable

import pytest

from pipeserve.core.constraint import Grammar, TokenConstraint, WordArray
from pipeserve.core.sampling import SamplingParams
from pipeserve.engine.generation import Generation
from pipeserve.engine.messages import FinishReason
from pipeserve.errors import GrammarError
from tests.engine.running import RunningEngine, running_engine
from tests.engine.scheduling import fill, rig, run_step, sequence
from tests.fakes import expected_tokens, facts, mask_of

VOCAB_SIZE = facts().vocab_size
END = 0


class Countdown:
    """Digits that fall from 9 to 0, then the end; `wait` is called before every mask."""

    def __init__(self, wait: Callable[[], None]) -> None:
        self._wait = wait
        self._next = 9

    def allowed(self) -> WordArray:
        self._wait()
        return mask_of([END if self._next < 0 else ord(str(self._next))], VOCAB_SIZE)

    def accept(self, token_id: int) -> None:
        assert token_id in (END, ord(str(self._next)))
        self._next -= 1


class Broken(Countdown):
    """Fails at its third token, by an error of the grammar's or by one of ours."""

    def __init__(self, error: Exception) -> None:
        super().__init__(lambda: None)
        self._error = error

    def accept(self, token_id: int) -> None:
        super().accept(token_id)
        if self._next == 6:
            raise self._error


def build(grammar: Grammar) -> TokenConstraint:
    match grammar.definition:
        case "countdown":
            return Countdown(lambda: None)
        case "slow":
            return Countdown(lambda: time.sleep(0.02))
        case "broken":
            return Broken(GrammarError("too complex"))
        case "bug":
            return Broken(ZeroDivisionError("oops"))
    raise GrammarError("not understood")


def params(seed: int, max_tokens: int = 40) -> SamplingParams:
    return SamplingParams(seed=seed, max_tokens=max_tokens, stop_token_ids=(END,))


async def collect(generation: Generation) -> tuple[bytes, FinishReason | None]:
    token_ids: list[int] = []
    reason = None
    async with generation:
        async for tokens in generation:
            token_ids += [token.token_id for token in tokens]
            reason = tokens[-1].finish_reason
    return bytes(token_ids), reason


def generate(running: RunningEngine, seed: int, grammar: str, **changes: int) -> Generation:
    return running.client.generate(
        (1, 2, seed), params(seed, **changes), grammar=Grammar(definition=grammar)
    )


async def test_many_constrained_sequences_end_where_their_grammar_does() -> None:
    async with running_engine(constraints=build) as running:
        definitions = ["countdown", "slow"] * 10
        results = await asyncio.gather(
            *(collect(generate(running, seed, each)) for seed, each in enumerate(definitions))
        )
        assert set(results) == {(b"9876543210\0", FinishReason.STOP)}
        stats = await running.client.stats()
        assert stats.num_free_blocks == stats.num_blocks


async def test_max_tokens_cuts() -> None:
    async with running_engine(constraints=build) as running:
        found = await collect(generate(running, 1, "countdown", max_tokens=3))
        assert found == (b"987", FinishReason.LENGTH)


@pytest.mark.parametrize(
    ("definition", "message"),
    [
        ("unknown", "not understood"),
        ("broken", "too complex"),
        ("bug", "the grammar failed: ZeroDivisionError('oops')"),
    ],
)
async def test_a_grammar_that_fails_ends_its_own_sequence_alone(
    definition: str, message: str
) -> None:
    async with running_engine(constraints=build) as running:
        other = asyncio.create_task(collect(running.client.generate((5,), params(9))))
        with pytest.raises(GrammarError, match=message.replace("(", r"\(").replace(")", r"\)")):
            await collect(generate(running, 1, definition))
        assert (await other)[0] == bytes(expected_tokens((5,), params(9)))
        assert (await collect(generate(running, 2, "countdown")))[1] is FinishReason.STOP
        stats = await running.client.stats()
        assert stats.num_free_blocks == stats.num_blocks


async def test_a_grammar_that_never_answers_holds_up_nobody() -> None:
    """Not even those whose own grammars are compiled and quick."""
    stuck, entered = threading.Event(), threading.Event()

    def wait() -> None:
        entered.set()
        stuck.wait()

    def build_stuck(grammar: Grammar) -> TokenConstraint:
        return Countdown(wait) if grammar.definition == "stuck" else build(grammar)

    try:
        async with running_engine(constraints=build_stuck) as running:
            hanging = generate(running, 1, "stuck")
            await asyncio.to_thread(entered.wait)
            free = [running.client.generate((seed,), params(seed)) for seed in range(5)]
            for seed, (token_ids, _) in enumerate(await asyncio.gather(*map(collect, free))):
                assert token_ids == bytes(expected_tokens((seed,), params(seed)))
            assert (await collect(generate(running, 2, "countdown")))[0] == b"9876543210\0"
            async with hanging:
                pass  # aborted while its mask is being made
            stats = await running.client.stats()
            assert stats.num_waiting == 0
            assert stats.num_free_blocks == stats.num_blocks
    finally:
        stuck.set()


def test_a_constrained_row_neither_runs_ahead_nor_takes_a_step_from_its_cohort() -> None:
    """Its mask is always a step late; the other row is in every step all the same."""
    scheduler, stages = rig(num_stages=1, num_look_ahead=1)
    plain, constrained = sequence(0, max_tokens=30), sequence(1, max_tokens=10)
    constrained.is_constrained = True
    scheduler.add(plain)
    scheduler.add(constrained)
    assert scheduler.num_waiting == 2
    late = [constrained]
    num_steps = 0
    while scheduler.num_running + scheduler.num_waiting:
        batches = fill(scheduler, stages)
        num_steps += len(batches)
        for batch in batches:
            assert plain.row in batch.rows_S.tolist() or plain.is_ended
        events = run_step(scheduler, stages)
        for each in late:
            if not each.is_ended:
                scheduler.allow(each, mask_of([ord("x")], VOCAB_SIZE))
        late = [each for each, _ in scheduler.take_constrained_tokens()]
        assert len(events.seq_ids) == len(set(events.seq_ids))
    output = plain.token_ids[plain.num_prompt_tokens :]
    assert output == expected_tokens(plain.prompt_token_ids, plain.sampling)
    assert constrained.token_ids[constrained.num_prompt_tokens :] == [ord("x")] * 10
    assert num_steps <= 32


def test_a_preempted_one_waits_for_its_mask_outside_the_line() -> None:
    scheduler, stages = rig(num_stages=1, num_look_ahead=0, num_blocks=32)
    constrained = sequence(0, max_tokens=5)
    constrained.is_constrained = True
    scheduler.add(constrained)
    scheduler.allow(constrained, mask_of([ord("x")], VOCAB_SIZE))
    fill(scheduler, stages)
    run_step(scheduler, stages)
    scheduler._preempt(constrained)
    assert constrained.awaits_mask
    assert scheduler.num_waiting == 1
    assert scheduler.schedule() is None
    for letter in (ord("y"), ord("z")):
        scheduler.allow(constrained, mask_of([letter], VOCAB_SIZE))
        fill(scheduler, stages)
        run_step(scheduler, stages)
    assert bytes(constrained.token_ids[-3:]) == b"xyz"
