"""Rotary embedding: the angles of a step's positions, and one launch per layer that turns queries
and keys and writes keys and values to the cache.

Angles are float32 whatever the tensors are. Every function takes the place of its twin in
reference.py (reference_attention.py where the cache is int8).

Shapes: T tokens, N query heads, K kv heads, H head dim, M = N + 2K heads of a fused projection, R
rotated part of H, B blocks, P position in block.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-decorators=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pipeserve.kernels.aot import AotCase
from pipeserve.kernels.dependent_launch import (
    launch_options,
    start_next_kernel,
    wait_for_inputs,
)

_ROTARY_HEADS = 8
"""Heads per program of the rotary kernel."""


@triton.jit
def rotary_angles_kernel(
    positions_ptr,
    frequencies_ptr,
    cos_ptr,
    sin_ptr,
    scale,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One token per program: cosines twice, minus sines and sines."""
    token = tl.program_id(0).to(tl.int64)
    pairs_R = tl.arange(0, BLOCK)
    is_pair_R = pairs_R < HALF
    frequency_R = tl.load(frequencies_ptr + pairs_R, is_pair_R, other=0.0)
    angle_R = tl.load(positions_ptr + token).to(tl.float32) * frequency_R
    cos_R, sin_R = tl.cos(angle_R) * scale, tl.sin(angle_R) * scale
    offset_R = token * (2 * HALF) + pairs_R
    tl.store(cos_ptr + offset_R, cos_R, is_pair_R)
    tl.store(cos_ptr + offset_R + HALF, cos_R, is_pair_R)
    tl.store(sin_ptr + offset_R, -sin_R, is_pair_R)
    tl.store(sin_ptr + offset_R + HALF, sin_R, is_pair_R)


