"""What the two paged attention kernels share: reading tiles of pages, and the running softmax.

Triton device functions, inlined into their callers. Scores are in units of log2, so that exp2 and
log2 serve instead of exp and log.

int8 keys and values carry one float16 scale per token and kv head, laid out [B, K, P]. A key's
scale multiplies its score. A value's scale is added to the score as log2, so that the running
maximum bounds probability times scale: the product then fits float16 whatever the scale is, and
dividing by the scale gives the denominator back.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-decorators=False
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = 1.4426950408889634
NO_WINDOW = 2**30
"""A window that no context reaches."""

_UNPACK_ASM: tl.constexpr = tl.constexpr("""
{
    .reg .b32 unsigned, offset;
    xor.b32 unsigned, $2, 0x80808080;
    mov.b32 offset, 0x64806480;
    prmt.b32 $0, unsigned, 0x64646464, 0x4140;
    prmt.b32 $1, unsigned, 0x64646464, 0x4342;
    sub.f16x2 $0, $0, offset;
    sub.f16x2 $1, $1, offset;
}
""")


@triton.jit
def int8_to_float16(codes, ASM: tl.constexpr):
    """Exact: the code, made unsigned, is the mantissa of a float16 between 1024 and 1280.

    Conversion instructions are slow; four codes take five others, where ASM is to be had.
    """
    if ASM:
        return tl.inline_asm_elementwise(
            _UNPACK_ASM, "=r,=r,r", [codes], dtype=tl.float16, is_pure=True, pack=4
        )
    biased = (codes.to(tl.uint8, bitcast=True) ^ 0x80).to(tl.uint16) | 0x6400
    return biased.to(tl.float16, bitcast=True) - 1152.0


@triton.jit
def tanh(x):
    """Through exp2, clamped where float32 tanh is 1: libdevice is not on every back end."""
    bounded = tl.minimum(tl.maximum(x, -15.0), 15.0)
    return 1.0 - 2.0 / (tl.exp2(bounded * 2.885390081777927) + 1.0)


@triton.jit
def load_blocks(table_ptr, start, end, TILE: tl.constexpr, PAGE: tl.constexpr):
    """Block id of each of TILE positions from `start`; 0 from `end` on."""
    positions_L = start + tl.arange(0, TILE)
    blocks_L = tl.load(table_ptr + positions_L // PAGE, mask=positions_L < end, other=0)
    return blocks_L.to(tl.int32)


@triton.jit
def load_scales(
    scale_ptr,
    block_L,
    start,
    end,
    kv_head,
    num_kv_heads,
    TILE: tl.constexpr,
    PAGE: tl.constexpr,
    IS_INT8: tl.constexpr,
):
    """Scales of the positions from `start`, whose block ids are block_L; 1 without int8."""
    scale_L = tl.full((TILE,), 1.0, tl.float16)
    if IS_INT8:
        positions_L = start + tl.arange(0, TILE)
        head_L = block_L.to(tl.int64) * num_kv_heads + kv_head
        scale_ptr_L = scale_ptr + head_L * PAGE + positions_L % PAGE
        scale_L = tl.load(scale_ptr_L, positions_L < end, other=1.0)
    return scale_L


@triton.jit
def attend_tile(
    q_MH,
    m_M,
    l_M,
    acc_MH,
    block_L,
    k_scale_L,
    v_scale_L,
    k_ptr,
    v_ptr,
    k_scale_ptr,
    v_scale_ptr,
    table_ptr,
    kv_head,
    start,
    end,
    visible_from_M,
    visible_to_M,
    scale_log2,
    cap_log2,
    stride_block,
    stride_token,
    stride_head,
    num_kv_heads,
    HEAD_DIM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    TILE: tl.constexpr,
    PAGE: tl.constexpr,
    IS_INT8: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
    IS_MASKED: tl.constexpr,
    ASM: tl.constexpr,
):
    """Fold TILE cache positions from `start` into the running maximum, denominator and sum.

    block_L, k_scale_L and v_scale_L belong to the tile, and those of the next one are returned:
    loaded a tile ahead, so that nothing waits for them. Where IS_MASKED, positions from `end` on
    are not read, and row m sees those from visible_from_M up to visible_to_M, both included.
    """
    positions_L = start + tl.arange(0, TILE)
    dims_H = tl.arange(0, BLOCK_H)
    after = start + TILE
    next_block_L = load_blocks(table_ptr, after, end, TILE, PAGE)
    next_k_scale_L = load_scales(
        k_scale_ptr, next_block_L, after, end, kv_head, num_kv_heads, TILE, PAGE, IS_INT8
    )
    next_v_scale_L = load_scales(
        v_scale_ptr, next_block_L, after, end, kv_head, num_kv_heads, TILE, PAGE, IS_INT8
    )
    block_L = block_L.to(tl.int64)
    token_L = positions_L % PAGE
    offset_L = block_L * stride_block + token_L * stride_token + kv_head * stride_head
    k_ptr_HL = k_ptr + offset_L[None, :] + dims_H[:, None]
    v_ptr_LH = v_ptr + offset_L[:, None] + dims_H[None, :]
    if IS_MASKED:
        inside_L = positions_L < end
        k_HL = tl.load(k_ptr_HL, (dims_H < HEAD_DIM)[:, None] & inside_L[None, :], other=0)
        v_LH = tl.load(v_ptr_LH, (dims_H < HEAD_DIM)[None, :] & inside_L[:, None], other=0)
    elif HEAD_DIM == BLOCK_H:
        k_HL = tl.load(k_ptr_HL)
        v_LH = tl.load(v_ptr_LH)
    else:
        k_HL = tl.load(k_ptr_HL, (dims_H < HEAD_DIM)[:, None], other=0)
        v_LH = tl.load(v_ptr_LH, (dims_H < HEAD_DIM)[None, :], other=0)
    if IS_INT8:
        k_HL = int8_to_float16(k_HL, ASM)
        v_LH = int8_to_float16(v_LH, ASM)

    scores_ML = tl.dot(q_MH, k_HL, input_precision="ieee")
    if IS_INT8:
        v_scale_f32_L = tl.maximum(v_scale_L.to(tl.float32), 5.9604645e-08)  # the least float16
        v_bits_L = tl.log2(v_scale_f32_L)
    if HAS_SOFT_CAP:
        if IS_INT8:
            scores_ML *= k_scale_L.to(tl.float32)[None, :]
        scores_ML = tanh(scores_ML * (scale_log2 / cap_log2)) * cap_log2
        slope = 1.0
        if IS_INT8:
            scores_ML += v_bits_L[None, :]
    elif IS_INT8:
        factor_L = k_scale_L.to(tl.float32) * scale_log2
        scores_ML = scores_ML * factor_L[None, :] + v_bits_L[None, :]
        slope = 1.0
    else:
        # Left for the exponent, where a multiplication costs nothing.
        slope = scale_log2
    if IS_MASKED:
        is_visible_ML = (positions_L[None, :] <= visible_to_M[:, None]) & (
            positions_L[None, :] >= visible_from_M[:, None]
        )
        scores_ML = tl.where(is_visible_ML, scores_ML, float("-inf"))

    new_m_M = tl.maximum(m_M, tl.max(scores_ML, 1) * slope)
    base_M = new_m_M
    if IS_MASKED:
        # A row that has seen nothing yet: -inf minus -inf would be NaN.
        base_M = tl.where(new_m_M == float("-inf"), 0.0, new_m_M)
    rescale_M = tl.exp2(m_M - base_M)
    p_ML = tl.exp2(scores_ML * slope - base_M[:, None])
    if IS_INT8:
        sum_M = tl.sum(p_ML * (1.0 / v_scale_f32_L)[None, :], 1)
    else:
        sum_M = tl.sum(p_ML, 1)
    l_M = l_M * rescale_M + sum_M
    acc_MH = acc_MH * rescale_M[:, None]
    acc_MH = tl.dot(p_ML.to(v_LH.dtype), v_LH, acc_MH, input_precision="ieee")
    return new_m_M, l_M, acc_MH, next_block_L, next_k_scale_L, next_v_scale_L


@triton.jit
def attend_range(
    q_MH, m_M, l_M, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, table_ptr, kv_head, start, whole_end,
    end, visible_from_M, visible_to_M, scale_log2, cap_log2, stride_block, stride_token,
    stride_head, num_kv_heads, BLOCK_M: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_H: tl.constexpr, TILE: tl.constexpr, PAGE: tl.constexpr, IS_INT8: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr, HAS_WHOLE: tl.constexpr, HAS_WINDOW: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """Attend to the positions from `start` up to `end`: running maximum, denominator and sum.

    m_M and l_M are what they begin with. Where HAS_WHOLE, every row sees all positions before
    whole_end, but for its window.
    """
    acc_MH = tl.zeros((BLOCK_M, BLOCK_H), tl.float32)
    block_L = load_blocks(table_ptr, start, end, TILE, PAGE)
    k_scale_L = load_scales(
        k_scale_ptr, block_L, start, end, kv_head, num_kv_heads, TILE, PAGE, IS_INT8
    )
    v_scale_L = load_scales(
        v_scale_ptr, block_L, start, end, kv_head, num_kv_heads, TILE, PAGE, IS_INT8
    )
    if HAS_WHOLE:
        for tile_start in range(start, whole_end, TILE):
            m_M, l_M, acc_MH, block_L, k_scale_L, v_scale_L = attend_tile(
                q_MH, m_M, l_M, acc_MH, block_L, k_scale_L, v_scale_L, k_ptr, v_ptr, k_scale_ptr,
                v_scale_ptr, table_ptr, kv_head, tile_start, end, visible_from_M, visible_to_M,
                scale_log2, cap_log2, stride_block, stride_token, stride_head, num_kv_heads,
                HEAD_DIM, BLOCK_H, TILE, PAGE, IS_INT8, HAS_SOFT_CAP, HAS_WINDOW, ASM,
            )  # fmt: skip
        start = whole_end
    for tile_start in range(start, end, TILE):
        m_M, l_M, acc_MH, block_L, k_scale_L, v_scale_L = attend_tile(
            q_MH, m_M, l_M, acc_MH, block_L, k_scale_L, v_scale_L, k_ptr, v_ptr, k_scale_ptr,
            v_scale_ptr, table_ptr, kv_head, tile_start, end, visible_from_M, visible_to_M,
            scale_log2, cap_log2, stride_block, stride_token, stride_head, num_kv_heads,
            HEAD_DIM, BLOCK_H, TILE, PAGE, IS_INT8, HAS_SOFT_CAP, True, ASM,
        )  # fmt: skip
    return m_M, l_M, acc_MH


def check_cache(
    q_TNH: Tensor,
    k_cache_BPKH: Tensor,
    v_cache_BPKH: Tensor,
    k_scale_BKP: Tensor | None,
    v_scale_BKP: Tensor | None,
    block_table_SB: Tensor,
) -> None:
    """Assert the layouts that the kernels' address arithmetic relies on."""
    assert q_TNH.stride(2) == 1, "the head dim of the queries is contiguous"
    assert k_cache_BPKH.stride(3) == 1, "the head dim of the cache is contiguous"
    assert k_cache_BPKH.stride() == v_cache_BPKH.stride(), "keys and values lie alike"
    assert block_table_SB.stride(1) == 1, "a row of the block table is contiguous"
    assert q_TNH.shape[1] % k_cache_BPKH.shape[2] == 0, "query heads share kv heads evenly"
    is_int8 = k_cache_BPKH.dtype == torch.int8
    for scale in (k_scale_BKP, v_scale_BKP):
        assert (scale is not None) == is_int8, "int8 caches, and they alone, have scales"
        assert scale is None or scale.is_contiguous(), "scales are contiguous [B, K, P]"


def has_ptx_assembly(device: torch.device) -> bool:
    """Whether inline assembly runs: on NVIDIA GPUs, not in the interpreter or on AMD."""
    return device.type == "cuda" and torch.version.hip is None
