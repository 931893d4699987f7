"""Plain quantisers for the block types that the gguf package only dequantises.

Round to nearest against each group's extreme or range: not the best codes, but codes in every
bit of a block. Formats as gguf.quants' dequantise reads them (ggml-common.h of llama.cpp).
Groups of zeros become exact zeros.

Shapes: B blocks, G groups of a block, I entries of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as Kind

Array = npt.NDArray[np.float32]
Codes = npt.NDArray[np.int32]
Bytes = npt.NDArray[np.uint8]

SUPER_BLOCK = 256
NONLINEAR = np.array(gguf.quants.IQ4_NL.kvalues, dtype=np.float32)
"""What the codes of IQ4_NL and IQ4_XS stand for; the first is the largest in magnitude."""


def quantise(values_NK: Array, kind: Kind) -> Bytes:
    """[N, bytes of a row]. K must be a multiple of the type's block."""
    quantise_blocks = _QUANTISERS.get(kind)
    if quantise_blocks is None:
        raw = gguf.quants.quantize(values_NK, kind)
        return np.ascontiguousarray(raw).view(np.uint8)
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = quantise_blocks(values_NK.reshape(-1, block_size))
    assert blocks.shape[1] == block_bytes
    return blocks.reshape(values_NK.shape[0], -1)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Affine:
    """d * scale * code - dmin * minimum."""

    d_B: Array
    dmin_B: Array
    scales_BG: Codes
    minima_BG: Codes
    codes: Codes
    """[B, 256]."""


def _affine(values: Array, *, group_size: int, code_bits: int, scale_bits: int) -> _Affine:
    groups_BGI = values.reshape(len(values), -1, group_size)
    lowest_BG = np.minimum(groups_BGI.min(-1), 0.0)
    steps_BG = (np.maximum(groups_BGI.max(-1), 0.0) - lowest_BG) / (2**code_bits - 1)
    most = 2**scale_bits - 1
    d_B, scales_BG = _two_levels(steps_BG, most)
    dmin_B, minima_BG = _two_levels(-lowest_BG, most)
    step_BG1 = (d_B[:, None] * scales_BG)[..., None]
    raised_BGI = groups_BGI + (dmin_B[:, None] * minima_BG)[..., None]
    codes = _rounded(_divided(raised_BGI, step_BG1), 0, 2**code_bits - 1)
    return _Affine(
        d_B=d_B,
        dmin_B=dmin_B,
        scales_BG=scales_BG,
        minima_BG=minima_BG,
        codes=codes.reshape(values.shape),
    )


def _symmetric(values: Array, *, code_bits: int, most: int) -> tuple[Array, Codes, Codes]:
    """d [B], scales [B, 16] up to `most` in magnitude, and codes [B, 256] from -2^(bits-1) on."""
    half = 2 ** (code_bits - 1)
    groups_BGI = values.reshape(len(values), 16, -1)
    d_B, scales_BG = _two_levels(_extremes(groups_BGI) / -half, most)
    step_BG1 = (d_B[:, None] * scales_BG)[..., None]
    codes = _rounded(_divided(groups_BGI, step_BG1), -half, half - 1)
    return d_B, scales_BG, codes.reshape(values.shape)


def _two_levels(wanted_BG: Array, most: int) -> tuple[Array, Codes]:
    """d [B], as float16 holds it, and integers [B, G], so that d * integer is about as wanted."""
    d_B = (np.abs(wanted_BG).max(-1) / most).astype(np.float16).astype(np.float32)
    return d_B, _rounded(_divided(wanted_BG, d_B[:, None]), -most, most)


def _extremes(groups: Array) -> Array:
    """The entry of the largest magnitude of each group, with its sign."""
    lowest, highest = groups.min(-1), groups.max(-1)
    return np.where(-lowest > highest, lowest, highest)


def _divided(values: Array, by: Array) -> Array:
    """0 where the divisor is 0."""
    return np.divide(values, by, out=np.zeros_like(values), where=by != 0.0)


def _rounded(values: Array, lowest: int, highest: int) -> Codes:
    return np.clip(np.rint(values), lowest, highest).astype(np.int32)


def _nearest_nonlinear(values: Array) -> Codes:
    midpoints = (NONLINEAR[1:] + NONLINEAR[:-1]) / 2
    return np.searchsorted(midpoints, values).astype(np.int32)


