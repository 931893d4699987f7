"""Rows of activations in the order of columns in which quant_mma.cu multiplies.

Of 256 columns each of the four threads of a quad has 64 neighbours (quant_mma_unpack.cu): the
column 64 q + 32 n + 4 w + 2 e + h lies at 32 w + 16 n + 8 h + 2 q + e, with q below 4, w below 8
and the others below 2. The kernels that compute activations write them in this order beside the
plain one where such a product follows; interleave_rows does it for any tensor. Launched by the
stage thread, capturable in a CUDA graph. Twin: quant_reference.interleave_rows.

Shapes: T tokens, K inputs.
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

INTERLEAVED_COLUMNS = 256
_BLOCK = 1024


@triton.jit
def interleaved(value_K, COLUMNS: tl.constexpr):
    """A block of whole 256 columns in their new order."""
    value = tl.reshape(value_K, (COLUMNS // 256, 4, 2, 8, 2, 2))
    return tl.reshape(tl.permute(value, (0, 3, 2, 5, 1, 4)), (COLUMNS,))


@triton.jit
def interleaved_column(column):
    """Where a column lies then."""
    unit = (column >> 6) & 3
    pair = ((column & 31) >> 2) * 32 + ((column >> 5) & 1) * 16 + (column & 1) * 8
    return (column & ~255) + pair + unit * 2 + ((column >> 1) & 1)


@triton.jit
def interleave_rows_kernel(
    x_ptr, out_ptr, num_columns, x_stride, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    """A block of one token's columns per program."""
    start_next_kernel(PDL)
    token = tl.program_id(0).to(tl.int64)
    columns_K = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_column_K = columns_K < num_columns
    wait_for_inputs(PDL)
    value_K = tl.load(x_ptr + token * x_stride + columns_K, is_column_K, other=0.0)
    tl.store(out_ptr + token * num_columns + columns_K, interleaved(value_K, BLOCK), is_column_K)


def interleave_rows(x_TK: Tensor) -> Tensor:
    """x [T, K] with its columns reordered; K is a multiple of 256."""
    num_tokens, num_columns = x_TK.shape
    assert num_columns % INTERLEAVED_COLUMNS == 0, f"{num_columns} columns"
    assert x_TK.stride(1) == 1, "rows are contiguous"
    out_TK = torch.empty((num_tokens, num_columns), dtype=x_TK.dtype, device=x_TK.device)
    if num_tokens == 0:
        return out_TK
    interleave_rows_kernel[(num_tokens, triton.cdiv(num_columns, _BLOCK))](
        x_TK, out_TK, num_columns, x_TK.stride(0), BLOCK=_BLOCK, num_warps=4,
        **launch_options(x_TK.device),
    )  # fmt: skip
    return out_TK


AOT_CASES = (
    AotCase(
        name="interleave_rows",
        kernel=interleave_rows_kernel,
        signature={
            "x_ptr": "*fp16",
            "out_ptr": "*fp16",
            "num_columns": "i32",
            "x_stride": "i32",
        },
        constexprs={"BLOCK": _BLOCK, "PDL": True},
    ),
)
