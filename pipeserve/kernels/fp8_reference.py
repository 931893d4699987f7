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
FP8_GROUP = 128
"""Columns of activations that share a scale where the kernels that compute them round them."""
NUM_SCALES = 8
"""That are tried per row of a matrix."""
_MULTIPLE = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp8Weight:
    """A matrix of N outputs and K inputs, one scale per output."""

    codes_NK: Tensor
    """float8_e4m3fn, contiguous."""
    scales_1N: Tensor
    """float32, as quantise_rows chooses them."""

    @property
    def num_bytes(self) -> int:
        return self.codes_NK.nbytes + self.scales_1N.nbytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp8Rows:
    """Activations in e4m3."""

    codes_TK: Tensor
    """float8_e4m3fn, contiguous."""
    scales_TG: Tensor
    """float32, contiguous: one per token, or one per FP8_GROUP columns of it."""

    @property
    def is_grouped(self) -> bool:
        return self.scales_TG.shape[1] > 1

    @property
    def tensors(self) -> tuple[Tensor, Tensor, None]:
        """Codes as bytes, scales and no sums, in the order in which kernels take rounded rows."""
        return self.codes_TK.view(torch.uint8), self.scales_TG, None


def has_fp8_shape(num_rows: int, num_columns: int) -> bool:
    """Whether scaled products take such a matrix: both sides are multiples of 16."""
    return num_rows % _MULTIPLE == 0 and num_columns % _MULTIPLE == 0


def quantise_tokens(x_TK: Tensor, group: int | None = None) -> Fp8Rows:
    """Each row, or each so many columns of it, by the scale of its largest magnitude; to nearest,
    ties to even."""
    values_TGI = x_TK.float().unflatten(1, (-1, group or x_TK.shape[1]))
    peaks_TG1 = values_TGI.abs().amax(-1, keepdim=True).clamp(min=LEAST_PEAK)
    scaled_TGI = (values_TGI * (LARGEST / peaks_TG1)).clamp(-LARGEST, LARGEST)
    return Fp8Rows(
        codes_TK=scaled_TGI.to(torch.float8_e4m3fn).flatten(1),
        scales_TG=peaks_TG1.squeeze(-1) * (1 / LARGEST),
    )


def quantise_rows(values_NK: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix's rows to e4m3 [N, K], each by the float32 scale [N, 1] of least squared error.

    Steps between codes double at powers of two, and the scale decides where in a row that is.
    Tried are an octave's scales from the least without clipping; after an octave errors repeat.
    """
    values_NK = values_NK.float()
    peaks_N1 = values_NK.abs().amax(-1, keepdim=True).clamp(min=LEAST_PEAK)
    codes_NK = torch.empty_like(values_NK, dtype=torch.float8_e4m3fn)
    scales_N1, least_N1 = peaks_N1, torch.full_like(peaks_N1, torch.inf)
    for index in range(NUM_SCALES):
        factor = 2 ** (index / NUM_SCALES)
        some_N1 = peaks_N1 * (factor / LARGEST)
        scaled_NK = (values_NK / some_N1).clamp_(-LARGEST, LARGEST)
        some_NK = scaled_NK.to(torch.float8_e4m3fn)
        errors_N1 = scaled_NK.sub_(some_NK.float()).square_().sum(-1, keepdim=True) * factor**2
        is_better_N1 = errors_N1 < least_N1
        # By their bits: torch selects few things of 8-bit floats.
        bits_NK, some_bits_NK = codes_NK.view(torch.uint8), some_NK.view(torch.uint8)
        torch.where(is_better_N1, some_bits_NK, bits_NK, out=bits_NK)
        scales_N1 = torch.where(is_better_N1, some_N1, scales_N1)
        least_N1 = torch.minimum(errors_N1, least_N1)
    return codes_NK, scales_N1


def dequantise(weight: Fp8Weight) -> Tensor:
    """float32 [N, K]."""
    return weight.codes_NK.float() * weight.scales_1N.t()


def values_of_rows(x: Fp8Rows) -> Tensor:
    """float32 [T, K]."""
    values_TGI = x.codes_TK.float().unflatten(1, (x.scales_TG.shape[1], -1))
    return (values_TGI * x.scales_TG.unsqueeze(-1)).flatten(1)


def scaled_product(x: Fp8Rows, weight: Fp8Weight, bias_N: Tensor | None) -> Tensor:
    """x W^T + b [T, N] in float32."""
    bias_N = None if bias_N is None else bias_N.float()
    return functional.linear(values_of_rows(x), dequantise(weight), bias_N)


def fp8_linear(x_TK: Tensor, weight: Fp8Weight, bias_N: Tensor | None) -> Tensor:
    """x W^T + b [T, N] in x's type, with x rounded to e4m3 per token, summed in float32."""
    return scaled_product(quantise_tokens(x_TK), weight, bias_N).to(x_TK.dtype)
