"""Constrained sequences among others: their tokens, their pace, their failures."""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections.abc import Callable

import pytest

from pipeserve.core.constraint import FreeRun, Grammar, TokenConstraint, WordArray
from pipeserve.core.sampling import SamplingParams
from pipeserve.engine.generation import Generation
from pipeserve.engine.messages import FinishReason
from pipeserve.engine.scheduler import Scheduler
from pipeserve.engine.sequence import Sequence
from pipeserve.errors import GrammarError
from tests.engine.running import RunningEngine, running_engine
from tests.engine.scheduling import fill, rig, run_step, run_until, sequence
from tests.fakes import FakeStages, expected_tokens, facts, mask_of

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


class UntilLetter:
    """Any letters up to the first of a few, then digits that fall from 9 to 0, then as before."""

    WATCHED = frozenset(b"abcd")

    def __init__(self) -> None:
        self._countdown: Countdown | None = None

    def allowed(self) -> WordArray | FreeRun:
        if self._countdown is None:
            return FreeRun(watched=self.WATCHED)
        return self._countdown.allowed()

    def accept(self, token_id: int) -> None:
        if self._countdown is None:
            assert token_id >= ord("a"), "a letter"
            self._countdown = Countdown(lambda: None) if token_id in self.WATCHED else None
        else:
            self._countdown.accept(token_id)
            if token_id == ord("0"):
                self._countdown = None


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
        case "letters":
            return UntilLetter()
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
    scheduler._running.preempt(constrained)
    assert constrained.awaits_mask
    assert scheduler.num_waiting == 1
    assert scheduler.schedule() is None
    for letter in (ord("y"), ord("z")):
        scheduler.allow(constrained, mask_of([letter], VOCAB_SIZE))
        fill(scheduler, stages)
        run_step(scheduler, stages)
    assert bytes(constrained.token_ids[-3:]) == b"xyz"


async def test_free_runs_end_where_something_has_to_be_found_out() -> None:
    async with running_engine(constraints=build) as running:
        results = await asyncio.gather(
            *(collect(generate(running, seed, "letters", max_tokens=60)) for seed in range(20))
        )
    for token_ids, reason in results:
        assert re.fullmatch(rb"([e-z]*[a-d]9876543210)*([e-z]*|[e-z]*[a-d]\d*)", token_ids)
        assert reason is FinishReason.LENGTH
    assert sum(token_ids.count(b"0") for token_ids, _ in results) > 20


def run_constrained(scheduler: Scheduler, stages: FakeStages, each: Sequence) -> int:
    """To its end; the number of steps."""
    constraint, num_steps = UntilLetter(), 0
    scheduler.add(each)
    scheduler.allow(each, constraint.allowed())
    while not each.is_ended:
        num_steps += len(fill(scheduler, stages))
        run_step(scheduler, stages)
        for _, token_ids in scheduler.take_constrained_tokens():
            for token_id in token_ids:
                constraint.accept(token_id)
            scheduler.allow(each, constraint.allowed())
    return num_steps


def test_a_free_run_is_looked_ahead_and_what_ran_too_far_is_dropped() -> None:
    num_ahead = 0
    for seed in range(12):
        scheduler, stages = rig(num_stages=1, num_look_ahead=1)
        each = sequence(seed, max_tokens=30)
        each.is_constrained = True
        num_steps = run_constrained(scheduler, stages, each)
        output = bytes(each.token_ids[each.num_prompt_tokens :])
        num_runs = len(re.findall(rb"[a-d]", output[:-1]))
        assert re.fullmatch(rb"([e-z]*[a-d]9876543210)*([e-z]*|[e-z]*[a-d]\d*)", output)
        assert num_steps == 30 + num_runs, "one step is lost where a run ends"
        num_ahead += num_runs
        assert scheduler.num_preemptions == 0
        assert scheduler.pool.num_free == scheduler.pool.num_blocks
    assert num_ahead > 12


def test_the_first_of_a_run_that_is_over_begins_anew_in_its_row() -> None:
    """With all that its row knew before, so that what was dropped counts for no penalty."""
    scheduler, stages = rig(num_stages=1, num_look_ahead=1)
    each = sequence(0, max_tokens=9)
    each.is_constrained = True
    scheduler.add(each)
    scheduler.allow(each, FreeRun(watched=frozenset(range(256))))
    assert len(fill(scheduler, stages)) == 2
    row, blocks = each.row, list(each.block_table)
    run_step(scheduler, stages)
    assert each.is_rewound
    assert fill(scheduler, stages) == []
    scheduler.allow(each, mask_of([ord("7")], VOCAB_SIZE))
    (batch,) = fill(scheduler, stages)
    (start,) = batch.starts
    assert (start.row, start.token_ids.tolist()) == (row, each.token_ids)
    assert batch.prefill_token_ids.tolist() == each.token_ids[-1:]
    assert batch.block_ids.tolist()[: len(blocks)] == blocks
    events = run_step(scheduler, stages)  # of the step that ran too far
    assert events.seq_ids == ()
    run_step(scheduler, stages)
    assert each.token_ids[-1] == ord("7")


def test_a_run_of_so_many_tokens_is_not_run_beyond() -> None:
    scheduler, stages = rig(num_stages=1, num_look_ahead=1)
    each = sequence(0, max_tokens=9)
    each.is_constrained = True
    scheduler.add(each)
    scheduler.allow(each, FreeRun(watched=frozenset(), max_tokens=3))
    batches = run_until(scheduler, stages, lambda: each.awaits_mask)
    assert len(batches) == 3
    assert not each.is_rewound
    ((_, token_ids),) = scheduler.take_constrained_tokens()
    assert list(token_ids) == each.token_ids[-3:]
