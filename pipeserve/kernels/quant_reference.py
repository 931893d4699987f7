"""Plain-torch twins of the kernels on planar weights: dequantise, quantise activations, multiply.

Runs on whichever stage thread calls. Knows only the planar layout.

Shapes: N rows (outputs), K columns (inputs), U units of 64 columns, G groups, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from pipeserve.kernels.fp8_reference import Fp8Rows, values_of_rows
from pipeserve.kernels.quant_layout import PLANE_BYTES, UNIT, PlanarWeight

ACTIVATION_GROUP = 32
_SUPER = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantisedRows:
    """Activations as signed bytes with a scale per 32, columns padded with zeros to whole units."""

    codes_TK: Tensor
    """int8."""
    scales_TG: Tensor
    """float32 [T, K / 32]: largest magnitude of the group / 127."""
    sums_TG: Tensor
    """int16 [T, K / 16]: sums of 16 codes, which offsets and minima multiply."""

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Codes, scales and sums, in the order in which kernels take them."""
        return self.codes_TK, self.scales_TG, self.sums_TG


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedRows:
    """Activations in several forms, of which a product takes the one it needs."""

    values_TK: Tensor
    rounded: QuantisedRows | None = None
    """Of the values."""
    interleaved_TK: Tensor | None = None
    """The values as interleave_rows has them."""
    e4m3: Fp8Rows | None = None
    """Of the values."""


LinearInput = Tensor | PreparedRows | Fp8Rows


def values_of(x: LinearInput) -> Tensor:
    """The floats [T, K]."""
    match x:
        case PreparedRows():
            return x.values_TK
        case Fp8Rows():
            return values_of_rows(x)
    return x


def quantise_rows(x_TK: Tensor) -> QuantisedRows:
    """The activation format of llama.cpp's q8_1, with sums of 16 instead of scaled sums of 32."""
    num_tokens = x_TK.shape[0]
    padded = functional.pad(x_TK.float(), (0, -x_TK.shape[1] % UNIT))
    groups = padded.reshape(num_tokens, -1, ACTIVATION_GROUP)
    scales_TG = groups.abs().amax(-1) * (1 / 127)
    inverse = 1 / torch.where(scales_TG > 1e-30, scales_TG, 1.0)
    codes = torch.floor(groups * inverse.unsqueeze(-1) + 0.5).to(torch.int8)
    sums_TG = codes.reshape(num_tokens, -1, 16).sum(-1, dtype=torch.int16)
    return QuantisedRows(codes_TK=codes.flatten(1), scales_TG=scales_TG, sums_TG=sums_TG)


def round_rows(x_TK: Tensor) -> Tensor:
    """The values that quantise_rows keeps of x, in x's type."""
    rows = quantise_rows(x_TK)
    values = rows.codes_TK.unflatten(1, (-1, ACTIVATION_GROUP)) * rows.scales_TG.unsqueeze(-1)
    return values.flatten(1)[:, : x_TK.shape[1]].to(x_TK.dtype)


def interleave_rows(x_TK: Tensor) -> Tensor:
    """Columns in the order that interleaved_rows.py describes."""
    parts = x_TK.reshape(x_TK.shape[0], -1, 4, 2, 8, 2, 2)
    return parts.permute(0, 1, 4, 3, 6, 2, 5).reshape(x_TK.shape)


def codes(weight: PlanarWeight) -> Tensor:
    """int32 [N, columns padded to units]: code - offset, or the table's value."""
    layout, num_columns = weight.layout, weight.scales.shape[1] * UNIT
    values = _unpack(weight.low, layout.low_bits)[:, :num_columns]
    if weight.high is not None:
        high = _unpack(weight.high, layout.high_bits)[:, :num_columns]
        values = values | high << layout.low_bits
    if layout.table is not None:
        return torch.tensor(layout.table, dtype=torch.int32, device=values.device)[values.long()]
    return values - layout.offset


