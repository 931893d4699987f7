"""Paged attention of decode rows: one query per sequence, split over its cached positions.

One Triton launch: every program takes one segment of one sequence for one kv head, and the last
one that is done with a sequence weighs all of them (Flash-Decoding; the merge by log-sum-exp as in
arXiv 2205.14135). Which one that is differs from run to run, the order of the sums does not. The
grid depends on the number of rows alone, lengths are read on the device: one CUDA graph serves any
length. Twins: reference.py, and reference_attention.py for the options.

Shapes: S sequences, N query heads, K kv heads, H head dim, B blocks, P position in block, G
segments.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-decorators=False
from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

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

_AT_ONCE: tl.constexpr = tl.constexpr(128)
"""Positions whose keys and values are prefetched by one instruction per thread and warp."""
_PREFETCH_ASM: tl.constexpr = tl.constexpr(
    "{ cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0; }"
)


@triton.jit
def _segment(length, window, min_tiles, NUM_SEGMENTS: tl.constexpr, TILE: tl.constexpr):
    """First visible position, that of its tile, and positions per segment."""
    first = tl.maximum(length - window, 0)
    base = first // TILE * TILE
    num_tiles = tl.cdiv(length - base, TILE)
    tiles_per_segment = tl.maximum(tl.cdiv(num_tiles, NUM_SEGMENTS), min_tiles)
    return first, base, tiles_per_segment * TILE


@triton.jit
def _prefetch(pointer_L, num_bytes):
    """So many bytes from each address on, into the L2 cache; waits for nothing."""
    size_L = tl.zeros(pointer_L.shape, tl.int32) + num_bytes
    tl.inline_asm_elementwise(
        _PREFETCH_ASM, "=r,l,r", [pointer_L.to(tl.int64), size_L], dtype=tl.int32, is_pure=False,
        pack=1,
    )  # fmt: skip


@triton.jit
def _prefetch_range(
    k_ptr, v_ptr, table_ptr, start, end, stride_block, stride_token, num_bytes, PAGE: tl.constexpr
):  # fmt: skip
    """One head's keys and values of the positions from `start` up to `end`."""
    for at in range(start, end, _AT_ONCE):
        positions_L = tl.minimum(at + tl.arange(0, _AT_ONCE), end - 1)
        block_L = tl.load(table_ptr + positions_L // PAGE).to(tl.int64)
        offset_L = block_L * stride_block + positions_L % PAGE * stride_token
        _prefetch(k_ptr + offset_L, num_bytes)
        _prefetch(v_ptr + offset_L, num_bytes)


@triton.jit
def _merge_head(
    partial_ptr, lse_ptr, sinks_ptr, out_ptr, codes_ptr, scales_ptr, sums_ptr, interleaved_ptr,
    seq, head, num_heads, num_used, out_stride_seq, out_stride_head, HEAD_DIM: tl.constexpr,
    BLOCK_H: tl.constexpr, NUM_SEGMENTS: tl.constexpr, HAS_SINKS: tl.constexpr,
):  # fmt: skip
    """Weigh num_used segments of one query head; 0 where there are none."""
    segments_G = tl.arange(0, NUM_SEGMENTS)
    dims_H = tl.arange(0, BLOCK_H)
    is_used_G = segments_G < num_used
    slot_G = (seq * num_heads + head) * NUM_SEGMENTS + segments_G
    # Other programs wrote them: not from this multiprocessor's own cache.
    lse_G = tl.load(lse_ptr + slot_G, is_used_G, other=float("-inf"), cache_modifier=".cg")
    highest = tl.max(lse_G, 0)
    if HAS_SINKS:
        sink = tl.load(sinks_ptr + head).to(tl.float32) * 1.4426950408889634
        highest = tl.maximum(highest, sink)
    highest = tl.where(highest == float("-inf"), 0.0, highest)
    weight_G = tl.exp2(lse_G - highest)
    total = tl.sum(weight_G, 0)
    if HAS_SINKS:
        total += tl.exp2(sink - highest)
    is_partial_GH = is_used_G[:, None] & (dims_H < HEAD_DIM)[None, :]
    partial_ptr_GH = partial_ptr + slot_G[:, None] * HEAD_DIM + dims_H[None, :]
    partial_GH = tl.load(partial_ptr_GH, is_partial_GH, other=0.0, cache_modifier=".cg")
    out_H = tl.sum(partial_GH * weight_G[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    out_ptr_H = out_ptr + seq * out_stride_seq + head * out_stride_head + dims_H
    out_H = out_H.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr_H, out_H, dims_H < HEAD_DIM)
    first_column = (seq * num_heads + head) * HEAD_DIM
    if codes_ptr is not None and sums_ptr is None:
        store_e4m3(
            out_H.to(tl.float32), codes_ptr + first_column, scales_ptr + first_column // 128, 0,
            HEAD_DIM, BLOCK_H,
        )  # fmt: skip
    elif codes_ptr is not None:
        store_rounded(
            out_H.to(tl.float32), codes_ptr + first_column, scales_ptr + first_column // 32,
            sums_ptr + first_column // 16, 0, HEAD_DIM // 32, BLOCK_H // 32,
        )  # fmt: skip
    if interleaved_ptr is not None:
        column_H = interleaved_column(head * HEAD_DIM + dims_H)
        interleaved_ptr_H = interleaved_ptr + seq * num_heads * HEAD_DIM + column_H
        tl.store(interleaved_ptr_H, out_H, dims_H < HEAD_DIM)


@triton.jit
def decode_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    k_scale_ptr,
    v_scale_ptr,
    table_ptr,
    lengths_ptr,
    arrivals_ptr,
    partial_ptr,
    lse_ptr,
    sinks_ptr,
    out_ptr,
    codes_ptr,
    scales_ptr,
    sums_ptr,
    interleaved_ptr,
    scale_log2,
    cap_log2,
    window,
    min_tiles,
    num_prefetched,
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
    HAS_SINKS: tl.constexpr,
    ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    """partial [S, N, G, H] and lse [S, N, G] float32 pass between the programs of a sequence and
    head, arrivals [S, K] counts those that are done: 0 before and after. PREFETCH: the assembly
    for it, or None."""
    start_next_kernel(PDL)
    kv_head = tl.program_id(0)
    seq = tl.program_id(1).to(tl.int64)
    segment = tl.program_id(2)
    # Lengths and block table are there since the step began (dependent_launch).
    length = tl.load(lengths_ptr + seq).to(tl.int32)
    table_ptr += seq * table_stride
    first, base, span = _segment(length, window, min_tiles, NUM_SEGMENTS, TILE)
    start = base + segment * span
    end = tl.minimum(start + span, length)
    position_bytes: tl.constexpr = HEAD_DIM * k_ptr.dtype.element_ty.primitive_bitwidth // 8
    if PDL and position_bytes % 16 == 0:
        _prefetch_range(
            k_ptr + kv_head * stride_head, v_ptr + kv_head * stride_head, table_ptr, start,
            tl.minimum(end, start + num_prefetched), stride_block, stride_token, position_bytes,
            PAGE,
        )  # fmt: skip
    wait_for_inputs(PDL)
    num_heads = num_kv_heads * GROUP
    num_used = tl.cdiv(tl.maximum(length - base, 0), span)
    merges = (num_used == 0) & (segment == 0)
    if start < length:
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
            q_MH, m_M, l_M, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, table_ptr, kv_head, start,
            start, end, first_M, last_M, scale_log2, cap_log2, stride_block, stride_token,
            stride_head, num_kv_heads, BLOCK_M, HEAD_DIM, BLOCK_H, TILE, PAGE, IS_INT8,
            HAS_SOFT_CAP, False, False, ASM,
        )  # fmt: skip
        sum_MH = acc_MH / l_M[:, None]
        is_whole = num_used == 1
        if HAS_SINKS or codes_ptr is not None:
            is_whole = num_used == 0  # never: such heads are written one by one
        if is_whole:
            out_MH = sum_MH.to(out_ptr.dtype.element_ty)
            out_ptr_MH = out_ptr + seq * out_stride_seq + heads_M[:, None] * out_stride_head
            tl.store(out_ptr_MH + dims_H[None, :], out_MH, is_q_MH)
            if interleaved_ptr is not None:
                column_MH = interleaved_column(heads_M[:, None] * HEAD_DIM + dims_H[None, :])
                row_ptr = interleaved_ptr + seq * num_heads * HEAD_DIM
                tl.store(row_ptr + column_MH, out_MH, is_q_MH)
        else:
            slot_M = (seq * num_heads + heads_M) * NUM_SEGMENTS + segment
            partial_ptr_MH = partial_ptr + slot_M[:, None] * HEAD_DIM + dims_H[None, :]
            tl.store(partial_ptr_MH, sum_MH, is_q_MH)
            tl.store(lse_ptr + slot_M, m_M + tl.log2(l_M), is_row_M)
            tl.debug_barrier()  # all threads have stored before one of them counts
            arrivals_ptr += seq * num_kv_heads + kv_head
            merges = tl.atomic_add(arrivals_ptr, 1, sem="acq_rel", scope="gpu") == num_used - 1
            if merges:
                tl.store(arrivals_ptr, 0)
    if merges:
        for index in tl.static_range(GROUP):
            _merge_head(
                partial_ptr, lse_ptr, sinks_ptr, out_ptr, codes_ptr, scales_ptr, sums_ptr,
                interleaved_ptr, seq, kv_head * GROUP + index, num_heads, num_used,
                out_stride_seq, out_stride_head, HEAD_DIM, BLOCK_H, NUM_SEGMENTS, HAS_SINKS,
            )  # fmt: skip


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
    arrivals_SK: Tensor | None = None,
    rounded: QuantisedRows | Fp8Rows | None = None,
    interleaved_SK: Tensor | None = None,
    config: DecodeConfig | None = None,
) -> Tensor:
    """Attention of one query per sequence over its first lengths_S cache positions -> [S, N, H].

    A row of length 0 gets zeros. Entries of block_table_SB past a row's length are not read.
    `window`: only the last so many positions. `soft_cap`: scores become cap * tanh(score / cap).
    sinks_N: a logit per head that takes part in the softmax and has no value. int8 caches need
    both scales. arrivals_SK: int32 zeros, and zeros again afterwards. To `rounded` goes the output
    [S, N * H] in bytes or e4m3, where rounds_output says so, to interleaved_SK the same in that
    order.
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
    if arrivals_SK is None:
        arrivals_SK = torch.zeros((num_seqs, num_kv_heads), dtype=torch.int32, device=q_SNH.device)
    assert arrivals_SK.shape == (num_seqs, num_kv_heads) and arrivals_SK.is_contiguous()
    decode_kernel[(num_kv_heads, num_seqs, config.num_segments)](
        q_SNH,
        k_cache_BPKH,
        v_cache_BPKH,
        k_scale_BKP if is_int8 else lse_SNG,
        v_scale_BKP if is_int8 else lse_SNG,
        block_table_SB,
        lengths_S,
        arrivals_SK,
        partial_SNGH,
        lse_SNG,
        lse_SNG if sinks_N is None else sinks_N,
        out_SNH,
        *((None, None, None) if rounded is None else rounded.tensors),
        interleaved_SK,
        scale * LOG2_E,
        (soft_cap or 1.0) * LOG2_E,
        window or NO_WINDOW,
        config.min_tiles,
        config.num_prefetched,
        num_kv_heads,
        q_SNH.stride(0),
        q_SNH.stride(1),
        *k_cache_BPKH.stride()[:3],
        block_table_SB.stride(0),
        out_SNH.stride(0),
        out_SNH.stride(1),
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_H=triton.next_power_of_2(head_dim),
        BLOCK_M=max(16, triton.next_power_of_2(group)),
        TILE=config.tile,
        PAGE=page,
        NUM_SEGMENTS=config.num_segments,
        IS_INT8=is_int8,
        HAS_SOFT_CAP=soft_cap is not None,
        HAS_SINKS=sinks_N is not None,
        ASM=has_ptx_assembly(q_SNH.device),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **launch_options(q_SNH.device),
    )
    return out_SNH


def rounds_output(num_heads: int, head_dim: int, group: int = ACTIVATION_GROUP) -> bool:
    """Whether rounded rows can be written by heads: groups within heads, rows of whole units."""
    return head_dim % group == 0 and num_heads * head_dim % UNIT == 0


def _aot_case(
    name: str,
    *,
    kv: str,
    head_dim: int,
    group: int,
    tile: int,
    has_sinks: bool = False,
    forms: Mapping[str, str] = MappingProxyType({}),
) -> AotCase:
    out = "fp16" if kv == "i8" else kv
    return AotCase(
        name=f"decode_{name}",
        kernel=decode_kernel,
        signature={
            "q_ptr": f"*{out}",
            "k_ptr": f"*{kv}",
            "v_ptr": f"*{kv}",
            "k_scale_ptr": "*fp16",
            "v_scale_ptr": "*fp16",
            "table_ptr": "*i32",
            "lengths_ptr": "*i64",
            "arrivals_ptr": "*i32",
            "partial_ptr": "*fp32",
            "lse_ptr": "*fp32",
            "sinks_ptr": "*fp32",
            "out_ptr": f"*{out}",
            **forms,
            "scale_log2": "fp32",
            "cap_log2": "fp32",
            **dict.fromkeys(_INTEGERS, "i32"),
        },
        constexprs={
            **dict.fromkeys(set(_FORMS) - set(forms)),
            "GROUP": group,
            "HEAD_DIM": head_dim,
            "BLOCK_H": triton.next_power_of_2(head_dim),
            "BLOCK_M": 16,
            "TILE": tile,
            "PAGE": 16,
            "NUM_SEGMENTS": 16,
            "IS_INT8": kv == "i8",
            "HAS_SOFT_CAP": head_dim == 256,
            "HAS_SINKS": has_sinks,
            "ASM": True,
            "PDL": True,
        },
    )


_INTEGERS = (
    "window",
    "min_tiles",
    "num_prefetched",
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
AOT_CASES = (
    _aot_case("f16_128", kv="fp16", head_dim=128, group=4, tile=64, forms=_FORMS),
    _aot_case("bf16_256", kv="bf16", head_dim=256, group=4, tile=32),
    _aot_case("int8_128", kv="i8", head_dim=128, group=4, tile=64, has_sinks=True),
    _aot_case("f16_80", kv="fp16", head_dim=80, group=7, tile=64),
    _aot_case("e4m3_128", kv="bf16", head_dim=128, group=4, tile=32, forms=_E4M3),
)
