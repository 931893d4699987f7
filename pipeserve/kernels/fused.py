"""The small kernels of a decoder layer, one Triton launch each: norms, rotary and KV, SwiGLU.

Sums and angles are float32 whatever the tensors are. Every function takes the place of its twin in
reference.py (reference_attention.py where the cache is int8) and may write to a given output.

Shapes: T tokens, D model dim, F feed-forward dim, N query heads, K kv heads, H head dim, M = N + 2K
heads of a fused projection, R rotated part of H, B blocks, P position in block.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-decorators=False
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pipeserve.kernels.aot import AotCase

_SWIGLU_BLOCK = 1024
_ROTARY_HEADS = 8
"""Heads per program of the rotary kernel."""


@triton.jit
def rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    sum_ptr,
    eps,
    dim,
    x_stride,
    residual_stride,
    BLOCK_D: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    """One token per program. The sum is rounded to its own type before the norm, as torch does."""
    token = tl.program_id(0).to(tl.int64)
    dims_D = tl.arange(0, BLOCK_D)
    is_dim_D = dims_D < dim
    x_D = tl.load(x_ptr + token * x_stride + dims_D, is_dim_D, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        residual_ptr_D = residual_ptr + token * residual_stride + dims_D
        x_D += tl.load(residual_ptr_D, is_dim_D, other=0.0).to(tl.float32)
        sum_D = x_D.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + token * dim + dims_D, sum_D, is_dim_D)
        x_D = sum_D.to(tl.float32)
    weight_D = tl.load(weight_ptr + dims_D, is_dim_D, other=0.0).to(tl.float32)
    inverse_rms = tl.rsqrt(tl.sum(x_D * x_D, 0) / dim + eps)
    out_D = x_D * inverse_rms * weight_D
    tl.store(out_ptr + token * dim + dims_D, out_D.to(out_ptr.dtype.element_ty), is_dim_D)


@triton.jit
def swiglu_kernel(gate_up_ptr, out_ptr, dim, gate_up_stride, BLOCK: tl.constexpr):
    """A block of one token's features per program."""
    token = tl.program_id(0).to(tl.int64)
    features_F = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_feature_F = features_F < dim
    gate_ptr_F = gate_up_ptr + token * gate_up_stride + features_F
    gate_F = tl.load(gate_ptr_F, is_feature_F, other=0.0).to(tl.float32)
    up_F = tl.load(gate_ptr_F + dim, is_feature_F, other=0.0).to(tl.float32)
    out_F = gate_F / (1.0 + tl.exp(-gate_F)) * up_F
    tl.store(out_ptr + token * dim + features_F, out_F.to(out_ptr.dtype.element_ty), is_feature_F)


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
):
    """HEADS heads of one token: entry i of the rotated part turns with entry i + R/2."""
    token = tl.program_id(0).to(tl.int64)
    heads_X = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    dims_H = tl.arange(0, BLOCK_H)
    is_dim_XH = (heads_X < num_heads + 2 * num_kv_heads)[:, None] & (dims_H < HEAD_DIM)[None, :]
    is_q_X = heads_X < num_heads
    is_k_X = (heads_X >= num_heads) & (heads_X < num_heads + num_kv_heads)
    is_v_X = (heads_X >= num_heads + num_kv_heads) & (heads_X < num_heads + 2 * num_kv_heads)

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


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float, *, out_TD: Tensor | None = None) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight."""
    out_TD = _empty(x_TD.shape, x_TD) if out_TD is None else out_TD
    _launch_norm(x_TD, None, weight_D, eps, out_TD, out_TD)
    return out_TD


def add_rms_norm(
    x_TD: Tensor,
    residual_TD: Tensor,
    weight_D: Tensor,
    eps: float,
    *,
    out_TD: Tensor | None = None,
    sum_TD: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The norm of x + residual, and x + residual itself in the residual's type.

    sum_TD may be residual_TD: it is then updated in place.
    """
    out_TD = _empty(x_TD.shape, x_TD) if out_TD is None else out_TD
    sum_TD = _empty(x_TD.shape, residual_TD) if sum_TD is None else sum_TD
    _launch_norm(x_TD, residual_TD, weight_D, eps, out_TD, sum_TD)
    return out_TD, sum_TD


def swiglu(gate_up_TF: Tensor, *, out_TF: Tensor | None = None) -> Tensor:
    """silu(gate) * up of [T, 2F], whose first half is gate."""
    num_tokens, twice = gate_up_TF.shape
    dim = twice // 2
    out_TF = _empty((num_tokens, dim), gate_up_TF) if out_TF is None else out_TF
    assert gate_up_TF.stride(1) == 1 and out_TF.is_contiguous(), "rows are contiguous"
    if num_tokens == 0:
        return out_TF
    swiglu_kernel[(num_tokens, triton.cdiv(dim, _SWIGLU_BLOCK))](
        gate_up_TF, out_TF, dim, gate_up_TF.stride(0), BLOCK=_SWIGLU_BLOCK, num_warps=4
    )
    return out_TF


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
    q_TNH = _empty((num_tokens, num_heads, head_dim), qkv_TMH) if q_TNH is None else q_TNH
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
    )
    return q_TNH


def _empty(shape: tuple[int, ...], like: Tensor) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device)


def _launch_norm(
    x_TD: Tensor,
    residual_TD: Tensor | None,
    weight_D: Tensor,
    eps: float,
    out_TD: Tensor,
    sum_TD: Tensor,
) -> None:
    num_tokens, dim = x_TD.shape
    assert x_TD.stride(1) == 1 and weight_D.is_contiguous(), "the model dim is contiguous"
    assert residual_TD is None or residual_TD.stride(1) == 1, "the model dim is contiguous"
    assert out_TD.is_contiguous() and sum_TD.is_contiguous(), "outputs are contiguous"
    if num_tokens == 0:
        return
    block = triton.next_power_of_2(dim)
    rms_norm_kernel[(num_tokens,)](
        x_TD,
        x_TD if residual_TD is None else residual_TD,
        weight_D,
        out_TD,
        sum_TD,
        eps,
        dim,
        x_TD.stride(0),
        0 if residual_TD is None else residual_TD.stride(0),
        BLOCK_D=block,
        HAS_RESIDUAL=residual_TD is not None,
        num_warps=min(16, max(1, block // 512)),
    )


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
        },
    )


AOT_CASES = (
    AotCase(
        name="add_rms_norm",
        kernel=rms_norm_kernel,
        signature={
            "x_ptr": "*bf16",
            "residual_ptr": "*bf16",
            "weight_ptr": "*fp32",
            "out_ptr": "*bf16",
            "sum_ptr": "*bf16",
            "eps": "fp32",
            **dict.fromkeys(("dim", "x_stride", "residual_stride"), "i32"),
        },
        constexprs={"BLOCK_D": 4096, "HAS_RESIDUAL": True},
        num_warps=8,
    ),
    AotCase(
        name="swiglu",
        kernel=swiglu_kernel,
        signature={
            "gate_up_ptr": "*bf16",
            "out_ptr": "*bf16",
            "dim": "i32",
            "gate_up_stride": "i32",
        },
        constexprs={"BLOCK": _SWIGLU_BLOCK},
    ),
    _rotary_case("f16_128", cache="fp16", head_dim=128),
    _rotary_case("int8_80", cache="i8", head_dim=80),
)
