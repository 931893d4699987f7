"""Activations as 8-bit floats (e4m3): how they are rounded, and by whom.

The kernels that compute activations write them beside the floats where a product of few rows of
8-bit floats follows, which saves a launch per product: each 128 columns by a scale of their own,
since no program has the whole of a token. quantise_tokens makes them of any tensor by a scale per
token. The bits come by integer arithmetic, so that it runs anywhere. Launched by the stage thread,
capturable in a CUDA graph. Twin: fp8_reference.quantise_tokens.

Shapes: T tokens, K inputs, G groups of columns.
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
from pipeserve.kernels.fp8_reference import Fp8Rows
from pipeserve.kernels.quant_split import has_ptx


@triton.jit
def _e4m3_bits(magnitude):
    """The code of a float32 from 0 to 448, rounded to nearest, ties to even.

    A normal one is the float's own top bits with another bias of the exponent (127 - 7). Below
    2^-6 codes count steps of 2^-9; adding 1.5 * 2^23 rounds to whole ones.
    """
    bits = magnitude.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    steps = (magnitude * 512.0 + 12582912.0) - 12582912.0
    return tl.where(magnitude < 0.015625, steps.to(tl.int32), normal)


@triton.jit
def _token_codes(value, peak, ASM: tl.constexpr):
    """_e4m3_codes; with ASM by the instruction that such cards have, to the same bits."""
    if ASM:
        return tl.inline_asm_elementwise(
            "{ .reg .b16 low, high;\n\t"
            "cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;\n\t"
            "cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;\n\t"
            "mov.b32 $0, {low, high}; }",
            "=r,f,f,f,f", [value * (448.0 / peak)], dtype=tl.uint8, is_pure=True, pack=4,
        )  # fmt: skip
    return _e4m3_codes(value, peak)


@triton.jit
def _e4m3_codes(value, peak):
    """Of float32 values, given the largest magnitude that shares their scale."""
    magnitude = tl.minimum(tl.abs(value) * (448.0 / peak), 448.0)
    sign = (value.to(tl.int32, bitcast=True) >> 24) & 0x80
    return (_e4m3_bits(magnitude) | sign).to(tl.uint8)


@triton.jit
def store_e4m3(value_K, codes, scales, first_column, num_columns, COLUMNS: tl.constexpr):
    """Write COLUMNS float32 values of one token, 0 past its columns, from first_column on.

    The pointers are those of the token's row; all counts are multiples of 128.
    """
    value = tl.reshape(value_K, (COLUMNS // 128, 128))
    peak = tl.maximum(tl.max(tl.abs(value), 1), 1e-10)
    group = first_column // 128 + tl.arange(0, COLUMNS // 128)
    column = group[:, None] * 128 + tl.arange(0, 128)[None, :]
    tl.store(codes + column, _e4m3_codes(value, peak[:, None]), mask=column < num_columns)
    tl.store(scales + group, peak * (1 / 448.0), mask=group * 128 < num_columns)


@triton.jit
def store_token(value_K, codes, scales, token, num_columns, BLOCK: tl.constexpr, ASM: tl.constexpr):
    """Write one token's float32 values, 0 past its columns, by one scale."""
    peak = tl.maximum(tl.max(tl.abs(value_K), 0), 1e-10)
    column = tl.arange(0, BLOCK)
    code_K = _token_codes(value_K, peak, ASM)
    tl.store(codes + token * num_columns + column, code_K, mask=column < num_columns)
    tl.store(scales + token, peak * (1 / 448.0))


@triton.jit
def quantise_tokens_kernel(
    x, codes, scales, num_columns, x_stride, BLOCK_K: tl.constexpr, ASM: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One token per program. Constants are those of fp8_reference: LEAST_PEAK and LARGEST."""
    start_next_kernel(PDL)
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_K)
    wait_for_inputs(PDL)
    value = tl.load(x + token * x_stride + column, mask=column < num_columns, other=0)
    store_token(value.to(tl.float32), codes, scales, token, num_columns, BLOCK_K, ASM)


def empty_rows(num_tokens: int, num_columns: int, group: int, device: torch.device) -> Fp8Rows:
    """Room for a kernel to write to, with a scale per so many columns."""
    assert num_columns % group == 0, f"{num_columns} columns are no multiple of {group}"
    shape = (num_tokens, num_columns)
    scales_TG = torch.empty((num_tokens, num_columns // group), dtype=torch.float32, device=device)
    return Fp8Rows(
        codes_TK=torch.empty(shape, dtype=torch.float8_e4m3fn, device=device), scales_TG=scales_TG
    )


def quantise_tokens(x_TK: Tensor) -> Fp8Rows:
    """Rows of unit stride and any float type, by a scale per token."""
    num_tokens, num_columns = x_TK.shape
    assert x_TK.stride(1) == 1, f"activations have column stride {x_TK.stride(1)}"
    rows = empty_rows(num_tokens, num_columns, num_columns, x_TK.device)
    block = triton.next_power_of_2(num_columns)
    quantise_tokens_kernel[(num_tokens,)](
        x_TK, rows.codes_TK.view(torch.uint8), rows.scales_TG, num_columns, x_TK.stride(0),
        BLOCK_K=block, ASM=has_ptx(x_TK.device), num_warps=min(16, max(1, block // 512)),
        **launch_options(x_TK.device),
    )  # fmt: skip
    return rows


AOT_CASES: tuple[AotCase, ...] = tuple(
    AotCase(
        name=f"quantise_tokens_{dtype}_{block}",
        kernel=quantise_tokens_kernel,
        signature={
            "x": f"*{dtype}",
            "codes": "*u8",
            "scales": "*fp32",
            "num_columns": "i32:16",
            "x_stride": "i32:16",
        },
        constexprs={"BLOCK_K": block, "ASM": True, "PDL": True},
        num_warps=num_warps,
        needs_e4m3=True,
    )
    for dtype, block, num_warps in (("bf16", 4096, 8), ("bf16", 32768, 16), ("fp32", 1024, 2))
)
