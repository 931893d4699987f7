"""Paged causal attention of prefill chunks, several in one Triton launch.

A program takes a tile of queries of one sequence for one kv head. Which sequence, it finds on the
device from num_tokens_S, so that the grid depends on shapes alone and the launch can be captured.
The query heads that share a kv head are rows of one tile: their keys and values are read once.
Flash attention's online softmax (arXiv 2205.14135). Hopper cards have attention_wgmma.py for the
plain case. Twins: reference.py, reference_attention.py.

Shapes: T tokens, S sequences, N query heads, K kv heads, H head dim, B blocks, P position in block.
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
from pipeserve.kernels.attention_tile import (
    LOG2_E,
    NO_WINDOW,
    attend_range,
    check_cache,
    has_ptx_assembly,
)
from pipeserve.kernels.attention_wgmma import prefill_wgmma, takes_wgmma

_HOPPER_SHARED_BYTES = 160 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillConfig:
    """Launch shape: rows (queries x heads of a group) and cache positions per tile."""

    rows: int
    tile: int
    num_warps: int
    num_stages: int


@triton.jit
def prefill_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    k_scale_ptr,
    v_scale_ptr,
    sinks_ptr,
    table_ptr,
    starts_ptr,
    first_positions_ptr,
    num_tokens_ptr,
    out_ptr,
    scale_log2,
    cap_log2,
    window,
    num_seqs,
    num_kv_heads,
    q_stride_token,
    q_stride_head,
    out_stride_token,
    out_stride_head,
    stride_block,
    stride_token,
    stride_head,
    table_stride,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr,
    TILE: tl.constexpr,
    PAGE: tl.constexpr,
    IS_INT8: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    ASM: tl.constexpr,
):
    """Row r of a tile is query r // GROUP of the tile and head r % GROUP of the group."""
    NUM_QUERIES: tl.constexpr = BLOCK_M // GROUP
    # The last tiles of a chunk see the most positions: they begin first.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head = tl.program_id(1)
    seqs_S = tl.arange(0, BLOCK_S)
    num_tokens_S = tl.load(num_tokens_ptr + seqs_S, seqs_S < num_seqs, other=0).to(tl.int32)
    num_tiles_S = tl.cdiv(num_tokens_S, NUM_QUERIES)
    seq = tl.sum((tl.cumsum(num_tiles_S, 0) <= tile).to(tl.int32), 0)
    if seq >= num_seqs:
        return
    tiles_before = tl.sum(tl.where(seqs_S < seq, num_tiles_S, 0), 0)
    start_token = tl.load(starts_ptr + seq).to(tl.int32)
    num_tokens = tl.sum(tl.where(seqs_S == seq, num_tokens_S, 0), 0)
    query = (tile - tiles_before) * NUM_QUERIES
    num_queries = tl.minimum(num_tokens - query, NUM_QUERIES)
    first_position = tl.load(first_positions_ptr + seq).to(tl.int32) + query

    rows_M = tl.arange(0, BLOCK_M)
    dims_H = tl.arange(0, BLOCK_H)
    queries_M = rows_M // GROUP
    heads_M = kv_head * GROUP + rows_M % GROUP
    tokens_M = (start_token + query + queries_M).to(tl.int64)
    is_row_M = queries_M < num_queries
    is_q_MH = is_row_M[:, None] & (dims_H < HEAD_DIM)[None, :]
    q_offset_M = tokens_M * q_stride_token + heads_M * q_stride_head
    q_MH = tl.load(q_ptr + q_offset_M[:, None] + dims_H[None, :], is_q_MH, other=0.0)
    if IS_INT8:
        q_MH = q_MH.to(tl.float16)
    else:
        q_MH = q_MH.to(k_ptr.dtype.element_ty)

    last_M = first_position + queries_M
    first_M = last_M - window + 1
    m_M = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    l_M = tl.zeros((BLOCK_M,), tl.float32)
    if HAS_SINKS:
        m_M = tl.load(sinks_ptr + heads_M).to(tl.float32) * 1.4426950408889634
        l_M += 1.0
    end = first_position + num_queries
    start = tl.maximum(first_position - window + 1, 0) // TILE * TILE
    # Tiles that every query sees whole go first and without masks.
    whole_end = (first_position + 1) // TILE * TILE
    table_row_ptr = table_ptr + seq.to(tl.int64) * table_stride
    m_M, l_M, acc_MH = attend_range(
        q_MH, m_M, l_M, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, table_row_ptr,
        kv_head, start, whole_end, end, first_M, last_M, scale_log2, cap_log2, stride_block,
        stride_token, stride_head, num_kv_heads, BLOCK_M, HEAD_DIM, BLOCK_H, TILE, PAGE, IS_INT8,
        HAS_SOFT_CAP, True, HAS_WINDOW, ASM,
    )  # fmt: skip
    out_offset_M = tokens_M * out_stride_token + heads_M * out_stride_head
    out_MH = acc_MH / l_M[:, None]
    tl.store(
        out_ptr + out_offset_M[:, None] + dims_H[None, :],
        out_MH.to(out_ptr.dtype.element_ty),
        is_q_MH,
    )


