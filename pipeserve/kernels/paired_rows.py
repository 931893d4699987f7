"""The order of rows in which gate and up of a feed-forward layer are one matrix of pairs.

quant_mma_swiglu.cu multiplies by it: 16 rows, which are one warp's, are gate and then up of the
same 8 features, so that a thread has both of a feature. Of 256 features each, the runs of 16 are
transposed as a 4 x 4 grid: the 64 features of a block of 128 rows, the least that the kernel has,
are 16 neighbours in each of four runs of 64, which are 16 neighbours as well where columns are
interleaved (interleaved_rows.py). So it writes whole sectors of 32 bytes in both orders.
Only whole rows move, so quantised blocks move alike. Used at load and by kernels; plain torch.

Shapes: T tokens, F features, a multiple of 256.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

PAIRED_FEATURES = 256
"""Whose rows are neighbours; the features of a matrix are a multiple of them."""
_RUN, _EIGHT = 16, 8

GateUpOrder = Literal["halves", "paired"]
"""Of the outputs of a matrix of gate and up: all of gate before all of up, or as pair_rows."""


def pair_rows(gate: Tensor, up: Tensor) -> Tensor:
    """[F, ...] each -> [2F, ...]."""
    pairs = torch.stack([_by_runs(gate), _by_runs(up)], dim=4)
    return pairs.flatten(0, 5)


def _by_runs(rows: Tensor) -> Tensor:
    """[F / 256, 4, 4, 2, 8, ...]."""
    assert rows.shape[0] % PAIRED_FEATURES == 0, f"{rows.shape[0]} features"
    return rows.unflatten(0, (-1, 4, 4, _RUN // _EIGHT, _EIGHT)).transpose(1, 2)


def unpair_columns(gate_up_TF: Tensor) -> tuple[Tensor, Tensor]:
    """Gate and up [T, F] of outputs [T, 2F] of such a matrix."""
    pairs = gate_up_TF.unflatten(1, (-1, 4, 4, _RUN // _EIGHT, 2, _EIGHT)).transpose(2, 3)
    gate_TF, up_TF = (half.flatten(1) for half in pairs.unbind(5))
    return gate_TF, up_TF
