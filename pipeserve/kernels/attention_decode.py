"""Paged attention of decode rows: one query per sequence, split over its cached positions.

Two Triton launches: every program takes one segment of one sequence for one kv head, then a merge
weighs the segments (Flash-Decoding; the merge by log-sum-exp as in arXiv 2205.14135); it leaves out
sequences of one segment, which are written at once. The grid depends on the number of rows alone,
lengths are read on the device: one CUDA graph serves any length. Twins: reference.py, and
reference_attention.py for the options.

Shapes: S sequences, N query heads, K kv heads, H head dim, B blocks, P position in block, G
segments.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-decorators=False
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pipeserve.kernels.aot import AotCase
from pipeserve.kernels.attention_tile import (
    LOG2_E,
    NO_WINDOW,
    attend_range,
    check_cache,
    has_ptx_assembly,
)
from pipeserve.kernels.decode_config import DecodeConfig, decode_config
from pipeserve.kernels.dependent_launch import (
    launch_options,
    start_next_kernel,
    wait_for_inputs,
)
from pipeserve.kernels.fp8_reference import FP8_GROUP, Fp8Rows
from pipeserve.kernels.fp8_tokens import store_e4m3
from pipeserve.kernels.interleaved_rows import interleaved_column
from pipeserve.kernels.quant_layout import UNIT
from pipeserve.kernels.quant_reference import ACTIVATION_GROUP, QuantisedRows
from pipeserve.kernels.rounded_rows import store_rounded

_MERGES_ALONE, _MERGES_BY_FOUR = 1024, 2048
"""Up to so many query heads of all sequences are merged by a program each, and by one for four;
more, of which most have one segment, by one for sixteen (times on an H200, loadtest/README.md)."""


@triton.jit
def _segment(length, window, min_tiles, NUM_SEGMENTS: tl.constexpr, TILE: tl.constexpr):
    """First visible position, that of its tile, and positions per segment."""
    first = tl.maximum(length - window, 0)
    base = first // TILE * TILE
    num_tiles = tl.cdiv(length - base, TILE)
    tiles_per_segment = tl.maximum(tl.cdiv(num_tiles, NUM_SEGMENTS), min_tiles)
    return first, base, tiles_per_segment * TILE


@triton.jit
def decode_segments_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    k_scale_ptr,
    v_scale_ptr,
    table_ptr,
    lengths_ptr,
    partial_ptr,
    lse_ptr,
    out_ptr,
    interleaved_ptr,
    scale_log2,
    cap_log2,
    window,
    min_tiles,
    num_kv_heads,
    q_stride_seq,
    q_stride_head,
    stride_block,
    stride_token,
    stride_head,
    table_stride,
    out_stride_seq,
    out_stride_head,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TILE: tl.constexpr,
    PAGE: tl.constexpr,
    NUM_SEGMENTS: tl.constexpr,
    IS_INT8: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
    DIRECT: tl.constexpr,
    ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    """partial [S, N, G, H] and lse [S, N, G] float32; segments past the length stay unwritten.
    Where DIRECT, a sequence of one segment goes to out instead."""
    start_next_kernel(PDL)
    kv_head = tl.program_id(0)
    seq = tl.program_id(1).to(tl.int64)
    segment = tl.program_id(2)
    length = tl.load(lengths_ptr + seq).to(tl.int32)
    first, base, span = _segment(length, window, min_tiles, NUM_SEGMENTS, TILE)
    start = base + segment * span
    wait_for_inputs(PDL)
    if start >= length:
        return
    end = tl.minimum(start + span, length)

    rows_M = tl.arange(0, BLOCK_M)
    dims_H = tl.arange(0, BLOCK_H)
    is_row_M = rows_M < GROUP
    heads_M = kv_head * GROUP + rows_M
    is_q_MH = is_row_M[:, None] & (dims_H < HEAD_DIM)[None, :]
    q_ptr_MH = q_ptr + seq * q_stride_seq + heads_M[:, None] * q_stride_head + dims_H[None, :]
    q_MH = tl.load(q_ptr_MH, is_q_MH, other=0.0)
    if IS_INT8:
        q_MH = q_MH.to(tl.float16)
    else:
        q_MH = q_MH.to(k_ptr.dtype.element_ty)
    m_M = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    l_M = tl.zeros((BLOCK_M,), tl.float32)
    first_M = tl.zeros((BLOCK_M,), tl.int32) + first
    last_M = tl.zeros((BLOCK_M,), tl.int32) + (end - 1)
    m_M, l_M, acc_MH = attend_range(
        q_MH, m_M, l_M, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, table_ptr + seq * table_stride,
        kv_head, start, start, end, first_M, last_M, scale_log2, cap_log2, stride_block,
        stride_token, stride_head, num_kv_heads, BLOCK_M, HEAD_DIM, BLOCK_H, TILE, PAGE, IS_INT8,
        HAS_SOFT_CAP, False, False, ASM,
    )  # fmt: skip
    sum_MH = acc_MH / l_M[:, None]
    if DIRECT and base + span >= length:
        out_MH = sum_MH.to(out_ptr.dtype.element_ty)
        out_ptr_MH = out_ptr + seq * out_stride_seq + heads_M[:, None] * out_stride_head
        tl.store(out_ptr_MH + dims_H[None, :], out_MH, is_q_MH)
        if interleaved_ptr is not None:
            column_MH = interleaved_column(heads_M[:, None] * HEAD_DIM + dims_H[None, :])
            row_ptr = interleaved_ptr + seq * num_kv_heads * GROUP * HEAD_DIM
            tl.store(row_ptr + column_MH, out_MH, is_q_MH)
    else:
        slot_M = (seq * num_kv_heads * GROUP + heads_M) * NUM_SEGMENTS + segment
        partial_ptr_MH = partial_ptr + slot_M[:, None] * HEAD_DIM + dims_H[None, :]
        tl.store(partial_ptr_MH, sum_MH, is_q_MH)
        tl.store(lse_ptr + slot_M, m_M + tl.log2(l_M), is_row_M)


@triton.jit
def decode_merge_kernel(
    partial_ptr,
    lse_ptr,
    sinks_ptr,
    lengths_ptr,
    out_ptr,
    codes_ptr,
    scales_ptr,
    sums_ptr,
    interleaved_ptr,
    window,
    min_tiles,
    num_heads,
    out_stride_seq,
    out_stride_head,
    HEAD_DIM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    TILE: tl.constexpr,
    NUM_SEGMENTS: tl.constexpr,
    HEADS: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    DIRECT: tl.constexpr,
    PDL: tl.constexpr,
):
    """Weigh the segments of HEADS query heads; 0 where the sequence has no length. Where DIRECT, a
    sequence of one segment is there already."""
    start_next_kernel(PDL)
    seq = tl.program_id(1).to(tl.int64)
    length = tl.load(lengths_ptr + seq).to(tl.int32)
    _, base, span = _segment(length, window, min_tiles, NUM_SEGMENTS, TILE)
    wait_for_inputs(PDL)
    if DIRECT and length > 0 and base + span >= length:
        return
    first_head = tl.program_id(0) * HEADS
    heads_N = first_head + tl.arange(0, HEADS)
    segments_G = tl.arange(0, NUM_SEGMENTS)
    dims_H = tl.arange(0, BLOCK_H)
    is_head_N = heads_N < num_heads
    is_used_NG = is_head_N[:, None] & (base + segments_G * span < length)[None, :]
    slot_NG = (seq * num_heads + heads_N[:, None]) * NUM_SEGMENTS + segments_G[None, :]
    lse_NG = tl.load(lse_ptr + slot_NG, is_used_NG, other=float("-inf"))
    highest_N = tl.max(lse_NG, 1)
    if HAS_SINKS:
        sink_N = tl.load(sinks_ptr + heads_N, is_head_N, other=0.0).to(tl.float32)
        sink_N *= 1.4426950408889634
        highest_N = tl.maximum(highest_N, sink_N)
    highest_N = tl.where(highest_N == float("-inf"), 0.0, highest_N)
    weight_NG = tl.exp2(lse_NG - highest_N[:, None])
    total_N = tl.sum(weight_NG, 1)
    if HAS_SINKS:
        total_N += tl.exp2(sink_N - highest_N)
    total_N = tl.where(total_N == 0.0, 1.0, total_N)
    is_dim_NH = is_head_N[:, None] & (dims_H < HEAD_DIM)[None, :]
    partial_ptr_NGH = partial_ptr + slot_NG[:, :, None] * HEAD_DIM + dims_H[None, None, :]
    is_partial_NGH = is_used_NG[:, :, None] & is_dim_NH[:, None, :]
    partial_NGH = tl.load(partial_ptr_NGH, is_partial_NGH, other=0.0)
    out_NH = tl.sum(partial_NGH * weight_NG[:, :, None], 1) / total_N[:, None]
    out_NH = out_NH.to(out_ptr.dtype.element_ty)
    out_ptr_NH = out_ptr + seq * out_stride_seq + heads_N[:, None] * out_stride_head
    tl.store(out_ptr_NH + dims_H[None, :], out_NH, is_dim_NH)
    row = seq * num_heads * HEAD_DIM
    first_column = row + first_head * HEAD_DIM
    num_columns = tl.minimum(HEADS, num_heads - first_head) * HEAD_DIM
    if codes_ptr is not None and sums_ptr is None:
        store_e4m3(
            tl.reshape(out_NH, (HEADS * BLOCK_H,)).to(tl.float32), codes_ptr + first_column,
            scales_ptr + first_column // 128, 0, num_columns, HEADS * BLOCK_H,
        )  # fmt: skip
    elif codes_ptr is not None:
        store_rounded(
            tl.reshape(out_NH, (HEADS * BLOCK_H,)).to(tl.float32), codes_ptr + first_column,
            scales_ptr + first_column // 32, sums_ptr + first_column // 16, 0, num_columns // 32,
            HEADS * BLOCK_H // 32,
        )  # fmt: skip
    if interleaved_ptr is not None:
        _store_interleaved(interleaved_ptr + row, out_NH, first_head, num_heads, HEAD_DIM, BLOCK_H)


@triton.jit
def _store_interleaved(
    row_ptr, out_NH, first_head, num_heads, HEAD_DIM: tl.constexpr, BLOCK_H: tl.constexpr
):
    """By pairs: four neighbouring dims of a head become two of them. The head dim is a multiple of
    four."""
    HEADS: tl.constexpr = out_NH.shape[0]
    four_X = tl.arange(0, HEADS * BLOCK_H // 4)
    head_X = first_head + four_X // (BLOCK_H // 4)
    dim_X = four_X % (BLOCK_H // 4) * 4
    column_X = head_X * HEAD_DIM + dim_X
    # As interleaved_column has it; so that the compiler sees that it is even.
    place_X = column_X // 256 * 256 + column_X // 4 % 8 * 32 + column_X // 32 % 2 * 16
    place_X += column_X // 64 % 4 * 2
    pair = tl.arange(0, 2)
    place_X22 = place_X[:, None, None] + pair[None, :, None] * 8 + pair[None, None, :]
    value_X22 = tl.permute(tl.reshape(out_NH, (HEADS * BLOCK_H // 4, 2, 2)), (0, 2, 1))
    is_kept_X = (head_X < num_heads) & (dim_X < HEAD_DIM)
    tl.store(row_ptr + place_X22, value_X22, is_kept_X[:, None, None])


def paged_attention_decode(
    q_SNH: Tensor,
    k_cache_BPKH: Tensor,
    v_cache_BPKH: Tensor,
    block_table_SB: Tensor,
    lengths_S: Tensor,
    scale: float,
    *,
    k_scale_BKP: Tensor | None = None,
    v_scale_BKP: Tensor | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks_N: Tensor | None = None,
    out_SNH: Tensor | None = None,
    rounded: QuantisedRows | Fp8Rows | None = None,
    interleaved_SK: Tensor | None = None,
    config: DecodeConfig | None = None,
) -> Tensor:
    """Attention of one query per sequence over its first lengths_S cache positions -> [S, N, H].

    A row of length 0 gets zeros. Entries of block_table_SB past a row's length are not read.
    `window`: only the last so many positions. `soft_cap`: scores become cap * tanh(score / cap).
    sinks_N: a logit per head that takes part in the softmax and has no value. int8 caches need
    both scales. To `rounded` goes the output [S, N * H] in bytes or e4m3, where rounds_output says
    so, to interleaved_SK the same [S, N * H] in that order.
    """
    num_seqs, num_heads, head_dim = q_SNH.shape
    page, num_kv_heads = k_cache_BPKH.shape[1:3]
    check_cache(q_SNH, k_cache_BPKH, v_cache_BPKH, k_scale_BKP, v_scale_BKP, block_table_SB)
    out_SNH = (
        torch.empty_like(q_SNH, memory_format=torch.contiguous_format)
        if (out_SNH is None)
        else out_SNH
    )
    assert out_SNH.stride(2) == 1, "the head dim of the output is contiguous"
    assert interleaved_SK is None or head_dim % 4 == 0, f"head dim {head_dim}: no multiple of 4"
    per_scale = FP8_GROUP if isinstance(rounded, Fp8Rows) else ACTIVATION_GROUP
    assert rounded is None or rounds_output(num_heads, head_dim, per_scale), "a group of two heads"
    if num_seqs == 0:
        return out_SNH
    config = config or decode_config(num_seqs, num_kv_heads, head_dim, kv=k_cache_BPKH.dtype)
    shape = (num_seqs, num_heads, config.num_segments)
    partial_SNGH = torch.empty((*shape, head_dim), dtype=torch.float32, device=q_SNH.device)
    lse_SNG = torch.empty(shape, dtype=torch.float32, device=q_SNH.device)
    is_int8 = k_scale_BKP is not None
    group = num_heads // num_kv_heads
    block_h = triton.next_power_of_2(head_dim)
    is_direct = sinks_N is None and rounded is None
    decode_segments_kernel[(num_kv_heads, num_seqs, config.num_segments)](
        q_SNH,
        k_cache_BPKH,
        v_cache_BPKH,
        k_scale_BKP if is_int8 else lse_SNG,
        v_scale_BKP if is_int8 else lse_SNG,
        block_table_SB,
        lengths_S,
        partial_SNGH,
        lse_SNG,
        out_SNH,
        interleaved_SK,
        scale * LOG2_E,
        (soft_cap or 1.0) * LOG2_E,
        window or NO_WINDOW,
        config.min_tiles,
        num_kv_heads,
        q_SNH.stride(0),
        q_SNH.stride(1),
        *k_cache_BPKH.stride()[:3],
        block_table_SB.stride(0),
        out_SNH.stride(0),
        out_SNH.stride(1),
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_H=block_h,
        BLOCK_M=max(16, triton.next_power_of_2(group)),
        TILE=config.tile,
        PAGE=page,
        NUM_SEGMENTS=config.num_segments,
        IS_INT8=is_int8,
        HAS_SOFT_CAP=soft_cap is not None,
        DIRECT=is_direct,
        ASM=has_ptx_assembly(q_SNH.device),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **launch_options(q_SNH.device),
    )
    heads = _heads_per_merge(num_seqs, num_heads)
    if rounded is not None and head_dim < block_h:
        heads = 1  # so that the columns of a program follow each other
    decode_merge_kernel[(triton.cdiv(num_heads, heads), num_seqs)](
        partial_SNGH,
        lse_SNG,
        lse_SNG if sinks_N is None else sinks_N,
        lengths_S,
        out_SNH,
        *((None, None, None) if rounded is None else rounded.tensors),
        interleaved_SK,
        window or NO_WINDOW,
        config.min_tiles,
        num_heads,
        out_SNH.stride(0),
        out_SNH.stride(1),
        HEAD_DIM=head_dim,
        BLOCK_H=block_h,
        TILE=config.tile,
        NUM_SEGMENTS=config.num_segments,
        HEADS=heads,
        HAS_SINKS=sinks_N is not None,
        DIRECT=is_direct,
        num_warps=_merge_warps(heads, config.num_segments, block_h),
        **launch_options(q_SNH.device),
    )
    return out_SNH


def _heads_per_merge(num_seqs: int, num_heads: int) -> int:
    if num_seqs * num_heads <= _MERGES_ALONE:
        return 1
    wanted = 4 if num_seqs * num_heads <= _MERGES_BY_FOUR else 16
    return min(wanted, triton.next_power_of_2(num_heads))


def _merge_warps(heads: int, num_segments: int, block_h: int) -> int:
    """So many that a thread holds 64 values of the segments, as far as that is measured."""
    return min(2 if heads == 1 else 8, max(1, heads * num_segments * block_h // (64 * 32)))


def rounds_output(num_heads: int, head_dim: int, group: int = ACTIVATION_GROUP) -> bool:
    """Whether rounded rows can be written by heads: groups within heads, rows of whole units."""
    return head_dim % group == 0 and num_heads * head_dim % UNIT == 0


def _aot_case(name: str, *, kv: str, head_dim: int, group: int, tile: int) -> AotCase:
    return AotCase(
        name=f"decode_segments_{name}",
        kernel=decode_segments_kernel,
        signature={
            "q_ptr": "*fp16" if kv == "i8" else f"*{kv}",
            "k_ptr": f"*{kv}",
            "v_ptr": f"*{kv}",
            "k_scale_ptr": "*fp16",
            "v_scale_ptr": "*fp16",
            "table_ptr": "*i32",
            "lengths_ptr": "*i32",
            "partial_ptr": "*fp32",
            "lse_ptr": "*fp32",
            "out_ptr": "*fp16" if kv == "i8" else f"*{kv}",
            "interleaved_ptr": "*fp16",
            "scale_log2": "fp32",
            "cap_log2": "fp32",
            **dict.fromkeys(_SEGMENT_INTEGERS, "i32"),
        },
        constexprs={
            "GROUP": group,
            "HEAD_DIM": head_dim,
            "BLOCK_H": triton.next_power_of_2(head_dim),
            "BLOCK_M": 16,
            "TILE": tile,
            "PAGE": 16,
            "NUM_SEGMENTS": 16,
            "IS_INT8": kv == "i8",
            "HAS_SOFT_CAP": head_dim == 256,
            "DIRECT": True,
            "ASM": True,
            "PDL": True,
        },
    )


def _merge_case(
    name: str, *, out: str, forms: dict[str, str], heads: int, has_sinks: bool = False
) -> AotCase:
    absent = dict.fromkeys(set(_FORMS) - set(forms))
    return AotCase(
        name=name,
        kernel=decode_merge_kernel,
        signature={
            "partial_ptr": "*fp32",
            "lse_ptr": "*fp32",
            "sinks_ptr": "*fp32",
            "lengths_ptr": "*i64",
            "out_ptr": f"*{out}",
            **forms,
            **dict.fromkeys(_MERGE_INTEGERS, "i32"),
        },
        constexprs={
            "HEAD_DIM": 128,
            "BLOCK_H": 128,
            "TILE": 64,
            "NUM_SEGMENTS": 16,
            "HEADS": heads,
            "HAS_SINKS": has_sinks,
            "DIRECT": not has_sinks,
            "PDL": True,
            **absent,
        },
        num_warps=_merge_warps(heads, 16, 128),
    )


_SEGMENT_INTEGERS = (
    "window",
    "min_tiles",
    "num_kv_heads",
    "q_stride_seq",
    "q_stride_head",
    "stride_block",
    "stride_token",
    "stride_head",
    "table_stride",
    "out_stride_seq",
    "out_stride_head",
)
_FORMS = {
    "codes_ptr": "*i8",
    "scales_ptr": "*fp32",
    "sums_ptr": "*i16",
    "interleaved_ptr": "*fp16",
}
_E4M3 = {"codes_ptr": "*u8", "scales_ptr": "*fp32"}
_MERGE_INTEGERS = ("window", "min_tiles", "num_heads", "out_stride_seq", "out_stride_head")
AOT_CASES = (
    _aot_case("f16_128", kv="fp16", head_dim=128, group=4, tile=64),
    _aot_case("bf16_256", kv="bf16", head_dim=256, group=4, tile=32),
    _aot_case("int8_128", kv="i8", head_dim=128, group=4, tile=64),
    _aot_case("f16_80", kv="fp16", head_dim=80, group=7, tile=64),
    _merge_case("decode_merge", out="bf16", forms={}, heads=4, has_sinks=True),
    _merge_case("decode_merge_forms", out="fp16", forms=_FORMS, heads=1),
    _merge_case("decode_merge_e4m3", out="bf16", forms=_E4M3, heads=4),
)
