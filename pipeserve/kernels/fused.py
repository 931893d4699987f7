"""The small kernels between a decoder layer's products, one Triton launch each: norms and SwiGLU.

Sums are float32 whatever the tensors are. Every function takes the place of its twin in
reference.py and may write to a given output, and the output rounded to bytes or to e4m3 to given
rounded rows.

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
from pipeserve.kernels.fp8_reference import FP8_GROUP, Fp8Rows
from pipeserve.kernels.fp8_tokens import store_e4m3
from pipeserve.kernels.interleaved_rows import interleaved
from pipeserve.kernels.paired_rows import GateUpOrder
from pipeserve.kernels.quant_layout import UNIT
from pipeserve.kernels.quant_reference import QuantisedRows
from pipeserve.kernels.rounded_rows import store_rounded

_SWIGLU_BLOCK = 1024


@triton.jit
def rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    sum_ptr,
    codes_ptr,
    scales_ptr,
    sums_ptr,
    interleaved_ptr,
    eps,
    dim,
    x_stride,
    residual_stride,
    num_groups,
    BLOCK_D: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    PDL: tl.constexpr,
):
    """One token per program. The sum is rounded to its own type before the norm, as torch does,
    and the norm before its bytes are taken."""
    start_next_kernel(PDL)
    token = tl.program_id(0).to(tl.int64)
    dims_D = tl.arange(0, BLOCK_D)
    is_dim_D = dims_D < dim
    weight_D = tl.load(weight_ptr + dims_D, is_dim_D, other=0.0).to(tl.float32)
    wait_for_inputs(PDL)
    x_D = tl.load(x_ptr + token * x_stride + dims_D, is_dim_D, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        residual_ptr_D = residual_ptr + token * residual_stride + dims_D
        x_D += tl.load(residual_ptr_D, is_dim_D, other=0.0).to(tl.float32)
        sum_D = x_D.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + token * dim + dims_D, sum_D, is_dim_D)
        x_D = sum_D.to(tl.float32)
    inverse_rms = tl.rsqrt(tl.sum(x_D * x_D, 0) / dim + eps)
    out_D = (x_D * inverse_rms * weight_D).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + token * dim + dims_D, out_D, is_dim_D)
    if codes_ptr is not None and sums_ptr is None:
        store_e4m3(
            out_D.to(tl.float32), codes_ptr + token * dim, scales_ptr + token * (dim // 128), 0,
            dim, BLOCK_D,
        )  # fmt: skip
    elif codes_ptr is not None:
        store_rounded(
            out_D.to(tl.float32), codes_ptr + token * num_groups * 32,
            scales_ptr + token * num_groups, sums_ptr + token * num_groups * 2, 0, num_groups,
            BLOCK_D // 32,
        )  # fmt: skip
    if interleaved_ptr is not None:
        tl.store(interleaved_ptr + token * dim + dims_D, interleaved(out_D, BLOCK_D), is_dim_D)


@triton.jit
def paired_column(feature):
    """Where a feature's gate is among outputs as paired_rows.py orders them; up is 8 further."""
    run = feature // 16
    place = feature // 256 * 512 + run % 4 * 128 + run // 4 % 4 * 32
    return place + feature // 8 % 2 * 16 + feature % 8