def _planes(codes: Codes, *, num_bits: int, run: int) -> Bytes:
    """Bit fields of `run` bytes: byte j holds the codes j, run + j, ... from its lowest bits up."""
    fields = codes.astype(np.uint8).reshape(len(codes), -1, 8 // num_bits, run)
    shifts = np.arange(0, 8, num_bits, dtype=np.uint8)[:, None]
    return np.bitwise_or.reduce(fields << shifts, axis=2).reshape(len(codes), -1)


def _halves(values_B: Array) -> Bytes:
    return values_B.astype(np.float16)[:, None].view(np.uint8)


def _six_bit_pairs(scales_BG: Codes, minima_BG: Codes) -> Bytes:
    """The 12 bytes of Q4_K and Q5_K: 8 scales and 8 minima of 6 bits."""
    low_s, high_s = np.hsplit(scales_BG, 2)
    low_m, high_m = np.hsplit(minima_BG, 2)
    parts = (
        low_s | high_s >> 4 << 6,
        low_m | high_m >> 4 << 6,
        (high_s & 15) | (high_m & 15) << 4,
    )
    return np.hstack(parts).astype(np.uint8)


def _q2_k(values: Array) -> Bytes:
    q = _affine(values, group_size=16, code_bits=2, scale_bits=4)
    scales = (q.scales_BG | q.minima_BG << 4).astype(np.uint8)
    codes = _planes(q.codes, num_bits=2, run=32)
    return np.hstack((scales, codes, _halves(q.d_B), _halves(q.dmin_B)))


def _q3_k(values: Array) -> Bytes:
    d_B, scales_BG, codes = _symmetric(values, code_bits=3, most=31)
    codes, scales = codes + 4, scales_BG + 32
    high = _planes(codes >> 2, num_bits=1, run=32)
    low = _planes(codes & 3, num_bits=2, run=32)
    low_scales = _planes(scales & 15, num_bits=4, run=8)
    high_scales = _planes(scales >> 4, num_bits=2, run=4)
    return np.hstack((high, low, low_scales, high_scales, _halves(d_B)))


def _q4_k(values: Array) -> Bytes:
    q = _affine(values, group_size=32, code_bits=4, scale_bits=6)
    head = (_halves(q.d_B), _halves(q.dmin_B), _six_bit_pairs(q.scales_BG, q.minima_BG))
    return np.hstack((*head, _planes(q.codes, num_bits=4, run=32)))


def _q5_k(values: Array) -> Bytes:
    q = _affine(values, group_size=32, code_bits=5, scale_bits=6)
    head = (_halves(q.d_B), _halves(q.dmin_B), _six_bit_pairs(q.scales_BG, q.minima_BG))
    high = _planes(q.codes >> 4, num_bits=1, run=32)
    return np.hstack((*head, high, _planes(q.codes & 15, num_bits=4, run=32)))


def _q6_k(values: Array) -> Bytes:
    d_B, scales_BG, codes = _symmetric(values, code_bits=6, most=127)
    codes = codes + 32
    low = _planes(codes & 15, num_bits=4, run=64)
    high = _planes(codes >> 4, num_bits=2, run=32)
    return np.hstack((low, high, scales_BG.astype(np.int8).view(np.uint8), _halves(d_B)))


def _iq4_nl(values: Array) -> Bytes:
    d_B = (_extremes(values) / NONLINEAR[0]).astype(np.float16).astype(np.float32)
    codes = _nearest_nonlinear(_divided(values, d_B[:, None]))
    return np.hstack((_halves(d_B), _planes(codes, num_bits=4, run=16)))


def _iq4_xs(values: Array) -> Bytes:
    groups_BGI = values.reshape(len(values), 8, 32)
    d_B, scales_BG = _two_levels(_extremes(groups_BGI) / NONLINEAR[0], 31)
    step_BG1 = (d_B[:, None] * scales_BG)[..., None]
    codes = _nearest_nonlinear(_divided(groups_BGI, step_BG1)).reshape(values.shape)
    scales = scales_BG + 32
    high_bits = (scales >> 4 << np.arange(0, 16, 2)).sum(-1, keepdims=True)
    high = high_bits.astype(np.uint16).view(np.uint8)
    low = _planes((scales & 15).reshape(-1, 2), num_bits=4, run=1).reshape(len(values), 4)
    return np.hstack((_halves(d_B), high, low, _planes(codes, num_bits=4, run=16)))


_QUANTISERS: Mapping[Kind, Callable[[Array], Bytes]] = MappingProxyType(
    {
        Kind.Q2_K: _q2_k,
        Kind.Q3_K: _q3_k,
        Kind.Q4_K: _q4_k,
        Kind.Q5_K: _q5_k,
        Kind.Q6_K: _q6_k,
        Kind.IQ4_NL: _iq4_nl,
        Kind.IQ4_XS: _iq4_xs,
    }
)
