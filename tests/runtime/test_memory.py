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
