"""Rows with a chain of samplers beside others: who waits for whom, and who never does."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeserve.core.batch import MicroBatch
from pipeserve.core.sampler_chain import SamplerChain
from pipeserve.core.sampling import SamplingParams
from pipeserve.engine.scheduler import Scheduler
from pipeserve.engine.sequence import Sequence, SequenceStatus
from pipeserve.errors import StageStalledError
from tests.engine.running import running_engine
from tests.engine.scheduling import assert_right, fill, run_step, sequence
from tests.engine.test_engine import collect
from tests.fakes import FakeStages, expected_tokens, facts

CHAIN = SamplerChain(typical_p=0.9)


def chained(seq_id: int, num_prompt: int = 4, max_tokens: int = 8) -> Sequence:
    made = sequence(seq_id, num_prompt, max_tokens)
    return Sequence(
        seq_id=seq_id,
        prompt_token_ids=made.prompt_token_ids,
        sampling=replace(made.sampling, chain=CHAIN),
    )


def late_rig(*, num_stages: int = 1, **changes: int) -> tuple[Scheduler, FakeStages]:
    scheduler = Scheduler(facts(num_stages=num_stages, samples_late=True, **changes))
    return scheduler, FakeStages(scheduler.facts)


def take_late(scheduler: Scheduler, stages: FakeStages) -> int:
    """All late tokens that have been sampled; how many."""
    count = 0
    while stages.num_late:
        count += len(scheduler.update_late(stages.take_late()).token_ids)
    return count


def rows_of(batch: MicroBatch, *sequences: Sequence) -> list[bool]:
    return [each.row in batch.rows_S.tolist() for each in sequences]


def late_rows(batch: MicroBatch) -> list[int]:
    seqs = [] if batch.late_seqs_L is None else batch.late_seqs_L
    return batch.sampled_rows[seqs].tolist()


def test_alone_a_chain_is_sampled_in_the_step_and_looked_ahead() -> None:
    scheduler, stages = late_rig()
    one, other = chained(0), chained(1)
    scheduler.add(one)
    scheduler.add(other)
    prefill, ahead = fill(scheduler, stages)
    assert (prefill.late_seqs_L, ahead.late_seqs_L, ahead.given) == (None, None, None)
    assert ahead.num_decode_rows == 2
    for _ in range(20):
        assert all(batch.late_seqs_L is None for batch in fill(scheduler, stages))
        if not scheduler.is_owed:
            break
        run_step(scheduler, stages)
    assert_right(one)
    assert_right(other)


def test_beside_a_plain_row_a_chain_is_late_and_its_token_is_given() -> None:
    scheduler, stages = late_rig()
    plain, exotic = sequence(0, max_tokens=30), chained(1, max_tokens=30)
    scheduler.add(plain)
    scheduler.add(exotic)
    prefill, ahead = fill(scheduler, stages)
    assert late_rows(prefill) == [exotic.row]
    assert rows_of(ahead, plain, exotic) == [True, False], "its token is not there"
    assert run_step(scheduler, stages).seq_ids == (0,)
    (ahead,) = fill(scheduler, stages)
    assert rows_of(ahead, plain, exotic) == [True, False]
    assert take_late(scheduler, stages) == 1
    run_step(scheduler, stages)
    (together,) = fill(scheduler, stages)
    assert rows_of(together, plain, exotic) == [True, True]
    assert together.given is not None
    assert together.given.rows_G.tolist() == [exotic.row]
    assert together.given.ids_G.tolist() == exotic.token_ids[-1:]
    assert together.needs_step is not None and together.needs_step >= prefill.step_id


def test_a_plain_row_is_in_every_step_although_late_tokens_never_come() -> None:
    scheduler, stages = late_rig()
    plain, exotic = sequence(0, max_tokens=30), chained(1, max_tokens=30)
    scheduler.add(plain)
    scheduler.add(exotic)
    batches = fill(scheduler, stages)
    row = plain.row
    while plain.status is SequenceStatus.RUNNING:
        num_left = plain.sampling.max_tokens - plain.num_output_tokens
        assert plain.num_in_flight == min(2, num_left), "one is looked ahead"
        run_step(scheduler, stages)
        batches += fill(scheduler, stages)
    assert len(batches) == 30
    assert all(row in batch.rows_S for batch in batches)
    assert_right(plain)
    assert not scheduler.has_steps_in_flight and scheduler.is_owed
    assert take_late(scheduler, stages) == 1
    while scheduler.is_owed or fill(scheduler, stages):
        fill(scheduler, stages)
        if scheduler.has_steps_in_flight:
            run_step(scheduler, stages)
        take_late(scheduler, stages)
    assert_right(exotic)


def test_late_rows_of_their_own_cohort_leave_the_others_looked_ahead() -> None:
    scheduler, stages = late_rig(num_stages=2)
    plain, exotic = sequence(0, max_tokens=20), chained(1, max_tokens=20)
    scheduler.add(plain)
    scheduler.add(exotic)
    fill(scheduler, stages)
    assert plain.cohort != exotic.cohort
    for _ in range(10):
        run_step(scheduler, stages)
        fill(scheduler, stages)
        assert plain.num_in_flight == 2
    take_late(scheduler, stages)
    batches = fill(scheduler, stages)
    run_step(scheduler, stages)
    batches += fill(scheduler, stages)
    assert any(rows_of(batch, exotic)[0] for batch in batches)


def test_when_the_first_plain_prompt_ends_nobody_is_looked_ahead_into_a_late_token() -> None:
    scheduler, stages = late_rig()
    exotic, plain = chained(0, max_tokens=30), sequence(1, max_tokens=30)
    scheduler.add(exotic)
    fill(scheduler, stages)
    run_step(scheduler, stages)
    assert exotic.num_in_flight == 1
    scheduler.add(plain)
    (batch,) = fill(scheduler, stages)
    assert rows_of(batch, plain, exotic) == [True, False]
    assert batch.late_seqs_L is None
    run_step(scheduler, stages)
    batches = fill(scheduler, stages)
    assert any(late_rows(batch) == [exotic.row] for batch in batches)


def test_when_the_last_plain_sequence_ends_chains_are_looked_ahead_again() -> None:
    scheduler, stages = late_rig()
    plain, exotic = sequence(0, max_tokens=2), chained(1, max_tokens=30)
    scheduler.add(plain)
    scheduler.add(exotic)
    fill(scheduler, stages)
    run_step(scheduler, stages)
    run_step(scheduler, stages)
    assert plain.status is SequenceStatus.FINISHED
    assert fill(scheduler, stages) == [], "a late token is known before it is read"
    take_late(scheduler, stages)
    given, ahead = fill(scheduler, stages)
    assert given.given is not None and ahead.given is None
    assert (given.late_seqs_L, ahead.late_seqs_L) == (None, None)


def test_late_tokens_of_rows_that_were_freed_are_dropped() -> None:
    scheduler, stages = late_rig(num_rows=2)
    plain, exotic, next_one = sequence(0, max_tokens=30), chained(1), chained(2)
    scheduler.add(plain)
    scheduler.add(exotic)
    scheduler.add(next_one)
    fill(scheduler, stages)
    row = exotic.row
    scheduler.end(exotic, SequenceStatus.ABORTED)
    run_step(scheduler, stages)
    fill(scheduler, stages)
    assert next_one.row == row
    assert take_late(scheduler, stages) == 0
    assert exotic.num_output_tokens == 0
    while next_one.status is SequenceStatus.RUNNING:
        run_step(scheduler, stages)
        take_late(scheduler, stages)
        fill(scheduler, stages)
    assert_right(next_one)


@settings(max_examples=100, deadline=None)
@given(
    num_stages=st.integers(1, 3),
    num_plain=st.integers(1, 4),
    num_chained=st.integers(1, 4),
    delay=st.integers(0, 9),
    num_first=st.integers(0, 7),
)
def test_nobody_starves_and_plain_rows_are_looked_ahead(
    num_stages: int, num_plain: int, num_chained: int, delay: int, num_first: int
) -> None:
    """delay: steps for which late tokens are on their way."""
    scheduler, stages = late_rig(num_stages=num_stages, num_blocks=256)
    plain = [sequence(i, 3 + i, 40) for i in range(num_plain)]
    exotic = [chained(100 + i, 2 + i, 40) for i in range(num_chained)]
    everyone = [*plain, *exotic]
    for each in everyone[num_first:] + everyone[:num_first]:
        scheduler.add(each)
    num_steps = num_decoding_steps = 0
    while any(each.status is not SequenceStatus.FINISHED for each in everyone):
        fill(scheduler, stages)
        is_prefilled = all(each.num_output_tokens for each in everyone)
        num_decoding_steps = num_decoding_steps + 1 if is_prefilled else 0
        if num_stages == 1 and num_decoding_steps > 2:
            for each in plain:
                num_left = each.sampling.max_tokens - each.num_output_tokens
                assert each.num_in_flight == min(2, num_left)
        if scheduler.has_steps_in_flight:
            run_step(scheduler, stages)
        if num_steps % (1 + delay) == 0 or not scheduler.has_steps_in_flight:
            take_late(scheduler, stages)
        num_steps += 1
        assert num_steps < 40 * len(everyone) * (2 + delay), "somebody starves"
    for each in everyone:
        assert_right(each)


async def test_the_engine_on_a_pipeline_that_samples_late() -> None:
    def params(index: int) -> SamplingParams:
        chain = CHAIN if index % 3 else None
        return SamplingParams(max_tokens=1 + index % 13, seed=index, chain=chain, num_logprobs=1)

    async with running_engine(pipeline_facts=facts(samples_late=True)) as running:
        jobs = [(tuple(range(i, i + 1 + i % 7)), params(i)) for i in range(60)]
        results = await asyncio.gather(
            *(collect(running.client.generate(prompt, sampling)) for prompt, sampling in jobs)
        )
        for (prompt, sampling), (token_ids, _) in zip(jobs, results, strict=True):
            assert token_ids == expected_tokens(prompt, sampling)
        stats = await running.client.stats()
        assert stats.num_free_blocks == stats.num_blocks


async def test_scores_of_a_prompt_are_there_before_a_late_token_that_overtook_them() -> None:
    late = SamplingParams(max_tokens=1, seed=1, chain=CHAIN, num_logprobs=1, num_prompt_logprobs=1)
    async with running_engine(
        pipeline_facts=facts(samples_late=True, num_stages=1), late_first=True
    ) as running:
        plain = asyncio.create_task(
            collect(running.client.generate((1, 2), SamplingParams(max_tokens=60, seed=0)))
        )
        for _ in range(10):
            generation = running.client.generate((5, 6, 7, 8, 9), late)
            async with generation:
                async for _ in generation:
                    assert len(generation.prompt_logprobs) == 4
        token_ids, _ = await plain
        assert token_ids == expected_tokens((1, 2), SamplingParams(max_tokens=60, seed=0))


async def test_slow_steps_are_no_stall_of_late_tokens() -> None:
    """Each takes most of the time that nothing may come for."""
    options = {"step_s": 0.12, "stage_timeout_s": 0.2}
    async with running_engine(
        pipeline_facts=facts(samples_late=True, num_stages=1), **options
    ) as running:
        plain = SamplingParams(max_tokens=6, seed=0)
        first = asyncio.create_task(collect(running.client.generate((1, 2), plain)))
        await asyncio.sleep(0.14)
        late = replace(plain, max_tokens=2, chain=CHAIN)
        token_ids, _ = await collect(running.client.generate((1, 2), late))
        assert token_ids == expected_tokens((1, 2), late)
        await first


async def test_late_tokens_that_never_come_are_noticed_though_steps_go_on() -> None:
    options = {"step_s": 0.002, "blocks_late": True, "stage_timeout_s": 0.2}
    async with running_engine(
        pipeline_facts=facts(samples_late=True, num_blocks=8192, context_length=32768), **options
    ) as running:
        plain = SamplingParams(max_tokens=30_000, seed=0)
        jobs = [
            running.client.generate((1,), each) for each in (plain, replace(plain, chain=CHAIN))
        ]
        results = await asyncio.gather(*map(collect, jobs), return_exceptions=True)
        assert all(isinstance(result, StageStalledError) for result in results)
        assert "no late token came back for 0.2 s" in str(results[0])


@pytest.mark.parametrize("samples_late", [False, True])
def test_only_a_pipeline_that_can_is_told_to(samples_late: bool) -> None:
    scheduler = Scheduler(facts(num_stages=1, samples_late=samples_late))
    stages = FakeStages(scheduler.facts)
    scheduler.add(sequence(0))
    scheduler.add(chained(1))
    first, *_ = fill(scheduler, stages)
    assert (first.late_seqs_L is not None) == samples_late
