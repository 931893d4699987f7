"""Triton device functions that the sampling kernels share: weights, sums and order of logits."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-decorators=False
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def slope_of(temperature):
    """What differences of logits are multiplied by to become powers of two."""
    return 1.4426950408889634 / tl.maximum(temperature, 1e-30)


@triton.jit
def weight(x, highest, slope):
    """Probability relative to the likeliest token's, which has 1."""
    return tl.exp2((x - highest) * slope)


@triton.jit
def row_highest(maxima_ptr, row, num_chunks, BLOCK_C: tl.constexpr):
    """The row's highest logit, from those of its chunks."""
    chunks_C = tl.arange(0, BLOCK_C)
    maxima_ptr_C = maxima_ptr + row * num_chunks + chunks_C
    return tl.max(tl.load(maxima_ptr_C, chunks_C < num_chunks, other=float("-inf")), 0)


@triton.jit
def chunk_sum(w_X, CHUNK: tl.constexpr):
    """float32 within four neighbours, float64 above: a quarter of the slow additions."""
    w_Y4 = tl.reshape(w_X, (CHUNK // 4, 4))
    return tl.sum(tl.sum(w_Y4, 1).to(tl.float64), 0)


@triton.jit
def ordered_key(x):
    """int32 that compares as the float32 does; both zeros are one."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def from_ordered_key(key):
    """The float32 whose ordered_key this is."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
