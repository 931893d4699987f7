"""Products of 8-bit floats: activations rounded per token, few rows multiplied by a kernel of
ours, many by torch.

Launched by the stage thread, capturable in a CUDA graph. The product needs a card of compute
capability 8.9 or later; the kernel itself makes the bits by integer arithmetic and runs anywhere.
Twins: fp8_reference.

Shapes: T tokens, N outputs, K inputs.
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
from pipeserve.kernels.fp8_reference import Fp8Weight
from pipeserve.kernels.fp8_rows import MAX_ROWS, multiply_rows


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
def quantise_tokens_kernel(
    x, codes, scales, num_columns, x_stride, BLOCK_K: tl.constexpr, PDL: tl.constexpr
):
    """One token per program. Constants are those of fp8_reference: LEAST_PEAK and LARGEST."""
    start_next_kernel(PDL)
    wait_for_inputs(PDL)
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_K)
    inside = column < num_columns
    value = tl.load(x + token * x_stride + column, mask=inside, other=0).to(tl.float32)
    peak = tl.maximum(tl.max(tl.abs(value), 0), 1e-10)
    magnitude = tl.minimum(tl.abs(value) * (448.0 / peak), 448.0)
    sign = (value.to(tl.int32, bitcast=True) >> 24) & 0x80
    code = (_e4m3_bits(magnitude) | sign).to(tl.uint8)
    tl.store(codes + token * num_columns + column, code, mask=inside)
    tl.store(scales + token, peak * (1 / 448.0))


def quantise_tokens(x_TK: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of unit stride to e4m3 [T, K], each by its own float32 scale [T, 1]."""
    num_tokens, num_columns = x_TK.shape
    assert x_TK.stride(1) == 1, f"activations have column stride {x_TK.stride(1)}"
    codes_TK = torch.empty((num_tokens, num_columns), dtype=torch.uint8, device=x_TK.device)
    scales_T1 = torch.empty((num_tokens, 1), dtype=torch.float32, device=x_TK.device)
    block = triton.next_power_of_2(num_columns)
    quantise_tokens_kernel[(num_tokens,)](
        x_TK, codes_TK, scales_T1, num_columns, x_TK.stride(0), BLOCK_K=block,
        num_warps=min(16, max(1, block // 512)), **launch_options(x_TK.device),
    )  # fmt: skip
    return codes_TK.view(torch.float8_e4m3fn), scales_T1


def fp8_linear(x_TK: Tensor, weight: Fp8Weight, bias_N: Tensor | None) -> Tensor:
    """x W^T + b [T, N] in bf16."""
    codes_TK, scales_T1 = quantise_tokens(x_TK)
    if codes_TK.shape[0] <= MAX_ROWS:
        return multiply_rows(codes_TK, scales_T1, weight, bias_N)
    return multiply_many(codes_TK, scales_T1, weight, bias_N)


def multiply_many(
    codes_TK: Tensor, scales_T1: Tensor, weight: Fp8Weight, bias_N: Tensor | None
) -> Tensor:
    """x W^T + b [T, N] in bf16, of x as quantise_tokens leaves it, by torch.

    Fast accumulation keeps sums in the tensor cores' own width, some 13 bits below the largest
    term, instead of moving them to float32 registers every few steps: that error is far below
    e4m3's own rounding by up to 1/16, and the product is faster.
    """
    out_TN = torch._scaled_mm(
        codes_TK,
        weight.codes_NK.t(),
        scale_a=scales_T1,
        scale_b=weight.scales_1N,
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
    return out_TN if bias_N is None else out_TN.add_(bias_N)


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
        constexprs={"BLOCK_K": block, "PDL": True},
        num_warps=num_warps,
    )
    for dtype, block, num_warps in (("bf16", 4096, 8), ("bf16", 32768, 16), ("fp32", 1024, 2))
)
