"""What the scheduler decides in situations that can be told in a sentence."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest

from pipeserve.core.batch import MicroBatch
from pipeserve.engine.block_pool import BlockPool
from pipeserve.engine.scheduler import Scheduler
from pipeserve.engine.sequence import IllegalTransitionError, SequenceStatus
from tests.engine.scheduling import (
    assert_right,
    expect_short_outputs,
    fill,
    run_all,
    run_step,
    sequence,
)
from tests.fakes import FakeStages, facts


def run_until_decoding(scheduler: Scheduler, stages: FakeStages, count: int) -> list[MicroBatch]:
    batches: list[MicroBatch] = []
    while not batches or batches[-1].num_decode_rows < count:
        batches += fill(scheduler, stages)
        run_step(scheduler, stages)
    return batches


def test_decode_rows_are_split_evenly_over_the_stages() -> None:
    scheduler = Scheduler(facts(num_stages=2, num_rows=8, num_blocks=128))
    stages = FakeStages(scheduler.facts)
    for seq_id in range(8):
        scheduler.add(sequence(seq_id, max_tokens=50))
    run_until_decoding(scheduler, stages, 4)
    sizes = Counter()
    for _ in range(10):
        run_step(scheduler, stages)
        for batch in fill(scheduler, stages):
            sizes[batch.num_decode_rows] += 1
    assert set(sizes) == {4}


def test_a_lone_sequence_is_looked_ahead_and_never_waits_for_an_empty_cohort() -> None:
    scheduler = Scheduler(facts(num_stages=3))
    stages = FakeStages(scheduler.facts)
    scheduler.add(sequence(0))
    prefill, ahead = fill(scheduler, stages)
    assert (prefill.num_decode_rows, ahead.num_decode_rows) == (0, 1)
    assert ahead.needs_step == prefill.step_id
    run_step(scheduler, stages)
    assert [batch.num_decode_rows for batch in fill(scheduler, stages)] == [1]


def test_without_look_ahead_a_step_waits_for_the_previous_result() -> None:
    scheduler = Scheduler(facts(num_stages=1, num_look_ahead=0))
    stages = FakeStages(scheduler.facts)
    scheduler.add(sequence(0))
    assert len(fill(scheduler, stages)) == 1
    run_step(scheduler, stages)
    (decode,) = fill(scheduler, stages)
    # Known here, but maybe not yet where the first stage reads it.
    assert decode.needs_step == 0


def test_chunks_of_a_long_prompt_follow_each_other_without_waiting() -> None:
    scheduler = Scheduler(facts(num_stages=2, max_batch_tokens=16, num_rows=4))
    stages = FakeStages(scheduler.facts)
    scheduler.add(sequence(0, num_prompt=100))
    batches = fill(scheduler, stages)
    assert [batch.num_tokens for batch in batches] == [16, 16, 16]
    assert [batch.first_positions_S.tolist() for batch in batches] == [[0], [16], [32]]
    assert not any(batch.samples_S.any() for batch in batches)


def test_max_tokens_is_never_overrun_by_look_ahead() -> None:
    scheduler = Scheduler(facts(num_stages=2))
    stages = FakeStages(scheduler.facts)
    scheduler.add(sequence(0, max_tokens=3))
    num_samples = 0
    while scheduler.num_waiting or scheduler.num_running:
        num_samples += sum(int(batch.samples_S.sum()) for batch in fill(scheduler, stages))
        run_step(scheduler, stages)
    assert num_samples == 3


def test_the_newest_is_preempted_and_still_gets_its_tokens() -> None:
    scheduler = Scheduler(facts(num_blocks=8, block_size=2, context_length=16, num_rows=2))
    stages = FakeStages(scheduler.facts)
    expect_short_outputs(scheduler)
    old, new = sequence(0, max_tokens=12), sequence(1, max_tokens=12)
    scheduler.add(old)
    scheduler.add(new)
    while not scheduler.num_preemptions:
        fill(scheduler, stages)
        run_step(scheduler, stages)
    assert new.status is SequenceStatus.WAITING
    assert old.status is SequenceStatus.RUNNING
    run_all(scheduler, stages)
    for done in (old, new):
        assert_right(done)


@pytest.mark.parametrize("num_stages", [1, 2, 3])
def test_somebody_can_always_go_on_however_small_the_pool(num_stages: int) -> None:
    """Also where a cohort's only sequence is preempted by itself: the turn passes on."""
    num_preemptions = 0
    sizes = itertools.product(range(5, 10), range(1, 5), range(1, 5))
    for num_blocks, first, second in sizes:
        limits = facts(
            num_stages=num_stages, num_blocks=num_blocks, block_size=1, context_length=num_blocks
        )
        scheduler = Scheduler(limits)
        stages = FakeStages(limits)
        expect_short_outputs(scheduler)
        sequences = [
            sequence(seq_id, num_prompt=length, max_tokens=num_blocks - length)
            for seq_id, length in enumerate((first, second, second, first))
        ]
        for arriving in sequences:
            scheduler.add(arriving)
        run_all(scheduler, stages)
        num_preemptions += scheduler.num_preemptions
    assert num_preemptions > 0


