"""Rounds activations to what the kernel for few rows sees, for the kernels that take floats.

Launched by the stage thread, capturable in a CUDA graph. With it int8 activations mean the same in
every regime. Twin: quant_reference.round_rows.

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

_GROUPS = 32
"""Of 32 columns, per program."""


@triton.jit
def round_rows_kernel(x, out, num_columns, x_stride, GROUPS: tl.constexpr):
    """One program: GROUPS times 32 columns of one token; scales and codes as
    rounded_rows.store_rounded makes them."""
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    column = group[:, None] * 32 + tl.arange(0, 32)[None, :]
    inside = column < num_columns
    value = tl.load(x + token * x_stride + column, mask=inside, other=0).to(tl.float32)
    scale = tl.max(tl.abs(value), axis=1) * (1 / 127)
    inverse = 1 / tl.where(scale > 1e-30, scale, 1.0)
    code = tl.floor(value * inverse[:, None] + 0.5)
    rounded = (code * scale[:, None]).to(out.dtype.element_ty)
    tl.store(out + token * num_columns + column, rounded, mask=inside)


def round_rows(x_TK: Tensor) -> Tensor:
    """Rows of unit stride, rounded to signed bytes with a scale per 32, in x's type."""
    num_tokens, num_columns = x_TK.shape
    assert x_TK.stride(1) == 1, f"activations have column stride {x_TK.stride(1)}"
    out_TK = torch.empty((num_tokens, num_columns), dtype=x_TK.dtype, device=x_TK.device)
    round_rows_kernel[(num_tokens, triton.cdiv(num_columns, 32 * _GROUPS))](
        x_TK, out_TK, num_columns, x_TK.stride(0), GROUPS=_GROUPS
    )
    return out_TK


AOT_CASES: tuple[AotCase, ...] = (
    AotCase(
        name="round_rows",
        kernel=round_rows_kernel,
        signature={
            "x": "*fp16",
            "out": "*fp16",
            "num_columns": "i32:16",
            "x_stride": "i32:16",
        },
        constexprs={"GROUPS": _GROUPS},
    ),
)
