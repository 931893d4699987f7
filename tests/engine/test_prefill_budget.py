"""How much prompt goes into a step: even among steps, and by what its attention costs."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from pipeserve.engine.attention_cost import MOST, AttentionCost, StepWork
from pipeserve.engine.policy import AdmissionPolicy
from pipeserve.engine.prefill_budget import ITERATIONS, LEAST, PrefillBudget
from tests.engine.scheduling import fill, rig, run_step, run_until, sequence
from tests.fakes import facts

GPU = facts(num_stages=2, max_batch_tokens=2048)


def test_a_prompt_is_spread_evenly_over_steps_that_others_decode_in() -> None:
    budget, pending, sizes = PrefillBudget(GPU), 4000, []
    while pending > 0:
        size = budget.num_tokens(num_decode_rows=100, num_pending=pending, is_decoding=True)
        sizes.append(min(size, pending))
        pending -= size
    assert sizes[0] == 4000 / (ITERATIONS * 2)
    assert all(now >= 0.96 * before for before, now in pairwise(sizes[:-1]))
    assert len(sizes) < 1.3 * ITERATIONS * 2


def test_an_empty_queue_lets_the_budget_fall_and_it_never_exceeds_the_step() -> None:
    budget = PrefillBudget(GPU)
    large = {"num_decode_rows": 48, "is_decoding": True}
    assert budget.num_tokens(num_pending=10**6, **large) == 2000
    for _ in range(60):
        budget.num_tokens(num_pending=0, **large)
    assert budget.num_tokens(num_pending=1, **large) == LEAST


def test_alone_a_prompt_is_cut_into_one_chunk_per_stage() -> None:
    budget = PrefillBudget(GPU)
    assert budget.num_tokens(num_decode_rows=0, num_pending=1000, is_decoding=False) == 500
    assert budget.num_tokens(num_decode_rows=0, num_pending=100, is_decoding=False) == 256


def work(chance: random.Random, *, num_prompt_tokens: int | None = None) -> StepWork:
    num_tokens = chance.randint(1, 2048) if num_prompt_tokens is None else num_prompt_tokens
    return StepWork(
        num_rows=chance.randint(0, 256),
        num_positions=chance.randint(0, 200_000),
        num_prompt_tokens=num_tokens,
        num_pairs=num_tokens * chance.randint(0, 30_000),
    )


def time_s(step: StepWork, per_position: float) -> float:
    return 1e-6 * (
        3500
        + 20 * step.num_rows
        + 0.02 * step.num_positions
        + 15 * (step.num_prompt_tokens + per_position * step.num_pairs)
    )


@pytest.mark.parametrize("per_position", [1e-5, 3e-5, 2e-4])
def test_the_cost_of_attention_is_learned_through_noise(per_position: float) -> None:
    chance, cost = random.Random(1), AttentionCost()
    for _ in range(400):
        step = work(chance)
        cost.note(step, time_s(step, per_position) * chance.uniform(0.95, 1.05))
    assert cost.per_position == pytest.approx(per_position, rel=0.2)


@pytest.mark.parametrize("seed", range(5))
def test_nothing_is_learned_where_there_is_nothing(seed: int) -> None:
    chance, cost = random.Random(seed), AttentionCost()
    for _ in range(400):
        step = work(chance)
        cost.note(step, time_s(step, 0.0) * chance.uniform(0.8, 1.2))
    assert cost.per_position < 3e-6
    for _ in range(400):  # all steps alike, and their times by chance
        step = work(random.Random(0), num_prompt_tokens=512)
        cost.note(step, chance.uniform(0.001, 0.1))
    assert 0.0 <= cost.per_position <= MOST
    assert cost.num_tokens(100_000, 1000.0) >= 250


def test_chunks_of_equal_cost_become_shorter_as_the_prompt_goes_on() -> None:
    cost = AttentionCost()
    cost.per_position = 3e-5
    first, sizes = 0, []
    for _ in range(20):
        sizes.append(cost.num_tokens(first, 1000.0))
        assert cost.cost(first, sizes[-1]) == pytest.approx(1000.0, rel=0.01)
        first += sizes[-1]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < 0.75 * sizes[0]
    assert cost.num_tokens(10**9, 1000.0) == 250


def test_by_option_a_step_holds_prompts_or_decodes() -> None:
    scheduler, stages = rig(
        AdmissionPolicy(mixes_prefill=False), num_blocks=512, context_length=512, num_rows=16
    )
    for seq_id in range(4):
        scheduler.add(sequence(seq_id, 6, 60))
    run_until(scheduler, stages, lambda: scheduler.num_generated_tokens > 8)
    for seq_id in range(4, 12):
        scheduler.add(sequence(seq_id, 60, 20))
    batches = []
    for _ in range(60):
        batches += fill(scheduler, stages)
        run_step(scheduler, stages)
    kinds = [
        "decode" if batch.num_decode_rows else "prefill"
        for batch in batches
        if batch.num_decode_rows == 0 or len(batch.prefill_token_ids) == 0
    ]
    assert len(kinds) == len(batches), "no step has both"
    # Prompts wait all the time: they have every third step, after both cohorts' turns.
    assert kinds[2:20].count("prefill") == pytest.approx(6, abs=1)