def test_ending_a_sequence_frees_its_blocks_at_once() -> None:
    scheduler = Scheduler(facts())
    stages = FakeStages(scheduler.facts)
    aborted = sequence(0)
    scheduler.add(aborted)
    fill(scheduler, stages)
    assert scheduler.pool.num_free < scheduler.facts.num_blocks
    scheduler.end(aborted, SequenceStatus.ABORTED)
    assert scheduler.pool.num_free == scheduler.facts.num_blocks
    while scheduler.has_steps_in_flight:
        run_step(scheduler, stages)
    assert scheduler.num_generated_tokens == 0


def test_waiting_prompts_do_not_take_a_whole_step_from_those_that_decode() -> None:
    scheduler = Scheduler(facts(num_blocks=512, context_length=512, max_batch_tokens=64))
    stages = FakeStages(scheduler.facts)
    scheduler.add(sequence(0, max_tokens=100))
    run_until_decoding(scheduler, stages, 1)
    scheduler.add(sequence(1, num_prompt=200))
    batches: list[MicroBatch] = []
    for _ in range(4):
        batches += fill(scheduler, stages)
        run_step(scheduler, stages)
    mixed = [batch for batch in batches if len(batch.prefill_token_ids)]
    assert max(len(batch.prefill_token_ids) for batch in mixed) <= 25


def test_prompts_without_a_further_token_to_come_are_computed_at_full_pace() -> None:
    scheduler = Scheduler(facts(num_stages=1, max_batch_tokens=64, num_blocks=512, num_rows=32))
    stages = FakeStages(scheduler.facts)
    for seq_id in range(16):
        scheduler.add(sequence(seq_id, num_prompt=40, max_tokens=1))
    sizes = []
    while scheduler.num_waiting:
        sizes += [batch.num_tokens for batch in fill(scheduler, stages)]
        run_step(scheduler, stages)
    assert set(sizes) == {64}


def test_an_illegal_transition_raises_and_changes_nothing() -> None:
    done = sequence(0)
    done.move_to(SequenceStatus.ABORTED)
    with pytest.raises(IllegalTransitionError, match="from aborted to running"):
        done.start(0, num_computed_tokens=0)
    assert done.status is SequenceStatus.ABORTED
    assert done.row is None


def test_freeing_a_free_block_is_noticed() -> None:
    pool = BlockPool(2)
    taken = pool.allocate(1)
    assert taken is not None
    pool.free(taken)
    with pytest.raises(AssertionError, match="has no user"):
        pool.free(taken)


@pytest.mark.parametrize(
    ("num_prompt_tokens", "chunks"),
    [(64, [32, 32]), (72, [32, 40]), (73, [32, 32, 9]), (8, [8])],
)
def test_a_prompts_short_rest_goes_with_the_chunk_before_it(
    num_prompt_tokens: int, chunks: list[int]
) -> None:
    """A step of its own would cost the prompt's first token as long as a whole chunk."""
    limits = facts(num_stages=1, num_blocks=512, context_length=512, max_batch_tokens=256)
    scheduler = Scheduler(limits)
    stages = FakeStages(limits)
    scheduler.add(sequence(0, max_tokens=200))
    run_until_decoding(scheduler, stages, 1)
    scheduler.add(sequence(1, num_prompt_tokens))
    found: list[int] = []
    while sum(found) < num_prompt_tokens:
        sizes = [len(batch.prefill_token_ids) for batch in fill(scheduler, stages)]
        found += [size for size in sizes if size > 0]
        run_step(scheduler, stages)
    assert found == chunks


def test_a_short_rest_does_not_go_beyond_the_step() -> None:
    limits = facts(num_stages=1, num_blocks=512, context_length=512, max_batch_tokens=32)
    scheduler = Scheduler(limits)
    stages = FakeStages(limits)
    scheduler.add(sequence(0, 66))
    sizes = [batch.num_tokens for batch in fill(scheduler, stages)]
    while len(sizes) < 3:
        run_step(scheduler, stages)
        sizes += [batch.num_tokens for batch in fill(scheduler, stages)]
    assert max(sizes) <= 32 and sum(sizes) >= 66