def scales_and_mins(weight: PlanarWeight) -> tuple[Tensor, Tensor | None]:
    """float32 [N, groups of group_size, padded], and the minima that are subtracted."""
    match weight.layout.scale_kind:
        case "half":
            return _halves(weight.scales), None
        case "half_min":
            assert weight.mins is not None
            return _halves(weight.scales), _halves(weight.mins)
        case "power":
            exponents = weight.scales.view(torch.uint8).int()
            small = torch.tensor(0x00200000, device=exponents.device) << exponents.clamp(max=1)
            bits = torch.where(exponents < 2, small, exponents - 1 << 23)
            return bits.int().view(torch.float32), None
        case "u8_min":
            pairs = weight.scales.view(torch.uint8).unflatten(1, (-1, 2, 2)).float()
            super_scales, super_mins = _super_pair(weight, groups=8)
            return super_scales * pairs[:, :, 0].flatten(1), super_mins * pairs[:, :, 1].flatten(1)
        case "nibble_min":
            packed = weight.scales.view(torch.uint8)
            super_scales, super_mins = _super_pair(weight, groups=16)
            return super_scales * (packed & 15).float(), super_mins * (packed >> 4).float()
        case "i8" | "i8_pair":
            assert weight.supers is not None
            small = weight.scales.view(torch.int8).float()
            repeats = _SUPER // weight.layout.group_size
            return _halves(weight.supers).repeat_interleave(repeats, dim=1) * small, None


def dequantise(weight: PlanarWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """[N, K], computed in float32 in the order of the gguf package, so bit for bit its values."""
    scales, mins = scales_and_mins(weight)
    grouped = codes(weight).unflatten(1, (scales.shape[1], -1)).float()
    values = scales.unsqueeze(-1) * grouped
    if mins is not None:
        values = values - mins.unsqueeze(-1)
    return values.flatten(1)[:, : weight.num_columns].to(dtype)


def matmul(x_TK: Tensor, weight: PlanarWeight, bias_N: Tensor | None = None) -> Tensor:
    """x W^T + b [T, N] with weights rounded to x's type."""
    return functional.linear(x_TK, dequantise(weight, x_TK.dtype), bias_N)


def matmul_int8(x: QuantisedRows, weight: PlanarWeight) -> Tensor:
    """float32 [T, N]: exact integer products per 16 columns, scaled and summed in float32."""
    scales, mins = scales_and_mins(weight)
    repeats = weight.layout.group_size // 16
    x_TG16 = x.codes_TK.unflatten(1, (-1, 16)).float()
    w_NG16 = codes(weight).unflatten(1, (-1, 16)).float()
    products_TNG = torch.einsum("tgi,ngi->tng", x_TG16, w_NG16)
    values_TNG = products_TNG * scales.repeat_interleave(repeats, dim=1)
    if mins is not None:
        minima_NG = mins.repeat_interleave(repeats, dim=1)
        values_TNG = values_TNG - x.sums_TG.float().unsqueeze(1) * minima_NG
    x_scales_TG = x.scales_TG.repeat_interleave(2, dim=1)
    return torch.einsum("tng,tg->tn", values_TNG, x_scales_TG)


def _unpack(plane: Tensor, bits: int) -> Tensor:
    """uint8 [N, bytes] -> int32 [N, columns]."""
    if bits == 8:
        return plane.view(torch.int8).int()
    bytes_NJB = plane.int().unflatten(1, (-1, PLANE_BYTES))
    shifts = range(0, 8, bits)
    return torch.stack([bytes_NJB >> s & (1 << bits) - 1 for s in shifts], dim=2).flatten(1)


def _halves(words: Tensor) -> Tensor:
    return words.view(torch.float16).float()


def _super_pair(weight: PlanarWeight, groups: int) -> tuple[Tensor, Tensor]:
    """d and dmin per group, of which there are so many in 256 weights."""
    assert weight.supers is not None
    pairs = _halves(weight.supers).unflatten(1, (-1, 2)).repeat_interleave(groups, dim=1)
    return pairs[..., 0], pairs[..., 1]
