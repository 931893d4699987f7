"""Top-k and top-p without sorting: the lowest logit that is kept, and how many of its equals.

Three launches. Counts and masses above a few fixed pivots tell how far down a row must be looked
at; what lies above that pivot is copied out; one program per row then searches the threshold among
all float32 values, on the copied candidates or, where they are too many, on the row itself. It
keeps what reference_sampling.sample_filtered keeps.

Shapes: S rows, V vocabulary, C chunks of a row, J pivots.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-decorators=False
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from pipeserve.kernels.aot import AotCase
from pipeserve.kernels.sampling_row import (
    chunk_sum,
    from_ordered_key,
    ordered_key,
    row_highest,
    slope_of,
    weight,
)
from pipeserve.kernels.sampling_search import above_and_from, search_any

_NUM_PIVOTS = 8
_NUM_KEYS = 8
"""Keys that one pass of the search tries."""
_TILE = 1024
"""Candidates per step of a pass."""
MAX_CANDIDATES = 16384
"""Logits that are copied out at most; rows that need more are searched as they are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Threshold:
    """Kept are the tokens above a row's value, and the first kept_ties at it by id."""

    values_S: Tensor
    """float32; -inf keeps all."""
    kept_ties_S: Tensor
    """int32."""


@triton.jit
def _is_filtered(temperature, top_k, top_p, vocab_size):
    return (temperature > 0.0) & ((top_k < vocab_size) | (top_p < 1.0))


@triton.jit
def _pivot_unit(slope, top_k, vocab_size):
    """What a logit's distance from the highest is multiplied by to compare with pivots.

    Masses end where weights do, counts at a distance in logits that no temperature changes.
    """
    return tl.where(top_k < vocab_size, 1.5, slope)


@triton.jit
def _pivot_depth(pivot, NUM_PIVOTS: tl.constexpr):
    """3, 4, 6, 8, 12, 16, 24; the last one is below every finite logit."""
    step = pivot + 1
    depth = ((2 + (step & 1)) << (step >> 1)).to(tl.float32)
    return tl.where(step == NUM_PIVOTS, 1e30, depth)


@triton.jit
def pivots_kernel(
    logits_ptr,
    maxima_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    counts_ptr,
    pivot_masses_ptr,
    masses_ptr,
    vocab_size,
    row_stride,
    num_chunks,
    CHUNK: tl.constexpr,
    BLOCK_C: tl.constexpr,
    NUM_PIVOTS: tl.constexpr,
):
    """Per chunk: the whole mass, and count and (rounded) mass above each pivot."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    temperature = tl.load(temperature_ptr + row)
    top_k = tl.load(top_k_ptr + row)
    if not _is_filtered(temperature, top_k, tl.load(top_p_ptr + row), vocab_size):
        return
    highest = row_highest(maxima_ptr, row, num_chunks, BLOCK_C)
    slope = slope_of(temperature)
    ids_X = chunk * CHUNK + tl.arange(0, CHUNK)
    logits_ptr_X = logits_ptr + row * row_stride + ids_X
    x_X = tl.load(logits_ptr_X, ids_X < vocab_size, other=float("-inf"))
    w_X = weight(x_X, highest, slope)
    distance_X = (x_X - highest) * _pivot_unit(slope, top_k, vocab_size)
    slot = row * num_chunks + chunk
    tl.store(masses_ptr + slot, chunk_sum(w_X, CHUNK))
    for pivot in range(NUM_PIVOTS):
        is_above_X = distance_X >= -_pivot_depth(pivot, NUM_PIVOTS)
        tl.store(counts_ptr + slot * NUM_PIVOTS + pivot, tl.sum(is_above_X.to(tl.int32), 0))
        if top_k >= vocab_size:
            mass = tl.sum(tl.where(is_above_X, w_X, 0.0), 0)
            tl.store(pivot_masses_ptr + slot * NUM_PIVOTS + pivot, mass)


@triton.jit
def candidates_kernel(
    logits_ptr,
    maxima_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    counts_ptr,
    pivot_masses_ptr,
    masses_ptr,
    candidates_ptr,
    num_candidates_ptr,
    depths_ptr,
    vocab_size,
    row_stride,
    num_chunks,
    CHUNK: tl.constexpr,
    BLOCK_C: tl.constexpr,
    NUM_PIVOTS: tl.constexpr,
    MAX_CANDIDATES: tl.constexpr,
):
    """Copy the logits above the first pivot that has enough; -1 candidates if too many are."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    temperature = tl.load(temperature_ptr + row)
    top_k = tl.load(top_k_ptr + row)
    top_p = tl.load(top_p_ptr + row)
    if not _is_filtered(temperature, top_k, top_p, vocab_size):
        return
    chunks_C = tl.arange(0, BLOCK_C)
    pivots_J = tl.arange(0, NUM_PIVOTS)
    is_chunk_C = chunks_C < num_chunks
    slot_CJ = (row * num_chunks + chunks_C)[:, None] * NUM_PIVOTS + pivots_J[None, :]
    counts_CJ = tl.load(counts_ptr + slot_CJ, is_chunk_C[:, None], other=0)
    count_J = tl.sum(counts_CJ, 0)
    if top_k < vocab_size:
        is_enough_J = count_J >= top_k
    else:
        pivot_mass_CJ = tl.load(pivot_masses_ptr + slot_CJ, is_chunk_C[:, None], other=0.0)
        mass_C = tl.load(masses_ptr + row * num_chunks + chunks_C, is_chunk_C, other=0.0)
        wanted = top_p * tl.sum(mass_C, 0).to(tl.float32) * 1.00001
        is_enough_J = tl.sum(pivot_mass_CJ, 0) >= wanted
    pivot = tl.min(tl.where(is_enough_J, pivots_J, NUM_PIVOTS - 1), 0)
    is_pivot_J = pivots_J == pivot
    count = tl.sum(tl.where(is_pivot_J, count_J, 0), 0)
    is_usable = count <= MAX_CANDIDATES
    depth = _pivot_depth(pivot, NUM_PIVOTS)
    slope = slope_of(temperature)
    unit = _pivot_unit(slope, top_k, vocab_size)
    if chunk == 0:
        tl.store(num_candidates_ptr + row, tl.where(is_usable, count, -1))
        tl.store(depths_ptr + row, depth / unit)
    if not is_usable:
        return
    before_CJ = (chunks_C < chunk)[:, None] & is_pivot_J[None, :]
    offset = tl.sum(tl.sum(tl.where(before_CJ, counts_CJ, 0), 0), 0)
    highest = row_highest(maxima_ptr, row, num_chunks, BLOCK_C)
    ids_X = chunk * CHUNK + tl.arange(0, CHUNK)
    logits_ptr_X = logits_ptr + row * row_stride + ids_X
    x_X = tl.load(logits_ptr_X, ids_X < vocab_size, other=float("-inf"))
    is_above_X = (x_X - highest) * unit >= -depth
    place_X = offset + tl.cumsum(is_above_X.to(tl.int32), 0) - 1
    is_above_X = is_above_X & (place_X < MAX_CANDIDATES)
    tl.store(candidates_ptr + row * MAX_CANDIDATES + place_X, x_X, is_above_X)