@triton.jit
def _round_to_even(x):
    """Nearest integer of |x| < 2^22 by adding and taking away 1.5 * 2^23."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _store_int8(cache_ptr_XH, scale_ptr_X, x_XH, is_kept_X, is_dim_XH):
    """Codes against the rounded scale of each head; mirrors reference_attention.quantise_kv."""
    highest_X = tl.max(tl.abs(x_XH), 1) * (1.0 / 127.0)
    scale_X = tl.maximum(highest_X, 5.9604645e-08).to(tl.float16)
    codes_XH = _round_to_even(
        tl.div_rn(x_XH, tl.broadcast_to(scale_X.to(tl.float32)[:, None], x_XH.shape))
    )
    codes_XH = tl.minimum(tl.maximum(codes_XH, -127.0), 127.0)
    tl.store(cache_ptr_XH, codes_XH.to(tl.int8), is_kept_X[:, None] & is_dim_XH)
    tl.store(scale_ptr_X, scale_X, is_kept_X)


@triton.jit
def rotary_and_cache_kernel(
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    k_cache_ptr,
    v_cache_ptr,
    k_scale_ptr,
    v_scale_ptr,
    slots_ptr,
    q_out_ptr,
    num_heads,
    num_kv_heads,
    qkv_stride_token,
    qkv_stride_head,
    angle_stride,
    stride_block,
    stride_token,
    stride_head,
    HEAD_DIM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    ROTATED: tl.constexpr,
    PAGE: tl.constexpr,
    HEADS: tl.constexpr,
    IS_INT8: tl.constexpr,
    PDL: tl.constexpr,
):
    """HEADS heads of one token: entry i of the rotated part turns with entry i + R/2."""
    start_next_kernel(PDL)
    token = tl.program_id(0).to(tl.int64)
    heads_X = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    dims_H = tl.arange(0, BLOCK_H)
    is_dim_XH = (heads_X < num_heads + 2 * num_kv_heads)[:, None] & (dims_H < HEAD_DIM)[None, :]
    is_q_X = heads_X < num_heads
    is_k_X = (heads_X >= num_heads) & (heads_X < num_heads + num_kv_heads)
    is_v_X = (heads_X >= num_heads + num_kv_heads) & (heads_X < num_heads + 2 * num_kv_heads)

    wait_for_inputs(PDL)
    row_ptr_X = qkv_ptr + token * qkv_stride_token + heads_X * qkv_stride_head
    x_XH = tl.load(row_ptr_X[:, None] + dims_H[None, :], is_dim_XH, other=0.0).to(tl.float32)
    is_turned_H = dims_H < ROTATED
    partner_H = tl.where(dims_H < ROTATED // 2, dims_H + ROTATED // 2, dims_H - ROTATED // 2)
    is_partner_XH = is_dim_XH & is_turned_H[None, :] & (is_q_X | is_k_X)[:, None]
    partner_XH = tl.load(row_ptr_X[:, None] + partner_H[None, :], is_partner_XH, other=0.0)
    angle_H = token * angle_stride + dims_H
    cos_H = tl.load(cos_ptr + angle_H, is_turned_H, other=1.0).to(tl.float32)
    sin_H = tl.load(sin_ptr + angle_H, is_turned_H, other=0.0).to(tl.float32)
    turned_XH = x_XH * cos_H[None, :] + partner_XH.to(tl.float32) * sin_H[None, :]
    x_XH = tl.where(is_v_X[:, None], x_XH, turned_XH)

    q_ptr_X = q_out_ptr + (token * num_heads + heads_X) * HEAD_DIM
    q_XH = x_XH.to(q_out_ptr.dtype.element_ty)
    tl.store(q_ptr_X[:, None] + dims_H[None, :], q_XH, is_dim_XH & is_q_X[:, None])

    slot = tl.load(slots_ptr + token).to(tl.int64)
    is_k_X = is_k_X & (slot >= 0)
    is_v_X = is_v_X & (slot >= 0)
    kv_head_X = tl.where(is_v_X, heads_X - num_heads - num_kv_heads, heads_X - num_heads)
    block = slot // PAGE
    position = slot % PAGE
    offset_X = block * stride_block + position * stride_token + kv_head_X * stride_head
    offset_XH = offset_X[:, None] + dims_H[None, :]
    if IS_INT8:
        scale_offset_X = (block * num_kv_heads + kv_head_X) * PAGE + position
        _store_int8(k_cache_ptr + offset_XH, k_scale_ptr + scale_offset_X, x_XH, is_k_X, is_dim_XH)
        _store_int8(v_cache_ptr + offset_XH, v_scale_ptr + scale_offset_X, x_XH, is_v_X, is_dim_XH)
    else:
        cached_XH = x_XH.to(k_cache_ptr.dtype.element_ty)
        tl.store(k_cache_ptr + offset_XH, cached_XH, is_dim_XH & is_k_X[:, None])
        tl.store(v_cache_ptr + offset_XH, cached_XH, is_dim_XH & is_v_X[:, None])


def rotary_angles(
    positions_T: Tensor, frequencies_R: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """cos_TR and sin_TR as the twin lays them out, in one tensor. A plain launch: what follows may
    read what was written before it without waiting (dependent_launch)."""
    num_tokens, half = len(positions_T), len(frequencies_R)
    assert positions_T.is_contiguous() and frequencies_R.is_contiguous(), "vectors are contiguous"
    angles_2TR = frequencies_R.new_empty((2, num_tokens, 2 * half))
    cos_TR, sin_TR = angles_2TR.unbind()
    if num_tokens > 0:
        rotary_angles_kernel[(num_tokens,)](
            positions_T,
            frequencies_R,
            cos_TR,
            sin_TR,
            scale,
            HALF=half,
            BLOCK=triton.next_power_of_2(half),
            num_warps=1,
        )
    return cos_TR, sin_TR


def rotary_and_cache(
    qkv_TMH: Tensor,
    cos_TR: Tensor,
    sin_TR: Tensor,
    k_cache_BPKH: Tensor,
    v_cache_BPKH: Tensor,
    slots_T: Tensor,
    *,
    k_scale_BKP: Tensor | None = None,
    v_scale_BKP: Tensor | None = None,
    q_TNH: Tensor | None = None,
) -> Tensor:
    """Rotate queries and keys, write keys and values to their cache slots, return q_TNH.

    Slots and angles as the twin takes them; a token whose slot is negative writes nothing to the
    cache. int8 caches need both scales, float16 [B, K, P], which are written beside the codes.
    """
    num_tokens, all_heads, head_dim = qkv_TMH.shape
    page, num_kv_heads = k_cache_BPKH.shape[1:3]
    num_heads = all_heads - 2 * num_kv_heads
    q_TNH = qkv_TMH.new_empty((num_tokens, num_heads, head_dim)) if q_TNH is None else q_TNH
    assert qkv_TMH.stride(2) == k_cache_BPKH.stride(3) == 1, "head dims are contiguous"
    assert q_TNH.is_contiguous(), "the queries' output is contiguous"
    assert k_cache_BPKH.stride() == v_cache_BPKH.stride(), "keys and values lie alike"
    assert cos_TR.stride() == sin_TR.stride() and cos_TR.stride(1) == 1, "angles lie alike"
    is_int8 = k_cache_BPKH.dtype == torch.int8
    for scale in (k_scale_BKP, v_scale_BKP):
        assert (scale is not None) == is_int8, "int8 caches, and they alone, have scales"
        assert scale is None or scale.is_contiguous(), "scales are contiguous [B, K, P]"
    if num_tokens == 0:
        return q_TNH
    heads = _ROTARY_HEADS if num_tokens > 8 else 1
    rotary_and_cache_kernel[(num_tokens, triton.cdiv(all_heads, heads))](
        qkv_TMH,
        cos_TR,
        sin_TR,
        k_cache_BPKH,
        v_cache_BPKH,
        k_scale_BKP if is_int8 else k_cache_BPKH,
        v_scale_BKP if is_int8 else v_cache_BPKH,
        slots_T,
        q_TNH,
        num_heads,
        num_kv_heads,
        qkv_TMH.stride(0),
        qkv_TMH.stride(1),
        cos_TR.stride(0),
        *k_cache_BPKH.stride()[:3],
        HEAD_DIM=head_dim,
        BLOCK_H=triton.next_power_of_2(head_dim),
        ROTATED=cos_TR.shape[1],
        PAGE=page,
        HEADS=heads,
        IS_INT8=is_int8,
        num_warps=1 if heads == 1 else 4,
        **launch_options(qkv_TMH.device),
    )
    return q_TNH


def _rotary_case(name: str, *, cache: str, head_dim: int) -> AotCase:
    integers = ("num_heads", "num_kv_heads", "qkv_stride_token", "qkv_stride_head", "angle_stride")
    return AotCase(
        name=f"rotary_and_cache_{name}",
        kernel=rotary_and_cache_kernel,
        signature={
            "qkv_ptr": "*bf16",
            "cos_ptr": "*fp32",
            "sin_ptr": "*fp32",
            "k_cache_ptr": f"*{cache}",
            "v_cache_ptr": f"*{cache}",
            "k_scale_ptr": "*fp16",
            "v_scale_ptr": "*fp16",
            "slots_ptr": "*i64",
            "q_out_ptr": "*bf16",
            **dict.fromkeys((*integers, "stride_block", "stride_token", "stride_head"), "i32"),
        },
        constexprs={
            "HEAD_DIM": head_dim,
            "BLOCK_H": triton.next_power_of_2(head_dim),
            "ROTATED": head_dim,
            "PAGE": 16,
            "HEADS": _ROTARY_HEADS,
            "IS_INT8": cache == "i8",
            "PDL": True,
        },
    )


AOT_CASES = (
    AotCase(
        name="rotary_angles",
        kernel=rotary_angles_kernel,
        signature={
            "positions_ptr": "*i64",
            "frequencies_ptr": "*fp32",
            "cos_ptr": "*fp32",
            "sin_ptr": "*fp32",
            "scale": "fp32",
        },
        constexprs={"HALF": 64, "BLOCK": 64},
        num_warps=1,
    ),
    _rotary_case("f16_128", cache="fp16", head_dim=128),
    _rotary_case("int8_80", cache="i8", head_dim=80),
)
