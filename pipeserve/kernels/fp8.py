"""Products of 8-bit floats: few rows by kernels of ours, many by torch.

Launched by the stage thread, capturable in a CUDA graph. Takes a card of compute capability 8.9 or
later. Twin: fp8_reference.fp8_linear.

Shapes: T tokens, N outputs, K inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeserve.kernels.fp8_mma import (
    choose_fp8_tiling,
    fp8_mma,
    has_few_outputs,
    why_not_loaded,
)
from pipeserve.kernels.fp8_reference import Fp8Rows, Fp8Weight
from pipeserve.kernels.fp8_rows import multiply_rows
from pipeserve.kernels.fp8_tokens import quantise_tokens
from pipeserve.kernels.quant_reference import LinearInput, PreparedRows, values_of
from pipeserve.kernels.quant_split import card_limits

FEW_ROWS = 128
"""Up to so many our kernels multiply, where their scales are grouped or outputs are few."""
WIDE_ROWS = 64
"""Up to so many by a matrix of many outputs: at 128 torch takes 40 us for 28672x4096 on an H200,
ours 46."""


def fp8_linear(x: LinearInput, weight: Fp8Weight, bias_N: Tensor | None) -> Tensor:
    """x W^T + b [T, N] in bf16."""
    rows = x.e4m3 if isinstance(x, PreparedRows) else x if isinstance(x, Fp8Rows) else None
    if rows is None:
        rows = quantise_tokens(values_of(x))
    num_tokens, device = rows.codes_TK.shape[0], rows.codes_TK.device
    num_rows, num_columns = weight.codes_NK.shape
    multiprocessors = card_limits(device).num_multiprocessors
    is_wide = not rows.is_grouped and not has_few_outputs(num_rows, multiprocessors)
    if num_tokens > (WIDE_ROWS if is_wide else FEW_ROWS):
        return multiply_many(rows, weight, bias_N)
    tiling = choose_fp8_tiling(
        num_rows, num_columns, num_tokens, multiprocessors, is_grouped=rows.is_grouped
    )
    if why_not_loaded(tiling.variant, device) is None:
        return fp8_mma(rows, weight, bias_N, tiling=tiling)
    return multiply_rows(rows, weight, bias_N)


def multiply_many(x: Fp8Rows, weight: Fp8Weight, bias_N: Tensor | None) -> Tensor:
    """x W^T + b [T, N] in bf16, of rows with a scale per token, by torch.

    Fast accumulation keeps sums in the tensor cores' own width, some 13 bits below the largest
    term, instead of moving them to float32 registers every few steps: that error is far below
    e4m3's own rounding by up to 1/16, and the product is faster.
    """
    out_TN = torch._scaled_mm(
        x.codes_TK,
        weight.codes_NK.t(),
        scale_a=x.scales_TG,
        scale_b=weight.scales_1N,
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
    return out_TN if bias_N is None else out_TN.add_(bias_N)