@triton.jit
def threshold_kernel(
    logits_ptr,
    maxima_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    masses_ptr,
    candidates_ptr,
    num_candidates_ptr,
    depths_ptr,
    values_ptr,
    kept_ties_ptr,
    vocab_size,
    row_stride,
    num_chunks,
    BLOCK_C: tl.constexpr,
    TILE: tl.constexpr,
    NUM_KEYS: tl.constexpr,
    MAX_CANDIDATES: tl.constexpr,
):
    """One row per program: top-k by count, then top-p by mass among what is left."""
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperature_ptr + row)
    top_k = tl.load(top_k_ptr + row).to(tl.int32)
    top_p = tl.load(top_p_ptr + row)
    if not _is_filtered(temperature, top_k, top_p, vocab_size):
        tl.store(values_ptr + row, float("-inf"))
        tl.store(kept_ties_ptr + row, vocab_size)
        return
    highest = row_highest(maxima_ptr, row, num_chunks, BLOCK_C)
    slope = slope_of(temperature)
    chunks_C = tl.arange(0, BLOCK_C)
    masses_ptr_C = masses_ptr + row * num_chunks + chunks_C
    total = tl.sum(tl.load(masses_ptr_C, chunks_C < num_chunks, other=0.0), 0)
    length = tl.load(num_candidates_ptr + row)
    source_ptr = logits_ptr + row * row_stride
    if length >= 0:
        source_ptr = candidates_ptr + row * MAX_CANDIDATES
    else:
        length = vocab_size
    # A little below the pivot, whatever the roundings.
    bound = highest - tl.load(depths_ptr + row) * 1.01 - tl.abs(highest) * 1e-5
    key = ordered_key(bound).to(tl.int64)
    beyond = ordered_key(highest).to(tl.int64) + 1

    num_ties = vocab_size
    if top_k < vocab_size:
        key = search_any(
            source_ptr, length, top_k, key, beyond, highest, slope, TILE, NUM_KEYS, False
        )
        num_above, _ = above_and_from(source_ptr, length, key, highest, slope, TILE, False)
        above, _ = above_and_from(source_ptr, length, key, highest, slope, TILE, True)
        num_ties = top_k - num_above
        tie_weight = weight(from_ordered_key(key.to(tl.int32)), highest, slope).to(tl.float64)
        total = above + num_ties.to(tl.float64) * tie_weight
    if top_p < 1.0:
        wanted = top_p.to(tl.float64) * total
        nucleus = search_any(
            source_ptr, length, wanted, key, beyond, highest, slope, TILE, NUM_KEYS, True
        )
        above, _ = above_and_from(source_ptr, length, nucleus, highest, slope, TILE, True)
        num_above, num_from = above_and_from(
            source_ptr, length, nucleus, highest, slope, TILE, False
        )
        # At top-k's own threshold only its ties are left, else all equals.
        num_ties = tl.where(nucleus == key, num_ties, num_from - num_above)
        tie_weight = weight(from_ordered_key(nucleus.to(tl.int32)), highest, slope)
        # Kept while the mass before a token is short of what is wanted.
        num_wanted = tl.ceil((wanted - above) / tl.maximum(tie_weight.to(tl.float64), 1e-300))
        num_wanted = tl.minimum(tl.maximum(num_wanted, 1.0), num_ties.to(tl.float64))
        num_ties = num_wanted.to(tl.int32)
        key = nucleus
    tl.store(values_ptr + row, from_ordered_key(key.to(tl.int32)))
    tl.store(kept_ties_ptr + row, num_ties)


