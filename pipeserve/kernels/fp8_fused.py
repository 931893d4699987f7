"""Norm and SwiGLU of many tokens, straight to 8-bit floats by a scale per token: what products of
prefill take, without a launch to round them and without the floats.

Launched by the stage thread, capturable in a CUDA graph. Every function gives what rounding the
output of its namesake in fused.py gives. For cards of compute capability 8.9 or later.

Shapes: T tokens, D model dim, F feed-forward dim.
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
from pipeserve.kernels.fp8_reference import Fp8Rows
from pipeserve.kernels.fp8_tokens import empty_rows, store_token
from pipeserve.kernels.quant_split import has_ptx

_VALUES_PER_WARP = 512
_MOST_WARPS = 16


@triton.jit
def add_rms_norm_e4m3_kernel(
    x, residual, weight, codes, scales, sums, eps, dim, x_stride, residual_stride,
    BLOCK: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One token per program; the norm is rounded to x's type first."""
    start_next_kernel(PDL)
    token = tl.program_id(0).to(tl.int64)
    dims_D = tl.arange(0, BLOCK)
    is_dim_D = dims_D < dim
    weight_D = tl.load(weight + dims_D, is_dim_D, other=0.0).to(tl.float32)
    wait_for_inputs(PDL)
    x_D = tl.load(x + token * x_stride + dims_D, is_dim_D, other=0.0).to(tl.float32)
    x_D += tl.load(residual + token * residual_stride + dims_D, is_dim_D, other=0.0)
    tl.store(sums + token * dim + dims_D, x_D, is_dim_D)
    inverse_rms = tl.rsqrt(tl.sum(x_D * x_D, 0) / dim + eps)
    out_D = (x_D * inverse_rms * weight_D).to(x.dtype.element_ty).to(tl.float32)
    store_token(out_D, codes, scales, token, dim, BLOCK, ASM)


@triton.jit
def swiglu_e4m3_kernel(
    gate_up, codes, scales, dim, gate_up_stride, BLOCK: tl.constexpr, ASM: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One token per program; the product is rounded to gate_up's type first."""
    start_next_kernel(PDL)
    token = tl.program_id(0).to(tl.int64)
    features_F = tl.arange(0, BLOCK)
    is_feature_F = features_F < dim
    wait_for_inputs(PDL)
    gate_ptr_F = gate_up + token * gate_up_stride + features_F
    gate_F = tl.load(gate_ptr_F, is_feature_F, other=0.0).to(tl.float32)
    up_F = tl.load(gate_ptr_F + dim, is_feature_F, other=0.0).to(tl.float32)
    out_F = (gate_F / (1.0 + tl.exp(-gate_F)) * up_F).to(gate_up.dtype.element_ty)
    store_token(out_F.to(tl.float32), codes, scales, token, dim, BLOCK, ASM)


def add_rms_norm(
    x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float
) -> tuple[Fp8Rows, Tensor]:
    """The norm of x + residual, which is float32, and x + residual itself."""
    num_tokens, dim = x_TD.shape
    assert x_TD.stride(1) == residual_TD.stride(1) == 1, "the model dim is contiguous"
    assert residual_TD.dtype == torch.float32, f"the residual stream is {residual_TD.dtype}"
    rows = empty_rows(num_tokens, dim, dim, x_TD.device)
    sum_TD = torch.empty((num_tokens, dim), dtype=torch.float32, device=x_TD.device)
    block = triton.next_power_of_2(dim)
    add_rms_norm_e4m3_kernel[(num_tokens,)](
        x_TD, residual_TD, weight_D, rows.codes_TK.view(torch.uint8), rows.scales_TG, sum_TD, eps,
        dim, x_TD.stride(0), residual_TD.stride(0), **_launch(block, x_TD.device),
    )  # fmt: skip
    return rows, sum_TD


def swiglu(gate_up_TF: Tensor) -> Fp8Rows:
    """silu(gate) * up of [T, 2F], whose first half is gate."""
    num_tokens, twice = gate_up_TF.shape
    dim = twice // 2
    assert gate_up_TF.stride(1) == 1, "rows are contiguous"
    rows = empty_rows(num_tokens, dim, dim, gate_up_TF.device)
    swiglu_e4m3_kernel[(num_tokens,)](
        gate_up_TF, rows.codes_TK.view(torch.uint8), rows.scales_TG, dim, gate_up_TF.stride(0),
        **_launch(triton.next_power_of_2(dim), gate_up_TF.device),
    )  # fmt: skip
    return rows


def _launch(block: int, device: torch.device) -> dict[str, object]:
    num_warps = min(_MOST_WARPS, max(1, block // _VALUES_PER_WARP))
    options = launch_options(device)
    return {"BLOCK": block, "ASM": has_ptx(device), "num_warps": num_warps, **options}


AOT_CASES = (
    AotCase(
        name="add_rms_norm_e4m3_tokens",
        kernel=add_rms_norm_e4m3_kernel,
        signature={
            "x": "*bf16",
            "residual": "*fp32",
            "weight": "*fp32",
            "codes": "*u8",
            "scales": "*fp32",
            "sums": "*fp32",
            "eps": "fp32",
            **dict.fromkeys(("dim", "x_stride", "residual_stride"), "i32:16"),
        },
        constexprs={"BLOCK": 4096, "ASM": True, "PDL": True},
        num_warps=8,
        needs_e4m3=True,
    ),
    AotCase(
        name="swiglu_e4m3_tokens",
        kernel=swiglu_e4m3_kernel,
        signature={
            "gate_up": "*bf16",
            "codes": "*u8",
            "scales": "*fp32",
            **dict.fromkeys(("dim", "gate_up_stride"), "i32:16"),
        },
        constexprs={"BLOCK": 16384, "ASM": True, "PDL": True},
        num_warps=16,
        needs_e4m3=True,
    ),
)
