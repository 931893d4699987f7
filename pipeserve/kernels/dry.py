"""How long the last tokens of a sequence repeat what stood before, for DRY, on the device.

Twin: reference_dry.py.

Shapes: E rows, W tokens of a window, the newest first.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-decorators=False
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pipeserve.kernels.aot import AotCase

_BLOCK = 256


@triton.jit(do_not_specialize=["width"])
def repeat_lengths_kernel(recent_ptr, limits_ptr, out_ptr, width, BLOCK: tl.constexpr):
    """Each lane walks one earlier place; a block ends with its longest repetition."""
    row = tl.program_id(0).to(tl.int64)
    places_X = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    recent_ptr += row * width
    limit = tl.load(limits_ptr + row)
    is_alive_X = (places_X > 0) & (places_X < width)
    lengths_X = tl.zeros([BLOCK], dtype=tl.int32)
    num_alive = tl.sum(is_alive_X.to(tl.int32), 0)
    step = 0
    while (num_alive > 0) & (step < limit):
        last = tl.load(recent_ptr + step)
        earlier_X = step + places_X
        is_inside_X = is_alive_X & (earlier_X < width)
        token_X = tl.load(recent_ptr + earlier_X, is_inside_X, other=-1)
        is_alive_X = is_inside_X & (token_X == last) & (last >= 0)
        lengths_X += is_alive_X.to(tl.int32)
        num_alive = tl.sum(is_alive_X.to(tl.int32), 0)
        step += 1
    tl.store(out_ptr + row * width + places_X, lengths_X, places_X < width)


def repeat_lengths(recent_EW: Tensor, limits_E: Tensor) -> Tensor:
    """[E, W] int32: how many tokens from place w on are the same as from place 0 on, at most the
    row's limit; 0 at place 0.

    recent_EW: int32, contiguous; -1 past the end of a shorter row. limits_E: int32, at most W.
    """
    assert recent_EW.dtype == limits_E.dtype == torch.int32, "int32 tokens and limits"
    assert recent_EW.is_contiguous(), "[E, W]"
    num_rows, width = recent_EW.shape
    lengths_EW = torch.empty_like(recent_EW)
    if num_rows > 0 and width > 0:
        repeat_lengths_kernel[(num_rows, triton.cdiv(width, _BLOCK))](
            recent_EW, limits_E, lengths_EW, width, BLOCK=_BLOCK
        )
    return lengths_EW


AOT_CASES = (
    AotCase(
        name="repeat_lengths",
        kernel=repeat_lengths_kernel,
        signature={
            "recent_ptr": "*i32",
            "limits_ptr": "*i32",
            "out_ptr": "*i32",
            "width": "i32",
        },
        constexprs={"BLOCK": _BLOCK},
    ),
)
