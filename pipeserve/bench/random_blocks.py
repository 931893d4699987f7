"""Random quantised blocks with values like a trained model's: a mean near zero, a small spread.

Knows the block formats only so far as to find their scales (ggml-common.h of llama.cpp).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import gguf.quants
import numpy as np
import numpy.typing as npt
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

Kind = GGMLQuantizationType
Bytes = npt.NDArray[np.uint8]

WEIGHT_STD = 0.02
"""Spread of the values: keeps activations of models of any of the shapes within float16."""
POOL_BYTES = 8 * 1024**2
_NUM_PROBED = 1024
"""Blocks that a type's spread is measured on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scales:
    """Where a block holds its scale d, and its minimum if it has one: both f16."""

    d_offset: int
    min_offset: int | None = None
    min_per_d: float = 0.0
    """The minimum that makes the mean of random codes zero, in units of d."""


_SCALES: Mapping[Kind, _Scales] = MappingProxyType(
    {
        Kind.Q4_0: _Scales(d_offset=0),
        Kind.Q4_1: _Scales(d_offset=0, min_offset=2, min_per_d=-7.5),
        Kind.Q5_0: _Scales(d_offset=0),
        Kind.Q5_1: _Scales(d_offset=0, min_offset=2, min_per_d=-15.5),
        Kind.Q8_0: _Scales(d_offset=0),
        Kind.Q2_K: _Scales(d_offset=80, min_offset=82, min_per_d=1.5),
        Kind.Q3_K: _Scales(d_offset=108),
        Kind.Q4_K: _Scales(d_offset=0, min_offset=2, min_per_d=7.5),
        Kind.Q5_K: _Scales(d_offset=0, min_offset=2, min_per_d=15.5),
        Kind.Q6_K: _Scales(d_offset=208),
        Kind.IQ4_NL: _Scales(d_offset=0),
        Kind.IQ4_XS: _Scales(d_offset=0),
    }
)

_MXFP4_EXPONENT = 120
"""e8m0, 2^(120 - 127): random e2m1 values spread by 2.9, so the weights by 0.023."""


def random_blocks(kind: Kind, rng: np.random.Generator) -> Bytes:
    """About POOL_BYTES of random blocks [blocks, bytes per block]; an odd number of them, so that
    a matrix of repeated blocks does not soon repeat a row."""
    block_bytes = GGML_QUANT_SIZES[kind][1]
    num_blocks = POOL_BYTES // block_bytes | 1
    if kind in (Kind.F32, Kind.F16, Kind.BF16):
        values = rng.normal(0.0, WEIGHT_STD, num_blocks).astype(np.float32)
        floats: Bytes = gguf.quants.quantize(values, kind).view(np.uint8)
        return floats.reshape(num_blocks, block_bytes)
    blocks = rng.integers(0, 256, (num_blocks, block_bytes), dtype=np.uint8)
    if kind == Kind.MXFP4:
        blocks[:, 0] = _MXFP4_EXPONENT
        return blocks
    scales = _SCALES[kind]
    # Values are linear in the scales: 1 shows by what their spread must be divided.
    _set_scales(blocks[:_NUM_PROBED], scales, np.ones(_NUM_PROBED))
    spread = float(gguf.quants.dequantize(blocks[:_NUM_PROBED], kind).std())
    _set_scales(blocks, scales, WEIGHT_STD / spread * rng.uniform(0.8, 1.2, num_blocks))
    return blocks


def _set_scales(blocks: Bytes, scales: _Scales, d: npt.NDArray[np.float64]) -> None:
    _set_f16(blocks, scales.d_offset, d)
    if scales.min_offset is not None:
        _set_f16(blocks, scales.min_offset, d * scales.min_per_d)


def _set_f16(blocks: Bytes, offset: int, values: npt.NDArray[np.float64]) -> None:
    blocks[:, offset : offset + 2] = values.astype(np.float16)[:, None].view(np.uint8)