def prefill_config(device: torch.device, head_dim: int, kv: torch.dtype) -> PrefillConfig:
    """The largest tiles that registers and shared memory hold; measured on an H100."""
    if torch.version.hip is not None:
        return PrefillConfig(rows=64, tile=16, num_warps=8, num_stages=1)
    num_bytes = head_dim * max(kv.itemsize, 2)
    shared_bytes = _HOPPER_SHARED_BYTES
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        shared_bytes = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]
    if shared_bytes < _HOPPER_SHARED_BYTES or num_bytes > 512:
        return PrefillConfig(rows=64, tile=32, num_warps=4, num_stages=2)
    if num_bytes > 256:
        return PrefillConfig(rows=128, tile=32, num_warps=8, num_stages=2)
    if kv == torch.int8:
        return PrefillConfig(rows=64, tile=64, num_warps=4, num_stages=2)
    return PrefillConfig(rows=128, tile=64, num_warps=8, num_stages=3)


def paged_attention_prefill(
    q_TNH: Tensor,
    k_cache_BPKH: Tensor,
    v_cache_BPKH: Tensor,
    block_table_SB: Tensor,
    first_positions_S: Tensor,
    num_tokens_S: Tensor,
    scale: float,
    *,
    starts_S: Tensor | None = None,
    k_scale_BKP: Tensor | None = None,
    v_scale_BKP: Tensor | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks_N: Tensor | None = None,
    out_TNH: Tensor | None = None,
    config: PrefillConfig | None = None,
) -> Tensor:
    """Causal attention of chunks over everything cached before and in them -> [T, N, H].

    Sequence s brings num_tokens_S[s] queries (0 is allowed), the first at position
    first_positions_S[s]; their own keys and values are in the cache already. starts_S: the token in
    which each one's queries begin; one after the other where it is left out. Tokens of no sequence
    stay unwritten. Options as paged_attention_decode has them. config: of the Triton kernel, which
    is then taken also where there is another one.
    """
    num_tokens, num_heads, head_dim = q_TNH.shape
    num_seqs = num_tokens_S.shape[0]
    page, num_kv_heads = k_cache_BPKH.shape[1:3]
    check_cache(q_TNH, k_cache_BPKH, v_cache_BPKH, k_scale_BKP, v_scale_BKP, block_table_SB)
    if out_TNH is None:
        out_TNH = torch.empty_like(q_TNH, memory_format=torch.contiguous_format)
    assert out_TNH.stride(2) == 1, "the head dim of the output is contiguous"
    if num_tokens == 0:
        return out_TNH
    if starts_S is None:
        starts_S = num_tokens_S.cumsum(0, dtype=num_tokens_S.dtype) - num_tokens_S
    indices = (block_table_SB, starts_S, first_positions_S, num_tokens_S)
    has_options = any(option is not None for option in (window, soft_cap, sinks_N, config))
    if not has_options and takes_wgmma(q_TNH, k_cache_BPKH, v_cache_BPKH, *indices, out_TNH):
        prefill_wgmma(
            q_TNH, k_cache_BPKH, v_cache_BPKH, *indices, out_TNH, scale_log2=scale * LOG2_E
        )
        return out_TNH
    group = num_heads // num_kv_heads
    config = config or prefill_config(q_TNH.device, head_dim, k_cache_BPKH.dtype)
    rows = max(config.rows, triton.next_power_of_2(group))
    is_int8 = k_scale_BKP is not None
    # Every sequence may end in a tile of its own.
    most_tiles = num_tokens // (rows // group) + num_seqs
    prefill_kernel[(most_tiles, num_kv_heads)](
        q_TNH,
        k_cache_BPKH,
        v_cache_BPKH,
        k_scale_BKP if is_int8 else q_TNH,
        v_scale_BKP if is_int8 else q_TNH,
        q_TNH if sinks_N is None else sinks_N,
        block_table_SB,
        starts_S,
        first_positions_S,
        num_tokens_S,
        out_TNH,
        scale * LOG2_E,
        (soft_cap or 1.0) * LOG2_E,
        window or NO_WINDOW,
        num_seqs,
        num_kv_heads,
        q_TNH.stride(0),
        q_TNH.stride(1),
        out_TNH.stride(0),
        out_TNH.stride(1),
        *k_cache_BPKH.stride()[:3],
        block_table_SB.stride(0),
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_H=triton.next_power_of_2(head_dim),
        BLOCK_M=rows,
        BLOCK_S=triton.next_power_of_2(num_seqs),
        TILE=config.tile,
        PAGE=page,
        IS_INT8=is_int8,
        HAS_SOFT_CAP=soft_cap is not None,
        HAS_SINKS=sinks_N is not None,
        HAS_WINDOW=window is not None,
        ASM=has_ptx_assembly(q_TNH.device),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return out_TNH


_INTEGERS = (
    "window",
    "num_seqs",
    "num_kv_heads",
    "q_stride_token",
    "q_stride_head",
    "out_stride_token",
    "out_stride_head",
    "stride_block",
    "stride_token",
    "stride_head",
    "table_stride",
)


def _aot_case(name: str, *, kv: str, head_dim: int, group: int, rows: int, tile: int) -> AotCase:
    q = "fp16" if kv == "i8" else kv
    return AotCase(
        name=f"prefill_{name}",
        kernel=prefill_kernel,
        signature={
            "q_ptr": f"*{q}",
            "k_ptr": f"*{kv}",
            "v_ptr": f"*{kv}",
            "k_scale_ptr": "*fp16",
            "v_scale_ptr": "*fp16",
            "sinks_ptr": "*fp32",
            "table_ptr": "*i32",
            "starts_ptr": "*i32",
            "first_positions_ptr": "*i32",
            "num_tokens_ptr": "*i32",
            "out_ptr": f"*{q}",
            "scale_log2": "fp32",
            "cap_log2": "fp32",
            **dict.fromkeys(_INTEGERS, "i32"),
        },
        constexprs={
            "GROUP": group,
            "HEAD_DIM": head_dim,
            "BLOCK_H": triton.next_power_of_2(head_dim),
            "BLOCK_M": rows,
            "BLOCK_S": 8,
            "TILE": tile,
            "PAGE": 16,
            "IS_INT8": kv == "i8",
            "HAS_SOFT_CAP": head_dim == 256,
            "HAS_SINKS": head_dim == 64,
            "HAS_WINDOW": head_dim in (64, 256),
            "ASM": True,
        },
        num_warps=rows // 16,
        num_stages=2,
    )


AOT_CASES = (
    _aot_case("f16_128", kv="fp16", head_dim=128, group=4, rows=128, tile=64),
    _aot_case("bf16_256", kv="bf16", head_dim=256, group=4, rows=64, tile=32),
    _aot_case("int8_128", kv="i8", head_dim=128, group=4, rows=64, tile=32),
    _aot_case("f16_64", kv="fp16", head_dim=64, group=3, rows=64, tile=32),
)
