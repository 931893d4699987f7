"""Triton device functions that find the logit at which a count or a mass is reached.

Several float32 values are tried per pass over the logits, as integer keys of the same order.

Shapes: X logits of a tile, J keys of a pass.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-decorators=False
from __future__ import annotations

import triton
import triton.language as tl

from pipeserve.kernels.sampling_row import ordered_key, weight


@triton.jit
def _tails(
    source_ptr,
    length,
    keys_J,
    highest,
    slope,
    TILE: tl.constexpr,
    NUM_KEYS: tl.constexpr,
    IS_MASS: tl.constexpr,
):
    """Count, or mass, of the logits at or above each of NUM_KEYS keys."""
    offsets_X = tl.arange(0, TILE)
    if IS_MASS:
        tails_XJ = tl.zeros((TILE, NUM_KEYS), tl.float64)
    else:
        tails_XJ = tl.zeros((TILE, NUM_KEYS), tl.int32)
    nothing_XJ = tails_XJ
    for start in range(0, length, TILE):
        is_inside_X = start + offsets_X < length
        x_X = tl.load(source_ptr + start + offsets_X, is_inside_X, other=float("-inf"))
        if IS_MASS:
            amount_X = weight(x_X, highest, slope).to(tl.float64)
        else:
            amount_X = is_inside_X.to(tl.int32)
        is_in_XJ = ordered_key(x_X)[:, None] >= keys_J[None, :]
        tails_XJ += tl.where(is_in_XJ, amount_X[:, None], nothing_XJ)
    return tl.sum(tails_XJ, 0)


@triton.jit
def above_and_from(
    source_ptr,
    length,
    key,
    highest,
    slope,
    TILE: tl.constexpr,
    IS_MASS: tl.constexpr,
):
    """Count, or mass, of the logits above a key, and of those at or above it."""
    first_2 = tl.arange(0, 2) == 0
    keys_2 = tl.where(first_2, key + 1, key).to(tl.int32)
    tails_2 = _tails(source_ptr, length, keys_2, highest, slope, TILE, 2, IS_MASS)
    # Both are tails of one sum: the smaller is that above.
    return tl.min(tails_2, 0), tl.max(tails_2, 0)


@triton.jit
def _search(
    source_ptr,
    length,
    wanted,
    low,
    high,
    highest,
    slope,
    TILE: tl.constexpr,
    NUM_KEYS: tl.constexpr,
    IS_MASS: tl.constexpr,
):
    """The highest key at or above which `wanted` is reached: at `low` it is, at `high` it is not.

    Keys are int64 here, since their differences need 33 bits.
    """
    while high - low > 1:
        share_J = tl.arange(0, NUM_KEYS) + 1
        keys_J = low + tl.maximum((high - low) * share_J // (NUM_KEYS + 1), 1)
        tails_J = _tails(
            source_ptr, length, keys_J.to(tl.int32), highest, slope, TILE, NUM_KEYS, IS_MASS
        )
        is_reached_J = tails_J >= wanted
        new_low = tl.max(tl.where(is_reached_J, keys_J, low), 0)
        high = tl.min(tl.where(is_reached_J, high, keys_J), 0)
        low = new_low
    return low


@triton.jit
def search_any(
    source_ptr,
    length,
    wanted,
    low,
    high,
    highest,
    slope,
    TILE: tl.constexpr,
    NUM_KEYS: tl.constexpr,
    IS_MASS: tl.constexpr,
):
    """Few candidates take more keys a pass; long rows more logits a step, to read them faster."""
    if length <= 16 * TILE:
        found = _search(
            source_ptr, length, wanted, low, high, highest, slope, TILE, NUM_KEYS, IS_MASS
        )
    else:
        found = _search(
            source_ptr, length, wanted, low, high, highest, slope, TILE * 4, NUM_KEYS // 2, IS_MASS
        )
    return found