@triton.jit
def swiglu_kernel(
    gate_up_ptr, out_ptr, codes_ptr, scales_ptr, sums_ptr, interleaved_ptr, dim, gate_up_stride,
    num_groups, BLOCK: tl.constexpr, PAIRED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A block of one token's features per program."""
    start_next_kernel(PDL)
    token = tl.program_id(0).to(tl.int64)
    features_F = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_feature_F = features_F < dim
    wait_for_inputs(PDL)
    gates_F = paired_column(features_F) if PAIRED else features_F
    gate_ptr_F = gate_up_ptr + token * gate_up_stride + gates_F
    gate_F = tl.load(gate_ptr_F, is_feature_F, other=0.0).to(tl.float32)
    up_F = tl.load(gate_ptr_F + (8 if PAIRED else dim), is_feature_F, other=0.0).to(tl.float32)
    out_F = (gate_F / (1.0 + tl.exp(-gate_F)) * up_F).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + token * dim + features_F, out_F, is_feature_F)
    if codes_ptr is not None and sums_ptr is None:
        store_e4m3(
            out_F.to(tl.float32), codes_ptr + token * dim, scales_ptr + token * (dim // 128),
            tl.program_id(1) * BLOCK, dim, BLOCK,
        )  # fmt: skip
    elif codes_ptr is not None:
        store_rounded(
            out_F.to(tl.float32), codes_ptr + token * num_groups * 32,
            scales_ptr + token * num_groups, sums_ptr + token * num_groups * 2,
            tl.program_id(1) * (BLOCK // 32), num_groups, BLOCK // 32,
        )  # fmt: skip
    if interleaved_ptr is not None:
        tl.store(
            interleaved_ptr + token * dim + features_F, interleaved(out_F, BLOCK), is_feature_F
        )


def rms_norm(
    x_TD: Tensor,
    weight_D: Tensor,
    eps: float,
    *,
    dtype: torch.dtype | None = None,
    out_TD: Tensor | None = None,
    rounded: QuantisedRows | Fp8Rows | None = None,
    interleaved_TD: Tensor | None = None,
) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight, in dtype or x's own; to `rounded` that in bytes or e4m3,
    to interleaved_TD the same in that order."""
    if out_TD is None:
        out_TD = torch.empty(x_TD.shape, dtype=dtype or x_TD.dtype, device=x_TD.device)
    _launch_norm(x_TD, None, weight_D, eps, out_TD, out_TD, rounded, interleaved_TD)
    return out_TD


def add_rms_norm(
    x_TD: Tensor,
    residual_TD: Tensor,
    weight_D: Tensor,
    eps: float,
    *,
    out_TD: Tensor | None = None,
    sum_TD: Tensor | None = None,
    rounded: QuantisedRows | Fp8Rows | None = None,
    interleaved_TD: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The norm of x + residual, and x + residual itself in the residual's type.

    sum_TD may be residual_TD: it is then updated in place. `rounded` and interleaved_TD as for
    rms_norm.
    """
    out_TD = _empty(x_TD.shape, x_TD) if out_TD is None else out_TD
    sum_TD = _empty(x_TD.shape, residual_TD) if sum_TD is None else sum_TD
    _launch_norm(x_TD, residual_TD, weight_D, eps, out_TD, sum_TD, rounded, interleaved_TD)
    return out_TD, sum_TD


def swiglu(
    gate_up_TF: Tensor,
    *,
    order: GateUpOrder = "halves",
    out_TF: Tensor | None = None,
    rounded: QuantisedRows | Fp8Rows | None = None,
    interleaved_TF: Tensor | None = None,
) -> Tensor:
    """silu(gate) * up of [T, 2F] in this order; `rounded` and interleaved_TF as for rms_norm."""
    num_tokens, twice = gate_up_TF.shape
    dim = twice // 2
    out_TF = _empty((num_tokens, dim), gate_up_TF) if out_TF is None else out_TF
    assert gate_up_TF.stride(1) == 1 and out_TF.is_contiguous(), "rows are contiguous"
    if num_tokens == 0:
        return out_TF
    swiglu_kernel[(num_tokens, triton.cdiv(dim, _SWIGLU_BLOCK))](
        gate_up_TF,
        out_TF,
        *_pointers(rounded, dim),
        interleaved_TF,
        dim,
        gate_up_TF.stride(0),
        _num_groups(dim),
        BLOCK=_SWIGLU_BLOCK,
        PAIRED=order == "paired",
        num_warps=4,
        **launch_options(gate_up_TF.device),
    )
    return out_TF


def _empty(shape: tuple[int, ...], like: Tensor) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device)


def _num_groups(num_columns: int) -> int:
    """Groups of 32 that rounded rows have."""
    return -(-num_columns // UNIT) * 2


def _pointers(
    rounded: QuantisedRows | Fp8Rows | None, num_columns: int
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """What a kernel writes rounded rows to, if it does."""
    if rounded is None:
        return None, None, None
    is_e4m3 = isinstance(rounded, Fp8Rows)
    num_groups = num_columns // FP8_GROUP if is_e4m3 else _num_groups(num_columns)
    assert rounded.scales_TG.shape[1] == num_groups, "rounded rows do not fit"
    return rounded.tensors


def _launch_norm(
    x_TD: Tensor,
    residual_TD: Tensor | None,
    weight_D: Tensor,
    eps: float,
    out_TD: Tensor,
    sum_TD: Tensor,
    rounded: QuantisedRows | Fp8Rows | None,
    interleaved_TD: Tensor | None,
) -> None:
    num_tokens, dim = x_TD.shape
    assert x_TD.stride(1) == 1 and weight_D.is_contiguous(), "the model dim is contiguous"
    assert residual_TD is None or residual_TD.stride(1) == 1, "the model dim is contiguous"
    assert out_TD.is_contiguous() and sum_TD.is_contiguous(), "outputs are contiguous"
    if num_tokens == 0:
        return
    block = max(FP8_GROUP, triton.next_power_of_2(dim))
    rms_norm_kernel[(num_tokens,)](
        x_TD,
        x_TD if residual_TD is None else residual_TD,
        weight_D,
        out_TD,
        sum_TD,
        *_pointers(rounded, dim),
        interleaved_TD,
        eps,
        dim,
        x_TD.stride(0),
        0 if residual_TD is None else residual_TD.stride(0),
        _num_groups(dim),
        BLOCK_D=block,
        HAS_RESIDUAL=residual_TD is not None,
        num_warps=min(16, max(1, block // 512)),
        **launch_options(x_TD.device),
    )


_ROUNDED = {"codes_ptr": "*i8", "scales_ptr": "*fp32", "sums_ptr": "*i16"}
_INTERLEAVED = {"interleaved_ptr": "*fp16"}
_E4M3 = {"codes_ptr": "*u8", "scales_ptr": "*fp32"}


def _norm_case(name: str, *, out: str, forms: dict[str, str]) -> AotCase:
    absent = dict.fromkeys(set(_ROUNDED | _INTERLEAVED) - set(forms))
    return AotCase(
        name=name,
        kernel=rms_norm_kernel,
        signature={
            "x_ptr": f"*{out}",
            "residual_ptr": "*fp32",
            "weight_ptr": "*fp32",
            "out_ptr": f"*{out}",
            "sum_ptr": "*fp32",
            **forms,
            "eps": "fp32",
            **dict.fromkeys(("dim", "x_stride", "residual_stride", "num_groups"), "i32"),
        },
        constexprs={"BLOCK_D": 4096, "HAS_RESIDUAL": True, "PDL": True, **absent},
        num_warps=8,
    )


def _swiglu_case(name: str, *, out: str, forms: dict[str, str], is_paired: bool = False) -> AotCase:
    absent = dict.fromkeys(set(_ROUNDED | _INTERLEAVED) - set(forms))
    return AotCase(
        name=name,
        kernel=swiglu_kernel,
        signature={
            "gate_up_ptr": f"*{out}",
            "out_ptr": f"*{out}",
            **forms,
            **dict.fromkeys(("dim", "gate_up_stride", "num_groups"), "i32"),
        },
        constexprs={"BLOCK": _SWIGLU_BLOCK, "PAIRED": is_paired, "PDL": True, **absent},
    )


AOT_CASES = (
    _norm_case("add_rms_norm", out="bf16", forms={}),
    _norm_case("add_rms_norm_rounded", out="fp16", forms=_ROUNDED),
    _norm_case("add_rms_norm_forms", out="fp16", forms=_ROUNDED | _INTERLEAVED),
    _norm_case("add_rms_norm_e4m3", out="bf16", forms=_E4M3),
    _swiglu_case("swiglu", out="bf16", forms={}),
    _swiglu_case("swiglu_e4m3", out="bf16", forms=_E4M3),
    _swiglu_case("swiglu_rounded", out="fp16", forms=_ROUNDED),
    _swiglu_case("swiglu_interleaved", out="fp16", forms=_INTERLEAVED),
    _swiglu_case("swiglu_paired", out="fp16", forms=_ROUNDED, is_paired=True),
)