def find_threshold(
    logits_SV: Tensor,
    maxima_SC: Tensor,
    temperature_S: Tensor,
    top_k_S: Tensor,
    top_p_S: Tensor,
    *,
    chunk: int,
    max_candidates: int,
) -> Threshold:
    """What top-k, then top-p keep of every row; rows of temperature 0 are left alone."""
    num_rows, num_chunks = maxima_SC.shape
    device = logits_SV.device
    pivots_shape = (num_rows, num_chunks, _NUM_PIVOTS)
    counts_SCJ = torch.empty(pivots_shape, dtype=torch.int32, device=device)
    pivot_masses_SCJ = torch.empty(pivots_shape, dtype=torch.float32, device=device)
    masses_SC = torch.empty(maxima_SC.shape, dtype=torch.float64, device=device)
    candidates = torch.empty((num_rows, max_candidates), dtype=torch.float32, device=device)
    num_candidates_S = torch.empty(num_rows, dtype=torch.int32, device=device)
    depths_S = torch.empty(num_rows, dtype=torch.float32, device=device)
    threshold = Threshold(
        values_S=torch.empty(num_rows, dtype=torch.float32, device=device),
        kept_ties_S=torch.empty(num_rows, dtype=torch.int32, device=device),
    )
    parameters = (logits_SV, maxima_SC, temperature_S, top_k_S, top_p_S)
    sizes = (logits_SV.shape[1], logits_SV.stride(0), num_chunks)
    block_c = triton.next_power_of_2(num_chunks)
    pivots_kernel[(num_rows, num_chunks)](
        *parameters,
        counts_SCJ,
        pivot_masses_SCJ,
        masses_SC,
        *sizes,
        CHUNK=chunk,
        BLOCK_C=block_c,
        NUM_PIVOTS=_NUM_PIVOTS,
    )
    candidates_kernel[(num_rows, num_chunks)](
        *parameters,
        counts_SCJ,
        pivot_masses_SCJ,
        masses_SC,
        candidates,
        num_candidates_S,
        depths_S,
        *sizes,
        CHUNK=chunk,
        BLOCK_C=block_c,
        MAX_CANDIDATES=max_candidates,
        NUM_PIVOTS=_NUM_PIVOTS,
    )
    threshold_kernel[(num_rows,)](
        *parameters,
        masses_SC,
        candidates,
        num_candidates_S,
        depths_S,
        threshold.values_S,
        threshold.kept_ties_S,
        *sizes,
        BLOCK_C=block_c,
        TILE=min(chunk, _TILE),
        NUM_KEYS=_NUM_KEYS,
        MAX_CANDIDATES=max_candidates,
        num_warps=8,
    )
    return threshold


_PARAMETERS = {
    "logits_ptr": "*fp32",
    "maxima_ptr": "*fp32",
    "temperature_ptr": "*fp32",
    "top_k_ptr": "*i32",
    "top_p_ptr": "*fp32",
}
_PARTIALS = {"counts_ptr": "*i32", "pivot_masses_ptr": "*fp32", "masses_ptr": "*fp64"}
_FOUND = {"candidates_ptr": "*fp32", "num_candidates_ptr": "*i32", "depths_ptr": "*fp32"}
_SIZES = {"vocab_size": "i32", "row_stride": "i32", "num_chunks": "i32"}
_CONSTANTS = {
    "CHUNK": 4096,
    "BLOCK_C": 32,
    "NUM_PIVOTS": _NUM_PIVOTS,
}
AOT_CASES = (
    AotCase(
        name="pivots",
        kernel=pivots_kernel,
        signature={**_PARAMETERS, **_PARTIALS, **_SIZES},
        constexprs=_CONSTANTS,
    ),
    AotCase(
        name="candidates",
        kernel=candidates_kernel,
        signature={**_PARAMETERS, **_PARTIALS, **_FOUND, **_SIZES},
        constexprs={**_CONSTANTS, "MAX_CANDIDATES": MAX_CANDIDATES},
    ),
    AotCase(
        name="threshold",
        kernel=threshold_kernel,
        signature={
            **_PARAMETERS,
            "masses_ptr": "*fp64",
            **_FOUND,
            "values_ptr": "*fp32",
            "kept_ties_ptr": "*i32",
            **_SIZES,
        },
        constexprs={
            "BLOCK_C": 32,
            "TILE": _TILE,
            "NUM_KEYS": _NUM_KEYS,
            "MAX_CANDIDATES": MAX_CANDIDATES,
        },
        num_warps=8,
    ),
)
