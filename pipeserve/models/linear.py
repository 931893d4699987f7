"""Linear layers: one callable per way of holding a weight matrix.

Used by one stage thread each. Quantised weights join here as further classes.

Shapes: T tokens, I inputs, O outputs.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

_PACK_FOR_ROWS = 8
"""Rows that oneDNN's blocked layout is chosen for. Measured with AVX-512 on 960 to 49152 outputs:
the one for 8 does as well as any for 1 to 256 rows; the one for 1 is up to 1.7 times slower."""


class Linear(Protocol):
    """y = x W^T + b."""

    def __call__(self, x_TI: Tensor) -> Tensor:
        """[T, I] -> [T, O]."""
        ...


class DenseLinear:
    """The matrix as torch stores it."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None) -> None:
        self._weight_OI = weight_OI
        self._bias_O = bias_O

    def __call__(self, x_TI: Tensor) -> Tensor:
        return functional.linear(x_TI, self._weight_OI, self._bias_O)


class PackedLinear:
    """float32 on the CPU in oneDNN's blocked layout; from 2 rows on up to 2.5 times faster."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None) -> None:
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight_OI, _PACK_FOR_ROWS)
        self._bias_O = bias_O

    def __call__(self, x_TI: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x_TI, self._packed, self._bias_O, "none", [], "")


def make_linear(weight_OI: Tensor, bias_O: Tensor | None) -> Linear:
    """The fastest way to hold this matrix where it lies."""
    is_packable = weight_OI.device.type == "cpu" and weight_OI.dtype == torch.float32
    if is_packable and torch.backends.mkldnn.is_available():
        return PackedLinear(weight_OI, bias_O)
    return DenseLinear(weight_OI, bias_O)
