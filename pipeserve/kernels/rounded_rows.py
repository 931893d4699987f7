"""Activations as bytes for products with few rows: how they are rounded, and by whom.

The kernels that compute activations write the bytes beside the floats where a product with few rows
follows, which saves a launch per product; quantise_rows makes them of any tensor. Launched by the
stage thread, capturable in a CUDA graph. Twin: quant_reference.quantise_rows.

Shapes: T tokens, K inputs padded to blocks of 64, G groups of 32.
"""

# Triton's decorator and its functions' arguments have no types to annotate.
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
from pipeserve.kernels.quant_layout import UNIT
from pipeserve.kernels.quant_reference import ACTIVATION_GROUP, QuantisedRows

_GROUPS = 32
"""Of 32 columns, per program of quantise_rows."""


@triton.jit
def store_rounded(value_K, codes, scales, sums, first_group, num_groups, GROUPS: tl.constexpr):
    """Write GROUPS * 32 float32 values of one token, 0 past its columns, from first_group on.

    The pointers are those of the token's row, which has num_groups groups.
    """
    group = first_group + tl.arange(0, GROUPS)
    value = tl.reshape(value_K, (GROUPS, 32))
    scale = tl.max(tl.abs(value), axis=1) * (1 / 127)
    inverse = 1 / tl.where(scale > 1e-30, scale, 1.0)  # smaller ones have no reciprocal: code 0
    code = tl.floor(value * inverse[:, None] + 0.5).to(tl.int8)
    column = group[:, None] * 32 + tl.arange(0, 32)[None, :]
    tl.store(codes + column, code, mask=column < num_groups * 32)
    tl.store(scales + group, scale, mask=group < num_groups)
    half_sums = tl.sum(tl.reshape(code.to(tl.int32), (GROUPS, 2, 16)), axis=2)
    half = group[:, None] * 2 + tl.arange(0, 2)[None, :]
    tl.store(sums + half, half_sums.to(tl.int16), mask=half < num_groups * 2)


@triton.jit
def quantise_rows_kernel(
    x, codes, scales, sums, num_columns, x_stride, num_groups, GROUPS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One program: GROUPS times 32 columns of one token."""
    start_next_kernel(PDL)
    token = tl.program_id(0).to(tl.int64)
    first_group = tl.program_id(1) * GROUPS
    column = first_group * 32 + tl.arange(0, GROUPS * 32)
    wait_for_inputs(PDL)
    value = tl.load(x + token * x_stride + column, mask=column < num_columns, other=0)
    store_rounded(
        value.to(tl.float32), codes + token * num_groups * 32, scales + token * num_groups,
        sums + token * num_groups * 2, first_group, num_groups, GROUPS,
    )  # fmt: skip


def empty_rows(num_tokens: int, num_columns: int, device: torch.device) -> QuantisedRows:
    """Room for a kernel to write to."""
    padded = -(-num_columns // UNIT) * UNIT

    def empty(per_value: int, dtype: torch.dtype) -> Tensor:
        return torch.empty((num_tokens, padded // per_value), dtype=dtype, device=device)

    return QuantisedRows(
        codes_TK=empty(1, torch.int8),
        scales_TG=empty(ACTIVATION_GROUP, torch.float32),
        sums_TG=empty(16, torch.int16),
    )


def quantise_rows(x_TK: Tensor) -> QuantisedRows:
    """[T, K] of any float type, rows of unit stride -> bytes for gemv."""
    num_tokens, num_columns = x_TK.shape
    assert x_TK.stride(1) == 1, f"activations have column stride {x_TK.stride(1)}"
    rows = empty_rows(num_tokens, num_columns, x_TK.device)
    num_groups = rows.scales_TG.shape[1]
    quantise_rows_kernel[(num_tokens, triton.cdiv(num_groups, _GROUPS))](
        x_TK, rows.codes_TK, rows.scales_TG, rows.sums_TG, num_columns, x_TK.stride(0),
        num_groups, GROUPS=_GROUPS, **launch_options(x_TK.device),
    )  # fmt: skip
    return rows


AOT_CASES: tuple[AotCase, ...] = (
    AotCase(
        name="quantise_rows",
        kernel=quantise_rows_kernel,
        signature={
            "x": "*bf16",
            "codes": "*i8",
            "scales": "*fp32",
            "sums": "*i16",
            **dict.fromkeys(("num_columns", "x_stride", "num_groups"), "i32:16"),
        },
        constexprs={"GROUPS": _GROUPS, "PDL": True},
    ),
)
