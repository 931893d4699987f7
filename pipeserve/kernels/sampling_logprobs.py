"""Log-probabilities of drawn tokens and of the likeliest ones, on the device.

Two launches: every chunk of a row finds its own likeliest and its share of the normaliser, then
one program per row merges them. Twin: reference_sampling.log_probs.

Shapes: S rows, G rows that asked, V vocabulary, C chunks of a row, K alternatives.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-decorators=False
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pipeserve.kernels.aot import AotCase
from pipeserve.kernels.sampling_row import chunk_sum, from_ordered_key, ordered_key

_CHUNK = 4096
_USUAL_TOP = 32
"""Up to so many alternatives run the same compiled kernels."""


@triton.jit
def _ranked(x, ids):
    """int64 that orders by logit, then the lower id first; -2^63 is below all."""
    return (ordered_key(x).to(tl.int64) << 32) | (0x7FFFFFFF - ids).to(tl.int64)


@triton.jit(do_not_specialize=["num_top"])
def chunk_top_kernel(
    logits_ptr,
    asked_ptr,
    top_ptr,
    maxima_ptr,
    sums_ptr,
    vocab_size,
    row_stride,
    num_chunks,
    num_top,
    CHUNK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    ids_X = chunk * CHUNK + tl.arange(0, CHUNK)
    is_token_X = ids_X < vocab_size
    logits_ptr += tl.load(asked_ptr + row).to(tl.int64) * row_stride
    x_X = tl.load(logits_ptr + ids_X, is_token_X, other=float("-inf"))
    highest = tl.max(x_X, 0)
    base = tl.where(highest == float("-inf"), 0.0, highest)
    slot = row * num_chunks + chunk
    tl.store(maxima_ptr + slot, highest)
    tl.store(sums_ptr + slot, chunk_sum(tl.exp(x_X - base), CHUNK))
    lowest = tl.full((), -(2**63), tl.int64)
    ranked_X = tl.where(is_token_X, _ranked(x_X, ids_X), lowest)
    for rank in range(num_top):
        best = tl.max(ranked_X, 0)
        tl.store(top_ptr + slot * num_top + rank, best)
        ranked_X = tl.where(ranked_X == best, lowest, ranked_X)


@triton.jit(do_not_specialize=["num_top"])
def merge_top_kernel(
    logits_ptr,
    drawn_ptr,
    asked_ptr,
    top_ptr,
    maxima_ptr,
    sums_ptr,
    drawn_out_ptr,
    top_ids_ptr,
    top_out_ptr,
    row_stride,
    num_chunks,
    num_top,
    BLOCK_C: tl.constexpr,
    BLOCK_CK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    chunks_C = tl.arange(0, BLOCK_C)
    slot_C = row * num_chunks + chunks_C
    maxima_C = tl.load(maxima_ptr + slot_C, chunks_C < num_chunks, other=float("-inf"))
    sums_C = tl.load(sums_ptr + slot_C, chunks_C < num_chunks, other=0.0)
    highest = tl.max(maxima_C, 0)
    total = tl.sum(sums_C * tl.exp(maxima_C - highest).to(tl.float64), 0)
    norm = highest + tl.log(total.to(tl.float32))
    asked = tl.load(asked_ptr + row).to(tl.int64)
    drawn = tl.load(logits_ptr + asked * row_stride + tl.load(drawn_ptr + asked))
    tl.store(drawn_out_ptr + row, drawn - norm)
    lowest = tl.full((), -(2**63), tl.int64)
    entries_Y = tl.arange(0, BLOCK_CK)
    num_entries = num_chunks * num_top
    top_ptr_Y = top_ptr + row * num_entries + entries_Y
    ranked_Y = tl.load(top_ptr_Y, entries_Y < num_entries, other=-(2**63))
    for rank in range(num_top):
        best = tl.max(ranked_Y, 0)
        ranked_Y = tl.where(ranked_Y == best, lowest, ranked_Y)
        token_id = 0x7FFFFFFF - (best & 0xFFFFFFFF)
        tl.store(top_ids_ptr + row * num_top + rank, token_id)
        value = from_ordered_key((best >> 32).to(tl.int32))
        tl.store(top_out_ptr + row * num_top + rank, value - norm)


def log_probs(
    logits_SV: Tensor, ids_S: Tensor, asked_G: Tensor, num_top: int, *, chunk: int = _CHUNK
) -> tuple[Tensor, Tensor, Tensor]:
    """Natural logarithms of the probabilities of ids_S and of the num_top likeliest tokens.

    Of the rows asked_G alone: returns ([G], ids [G, num_top], [G, num_top]), likeliest first and
    equals by id.
    """
    assert logits_SV.dtype == torch.float32 and logits_SV.stride(1) == 1, "float32 rows"
    num_rows, vocab_size = asked_G.shape[0], logits_SV.shape[1]
    assert 0 <= num_top <= min(chunk, vocab_size), "alternatives are tokens of one chunk"
    num_chunks, device = triton.cdiv(vocab_size, chunk), logits_SV.device
    drawn_G = torch.empty(num_rows, dtype=torch.float32, device=device)
    top_ids_GK = torch.empty((num_rows, num_top), dtype=torch.int64, device=device)
    top_GK = torch.empty((num_rows, num_top), dtype=torch.float32, device=device)
    if num_rows == 0:
        return drawn_G, top_ids_GK, top_GK
    top_GCK = torch.empty((num_rows, num_chunks, num_top), dtype=torch.int64, device=device)
    maxima_GC = torch.empty((num_rows, num_chunks), dtype=torch.float32, device=device)
    sums_GC = torch.empty((num_rows, num_chunks), dtype=torch.float64, device=device)
    chunk_top_kernel[(num_rows, num_chunks)](
        logits_SV,
        asked_G,
        top_GCK,
        maxima_GC,
        sums_GC,
        vocab_size,
        logits_SV.stride(0),
        num_chunks,
        num_top,
        CHUNK=chunk,
    )
    merge_top_kernel[(num_rows,)](
        logits_SV,
        ids_S,
        asked_G,
        top_GCK,
        maxima_GC,
        sums_GC,
        drawn_G,
        top_ids_GK,
        top_GK,
        logits_SV.stride(0),
        num_chunks,
        num_top,
        BLOCK_C=triton.next_power_of_2(num_chunks),
        BLOCK_CK=triton.next_power_of_2(num_chunks * max(num_top, _USUAL_TOP)),
    )
    return drawn_G, top_ids_GK, top_GK


AOT_CASES = (
    AotCase(
        name="chunk_top",
        kernel=chunk_top_kernel,
        signature={
            "logits_ptr": "*fp32",
            "asked_ptr": "*i32",
            "top_ptr": "*i64",
            "maxima_ptr": "*fp32",
            "sums_ptr": "*fp64",
            **dict.fromkeys(("vocab_size", "row_stride", "num_chunks", "num_top"), "i32"),
        },
        constexprs={"CHUNK": _CHUNK},
    ),
    AotCase(
        name="merge_top",
        kernel=merge_top_kernel,
        signature={
            "logits_ptr": "*fp32",
            "drawn_ptr": "*i64",
            "asked_ptr": "*i32",
            "top_ptr": "*i64",
            "maxima_ptr": "*fp32",
            "sums_ptr": "*fp64",
            "drawn_out_ptr": "*fp32",
            "top_ids_ptr": "*i64",
            "top_out_ptr": "*fp32",
            **dict.fromkeys(("row_stride", "num_chunks", "num_top"), "i32"),
        },
        constexprs={"BLOCK_C": 32, "BLOCK_CK": 1024},
    ),
)
