"""Sampling on the device: logits to token ids with no host sync, as reference_sampling.py defines.

A row is read in chunks by several programs; what they find lies in small buffers that the next
launch reduces in a fixed order, so results do not change from run to run. Rows of temperature 0
take the likeliest token in every function. Twin: reference_sampling.py.

Shapes: S rows, V vocabulary, C chunks of a row.
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
from pipeserve.kernels.sampling_filter import MAX_CANDIDATES, Threshold, find_threshold
from pipeserve.kernels.sampling_row import chunk_sum, row_highest, slope_of, weight

CHUNK = 4096
"""Vocabulary entries per program."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkMaxima:
    """Per chunk the highest logit, [S, C] float32, and its lowest index, [S, C] int32."""

    values_SC: Tensor
    ids_SC: Tensor


@triton.jit
def chunk_maxima_kernel(
    logits_ptr, values_ptr, ids_ptr, vocab_size, row_stride, num_chunks, CHUNK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    ids_X = chunk * CHUNK + tl.arange(0, CHUNK)
    is_token_X = ids_X < vocab_size
    x_X = tl.load(logits_ptr + row * row_stride + ids_X, is_token_X, other=float("-inf"))
    highest = tl.max(x_X, 0)
    first = tl.min(tl.where((x_X == highest) & is_token_X, ids_X, vocab_size), 0)
    tl.store(values_ptr + row * num_chunks + chunk, highest)
    tl.store(ids_ptr + row * num_chunks + chunk, first)


@triton.jit
def _likeliest(values_ptr, ids_ptr, row, num_chunks, BLOCK_C: tl.constexpr):
    chunks_C = tl.arange(0, BLOCK_C)
    is_chunk_C = chunks_C < num_chunks
    values_ptr_C = values_ptr + row * num_chunks + chunks_C
    values_C = tl.load(values_ptr_C, is_chunk_C, other=float("-inf"))
    ids_C = tl.load(ids_ptr + row * num_chunks + chunks_C, is_chunk_C, other=2147483647)
    return tl.min(tl.where(values_C == tl.max(values_C, 0), ids_C, 2147483647), 0)


@triton.jit
def greedy_kernel(values_ptr, ids_ptr, out_ptr, num_chunks, BLOCK_C: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    token_id = _likeliest(values_ptr, ids_ptr, row, num_chunks, BLOCK_C)
    tl.store(out_ptr + row, token_id.to(out_ptr.dtype.element_ty))


@triton.jit
def chunk_masses_kernel(
    logits_ptr,
    maxima_ptr,
    temperature_ptr,
    min_p_ptr,
    threshold_ptr,
    masses_ptr,
    num_ties_ptr,
    vocab_size,
    row_stride,
    num_chunks,
    CHUNK: tl.constexpr,
    BLOCK_C: tl.constexpr,
    IS_FILTERED: tl.constexpr,
):
    """Mass of each chunk's tokens above the row's threshold, and how many stand at it."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    temperature = tl.load(temperature_ptr + row)
    if temperature == 0.0:
        return
    highest = row_highest(maxima_ptr, row, num_chunks, BLOCK_C)
    ids_X = chunk * CHUNK + tl.arange(0, CHUNK)
    logits_ptr_X = logits_ptr + row * row_stride + ids_X
    x_X = tl.load(logits_ptr_X, ids_X < vocab_size, other=float("-inf"))
    w_X = weight(x_X, highest, slope_of(temperature))
    w_X = tl.where(w_X >= tl.load(min_p_ptr + row), w_X, 0.0)
    if IS_FILTERED:
        threshold = tl.load(threshold_ptr + row)
        num_ties = tl.sum(((x_X == threshold) & (ids_X < vocab_size)).to(tl.int32), 0)
        tl.store(num_ties_ptr + row * num_chunks + chunk, num_ties)
        w_X = tl.where(x_X > threshold, w_X, 0.0)
    tl.store(masses_ptr + row * num_chunks + chunk, chunk_sum(w_X, CHUNK))


@triton.jit
def draw_kernel(
    logits_ptr,
    values_ptr,
    ids_ptr,
    temperature_ptr,
    min_p_ptr,
    uniform_ptr,
    threshold_ptr,
    kept_ties_ptr,
    masses_ptr,
    num_ties_ptr,
    out_ptr,
    vocab_size,
    row_stride,
    num_chunks,
    CHUNK: tl.constexpr,
    BLOCK_C: tl.constexpr,
    IS_FILTERED: tl.constexpr,
):
    """Inverse of the cumulated mass in vocabulary order: first the chunk, then inside it."""
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperature_ptr + row)
    if temperature == 0.0:
        token_id = _likeliest(values_ptr, ids_ptr, row, num_chunks, BLOCK_C)
        tl.store(out_ptr + row, token_id.to(out_ptr.dtype.element_ty))
        return
    highest = row_highest(values_ptr, row, num_chunks, BLOCK_C)
    slope = slope_of(temperature)
    min_p = tl.load(min_p_ptr + row)
    chunks_C = tl.arange(0, BLOCK_C)
    is_chunk_C = chunks_C < num_chunks
    mass_C = tl.load(masses_ptr + row * num_chunks + chunks_C, is_chunk_C, other=0.0)
    if IS_FILTERED:
        # Of the tokens at the threshold the first `kept_ties` in vocabulary order are in.
        threshold = tl.load(threshold_ptr + row)
        tie_weight = weight(threshold, highest, slope)
        tie_weight = tl.where(tie_weight >= min_p, tie_weight, 0.0)
        ties_C = tl.load(num_ties_ptr + row * num_chunks + chunks_C, is_chunk_C, other=0)
        ties_before_C = tl.cumsum(ties_C, 0) - ties_C
        kept_C = tl.load(kept_ties_ptr + row) - ties_before_C
        kept_C = tl.minimum(tl.maximum(kept_C, 0), ties_C)
        mass_C += kept_C.to(tl.float64) * tie_weight.to(tl.float64)
    cumulated_C = tl.cumsum(mass_C, 0)
    total = tl.max(cumulated_C, 0)
    target = tl.load(uniform_ptr + row) * total
    target = tl.minimum(target, total * (1.0 - 2.0**-50))
    chunk = tl.sum((cumulated_C <= target).to(tl.int32), 0)
    is_here_C = chunks_C == chunk
    rest = target - tl.sum(tl.where(is_here_C, cumulated_C - mass_C, 0.0), 0)

    ids_X = chunk * CHUNK + tl.arange(0, CHUNK)
    logits_ptr_X = logits_ptr + row * row_stride + ids_X
    x_X = tl.load(logits_ptr_X, ids_X < vocab_size, other=float("-inf"))
    w_X = weight(x_X, highest, slope)
    w_X = tl.where(w_X >= min_p, w_X, 0.0)
    if IS_FILTERED:
        is_tie_X = x_X == threshold
        kept = tl.sum(tl.where(is_here_C, kept_C, 0), 0)
        is_in_X = is_tie_X & (tl.cumsum(is_tie_X.to(tl.int32), 0) <= kept)
        w_X = tl.where(is_in_X | (x_X > threshold), w_X, 0.0)
    inside_X = tl.cumsum(w_X.to(tl.float64), 0)
    # The chunk's mass was summed in another order: hold the rest inside what it is here.
    rest = tl.minimum(tl.maximum(rest, 0.0), tl.max(inside_X, 0) * (1.0 - 2.0**-50))
    token_id = chunk * CHUNK + tl.sum((inside_X <= rest).to(tl.int32), 0)
    tl.store(out_ptr + row, token_id.to(out_ptr.dtype.element_ty))


def greedy(logits_SV: Tensor, *, out_S: Tensor | None = None, chunk: int = CHUNK) -> Tensor:
    """The likeliest token of each row; of equals the one with the lowest id."""
    out_S = _ids_like(logits_SV) if out_S is None else out_S
    if logits_SV.shape[0] == 0:
        return out_S
    maxima = chunk_maxima(logits_SV, chunk)
    num_chunks = maxima.values_SC.shape[1]
    greedy_kernel[(logits_SV.shape[0],)](
        maxima.values_SC,
        maxima.ids_SC,
        out_S,
        num_chunks,
        BLOCK_C=triton.next_power_of_2(num_chunks),
        num_warps=1,
    )
    return out_S


def sample(
    logits_SV: Tensor,
    temperature_S: Tensor,
    min_p_S: Tensor,
    uniform_S: Tensor,
    *,
    out_S: Tensor | None = None,
    chunk: int = CHUNK,
) -> Tensor:
    """Draw from softmax(logits / temperature) without the tokens below min_p."""
    out_S = _ids_like(logits_SV) if out_S is None else out_S
    if logits_SV.shape[0] > 0:
        maxima = chunk_maxima(logits_SV, chunk)
        _draw(logits_SV, maxima, temperature_S, min_p_S, uniform_S, None, out_S, chunk)
    return out_S


def sample_filtered(
    logits_SV: Tensor,
    temperature_S: Tensor,
    top_k_S: Tensor,
    top_p_S: Tensor,
    min_p_S: Tensor,
    uniform_S: Tensor,
    *,
    out_S: Tensor | None = None,
    chunk: int = CHUNK,
    max_candidates: int = MAX_CANDIDATES,
) -> Tensor:
    """As `sample`, after top-k (V keeps all), then top-p of what is left, then min-p.

    Of equally likely tokens the one with the lower id counts as likelier. Exact for any top_k and
    top_p; fastest where what is kept is not most of the vocabulary.
    """
    out_S = _ids_like(logits_SV) if out_S is None else out_S
    if logits_SV.shape[0] > 0:
        maxima = chunk_maxima(logits_SV, chunk)
        threshold = find_threshold(
            logits_SV,
            maxima.values_SC,
            temperature_S,
            top_k_S,
            top_p_S,
            chunk=chunk,
            max_candidates=max_candidates,
        )
        _draw(logits_SV, maxima, temperature_S, min_p_S, uniform_S, threshold, out_S, chunk)
    return out_S


def chunk_maxima(logits_SV: Tensor, chunk: int = CHUNK) -> ChunkMaxima:
    """The first pass of everything here."""
    assert logits_SV.dtype == torch.float32 and logits_SV.stride(1) == 1, "float32 rows"
    num_rows, vocab_size = logits_SV.shape
    num_chunks = triton.cdiv(vocab_size, chunk)
    shape, device = (num_rows, num_chunks), logits_SV.device
    maxima = ChunkMaxima(
        values_SC=torch.empty(shape, dtype=torch.float32, device=device),
        ids_SC=torch.empty(shape, dtype=torch.int32, device=device),
    )
    chunk_maxima_kernel[shape](
        logits_SV,
        maxima.values_SC,
        maxima.ids_SC,
        vocab_size,
        logits_SV.stride(0),
        num_chunks,
        CHUNK=chunk,
    )
    return maxima


def _draw(
    logits_SV: Tensor,
    maxima: ChunkMaxima,
    temperature_S: Tensor,
    min_p_S: Tensor,
    uniform_S: Tensor,
    threshold: Threshold | None,
    out_S: Tensor,
    chunk: int,
) -> None:
    num_rows, num_chunks = shape = maxima.values_SC.shape
    masses_SC = torch.empty(shape, dtype=torch.float64, device=logits_SV.device)
    num_ties_SC = torch.empty(shape, dtype=torch.int32, device=logits_SV.device)
    # Stand-ins are never read: IS_FILTERED leaves their loads out.
    values_S = maxima.values_SC if threshold is None else threshold.values_S
    kept_ties_S = num_ties_SC if threshold is None else threshold.kept_ties_S
    sizes = (logits_SV.shape[1], logits_SV.stride(0), num_chunks)
    constants = {
        "CHUNK": chunk,
        "BLOCK_C": triton.next_power_of_2(num_chunks),
        "IS_FILTERED": threshold is not None,
    }
    chunk_masses_kernel[shape](
        logits_SV,
        maxima.values_SC,
        temperature_S,
        min_p_S,
        values_S,
        masses_SC,
        num_ties_SC,
        *sizes,
        **constants,
    )
    draw_kernel[(num_rows,)](
        logits_SV,
        maxima.values_SC,
        maxima.ids_SC,
        temperature_S,
        min_p_S,
        uniform_S,
        values_S,
        kept_ties_S,
        masses_SC,
        num_ties_SC,
        out_S,
        *sizes,
        **constants,
        num_warps=8,
    )


def _ids_like(logits_SV: Tensor) -> Tensor:
    return torch.empty(logits_SV.shape[0], dtype=torch.int64, device=logits_SV.device)


_SIZES = {"vocab_size": "i32", "row_stride": "i32", "num_chunks": "i32"}


def _draw_cases(*, is_filtered: bool) -> tuple[AotCase, AotCase]:
    suffix = "_filtered" if is_filtered else ""
    constants = {"CHUNK": CHUNK, "BLOCK_C": 32, "IS_FILTERED": is_filtered}
    masses = AotCase(
        name=f"chunk_masses{suffix}",
        kernel=chunk_masses_kernel,
        signature={
            "logits_ptr": "*fp32",
            "maxima_ptr": "*fp32",
            "temperature_ptr": "*fp32",
            "min_p_ptr": "*fp32",
            "threshold_ptr": "*fp32",
            "masses_ptr": "*fp64",
            "num_ties_ptr": "*i32",
            **_SIZES,
        },
        constexprs=constants,
    )
    draw = AotCase(
        name=f"draw{suffix}",
        kernel=draw_kernel,
        signature={
            "logits_ptr": "*fp32",
            "values_ptr": "*fp32",
            "ids_ptr": "*i32",
            "temperature_ptr": "*fp32",
            "min_p_ptr": "*fp32",
            "uniform_ptr": "*fp64",
            "threshold_ptr": "*fp32",
            "kept_ties_ptr": "*i32",
            "masses_ptr": "*fp64",
            "num_ties_ptr": "*i32",
            "out_ptr": "*i64",
            **_SIZES,
        },
        constexprs=constants,
        num_warps=8,
    )
    return masses, draw


AOT_CASES = (
    AotCase(
        name="chunk_maxima",
        kernel=chunk_maxima_kernel,
        signature={
            "logits_ptr": "*fp32",
            "values_ptr": "*fp32",
            "ids_ptr": "*i32",
            **_SIZES,
        },
        constexprs={"CHUNK": CHUNK},
    ),
    AotCase(
        name="greedy",
        kernel=greedy_kernel,
        signature={
            "values_ptr": "*fp32",
            "ids_ptr": "*i32",
            "out_ptr": "*i64",
            "num_chunks": "i32",
        },
        constexprs={"BLOCK_C": 32},
        num_warps=1,
    ),
    *_draw_cases(is_filtered=False),
    *_draw_cases(is_filtered=True),
)
