"""The step that a GPU's memory is measured by."""

from __future__ import annotations

import pytest

from pipeserve.runtime.memory import dearest_step
from tests.fakes import facts


@pytest.mark.parametrize(
    ("num_chunks", "num_tokens"), [(1, 48), (3, 100), (4, 100), (5, 100), (2, 96)]
)
def test_the_dearest_step_is_as_large_as_its_rows_allow(num_chunks: int, num_tokens: int) -> None:
    limits = facts(num_rows=5, num_blocks=64, context_length=48, max_batch_tokens=100)
    step = dearest_step(limits, num_chunks=num_chunks)
    assert step.num_tokens == len(step.prefill_token_ids) == num_tokens
    assert step.num_rows == num_chunks == len(step.starts)
    assert max(step.num_tokens_S) <= 48
    assert max(step.num_tokens_S) - min(step.num_tokens_S) <= 1


@pytest.mark.parametrize(("chained_every", "num_chained"), [(1, 5), (2, 3)])
def test_rows_with_and_without_a_chain_are_met(chained_every: int, num_chained: int) -> None:
    limits = facts(num_rows=5, num_blocks=64, context_length=48, samples_late=True)
    step = dearest_step(limits, num_chunks=5, chained_every=chained_every)
    chained = [start.row for start in step.starts if start.sampling.chain is not None]
    assert len(chained) == num_chained
    assert step.late_seqs_L is not None and step.late_seqs_L.tolist() == chained
    assert any(step.starts[row].sampling.has_penalties for row in chained)
    assert not all(step.starts[row].sampling.has_penalties for row in chained)
    (only,) = dearest_step(limits, num_chunks=1).starts
    assert only.sampling.chain is not None
