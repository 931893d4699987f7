"""Interleaved rows: the kernel against the twin, and the twin against the description."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is a development dependency; it is not installed")

from pipeserve.kernels.interleaved_rows import interleave_rows
from pipeserve.kernels.quant_reference import interleave_rows as twin


def test_order_is_that_of_the_description() -> None:
    """Column 64 q + 32 n + 4 w + 2 e + h lies at 32 w + 16 n + 8 h + 2 q + e."""
    found = twin(torch.arange(512).reshape(1, 512))[0]
    for q, n, w, e, h in [(0, 0, 0, 0, 0), (1, 0, 0, 0, 0), (3, 1, 7, 1, 1), (2, 0, 5, 1, 0)]:
        at, column = 32 * w + 16 * n + 8 * h + 2 * q + e, 64 * q + 32 * n + 4 * w + 2 * e + h
        assert found[at] == column and found[256 + at] == 256 + column


@pytest.mark.parametrize("num_columns", [256, 1280])
def test_interleave_rows(num_columns: int, device: torch.device) -> None:
    wide_TK = torch.randn(3, num_columns + 8, device=device).half()
    x_TK = wide_TK[:, :num_columns]
    assert torch.equal(interleave_rows(x_TK), twin(x_TK))
