"""Matrices in 8-bit floats (e4m3): the format, how it is made, and the plain-torch twins of fp8.py.

Runs on a loading thread and on stage threads. Knows neither files nor Triton.

Shapes: T tokens, N outputs, K inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

LARGEST = 448.0
"""Of e4m3 as the Open Compute Project specifies it (OFP8): four bits of exponent, no infinity."""
LEAST_PEAK = 1e-10
"""A row whose largest magnitude is less becomes zeros, since its scale would have no reciprocal."""
_MULTIPLE = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp8Weight:
    """A matrix of N outputs and K inputs, one scale per output."""

    codes_NK: Tensor
    """float8_e4m3fn, contiguous."""
    scales_1N: Tensor
    """float32: largest magnitude of the row / 448."""

    @property
    def num_bytes(self) -> int:
        return self.codes_NK.nbytes + self.scales_1N.nbytes


def has_fp8_shape(num_rows: int, num_columns: int) -> bool:
    """Whether scaled products take such a matrix: both sides are multiples of 16."""
    return num_rows % _MULTIPLE == 0 and num_columns % _MULTIPLE == 0


def quantise_tokens(x_TK: Tensor) -> tuple[Tensor, Tensor]:
    """Rows to e4m3 [T, K], each by its own float32 scale [T, 1]; to nearest, ties to even."""
    values_TK = x_TK.float()
    peaks_T1 = values_TK.abs().amax(-1, keepdim=True).clamp(min=LEAST_PEAK)
    scaled_TK = (values_TK * (LARGEST / peaks_T1)).clamp(-LARGEST, LARGEST)
    return scaled_TK.to(torch.float8_e4m3fn), peaks_T1 * (1 / LARGEST)


def dequantise(weight: Fp8Weight) -> Tensor:
    """float32 [N, K]."""
    return weight.codes_NK.float() * weight.scales_1N.t()


def fp8_linear(x_TK: Tensor, weight: Fp8Weight, bias_N: Tensor | None) -> Tensor:
    """x W^T + b [T, N] in x's type, with x rounded to e4m3 per token, summed in float32."""
    codes_TK, scales_T1 = quantise_tokens(x_TK)
    bias_N = None if bias_N is None else bias_N.float()
    out_TN = functional.linear(codes_TK.float() * scales_T1, dequantise(weight), bias_N)
    return out_TN.to(x_TK.dtype)
