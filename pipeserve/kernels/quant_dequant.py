"""Planar quantised matrix -> f16 or bf16 scratch, for products of so many rows that a plain matrix
product wins. Launched by the stage thread, capturable in a CUDA graph. Twin:
quant_reference.dequantise.

Shapes: N rows, K columns.
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
from pipeserve.kernels.quant_decode import aot_signature, layout_constexprs
from pipeserve.kernels.quant_halves import block_weights
from pipeserve.kernels.quant_layout import LAYOUTS, PlanarWeight
from pipeserve.kernels.quant_split import has_ptx

_BLOCK_N = 32
_PHASES = 4
"""Blocks of 64 columns per program: all planes repeat after so many."""


@triton.jit
def dequantise_kernel(
    low, high, scales, mins, supers, out,
    num_rows, num_columns, num_blocks, low_stride, high_stride, super_stride,
    BLOCK_N: tl.constexpr, PHASES: tl.constexpr, LOW_BITS: tl.constexpr, HIGH_BITS: tl.constexpr,
    GROUP: tl.constexpr, OFFSET: tl.constexpr, SCALES: tl.constexpr, TABLE: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N rows of PHASES blocks. Scaled in float32, rounded once."""
    first_row = tl.program_id(0) * BLOCK_N
    row = tl.minimum(tl.arange(0, BLOCK_N), num_rows - 1 - first_row)
    low += first_row.to(tl.int64) * low_stride
    if HIGH_BITS > 0:
        high += first_row.to(tl.int64) * high_stride
    scales += first_row.to(tl.int64) * num_blocks
    if SCALES == "half_min":
        mins += first_row.to(tl.int64) * num_blocks
    supers += first_row.to(tl.int64) * super_stride
    out += first_row.to(tl.int64) * num_columns
    is_row = (first_row + tl.arange(0, BLOCK_N) < num_rows)[:, None]
    for phase in tl.static_range(PHASES):
        block = tl.program_id(1) * PHASES + phase
        first, second = block_weights(
            low, high, scales, mins, supers, row, block, num_blocks, low_stride, high_stride,
            super_stride, phase, PHASES, 1, False, LOW_BITS, HIGH_BITS, GROUP, OFFSET, SCALES,
            TABLE, tl.float16, tl.float32, ASM,
        )  # fmt: skip
        column = (block * 64 + tl.arange(0, 32))[None, :]
        pointer = out + row[:, None] * num_columns + column
        dtype = out.dtype.element_ty
        tl.store(pointer, first.to(dtype), mask=is_row & (column < num_columns))
        tl.store(pointer + 32, second.to(dtype), mask=is_row & (column + 32 < num_columns))


def dequantise(
    weight: PlanarWeight, dtype: torch.dtype = torch.bfloat16, *, out: Tensor | None = None
) -> Tensor:
    """[N, K] in out, if given: a flat scratch of dtype of at least N * K, of which the start."""
    num_rows, num_columns = weight.num_rows, weight.num_columns
    device = weight.low.device
    if out is None:
        out = torch.empty(num_rows * num_columns, dtype=dtype, device=device)
    assert out.dtype == dtype and out.numel() >= num_rows * num_columns and out.is_contiguous()
    out_NK = out.flatten()[: num_rows * num_columns].view(num_rows, num_columns)
    num_blocks = weight.scales.shape[1]
    high, supers = weight.high, weight.supers
    dequantise_kernel[(triton.cdiv(num_rows, _BLOCK_N), triton.cdiv(num_blocks, _PHASES))](
        weight.low, high, weight.scales, weight.mins, weight.scales if supers is None else supers,
        out_NK, num_rows, num_columns, num_blocks, weight.low.shape[1],
        0 if high is None else high.shape[1], 0 if supers is None else supers.shape[1],
        BLOCK_N=_BLOCK_N, PHASES=_PHASES, ASM=has_ptx(device), **layout_constexprs(weight.layout),
    )  # fmt: skip
    return out_NK


def _aot_case(type_name: str) -> AotCase:
    layout = LAYOUTS[type_name]
    return AotCase(
        name=f"dequantise_{type_name}",
        kernel=dequantise_kernel,
        signature={
            "out": "*bf16",
            **dict.fromkeys(("num_rows", "num_columns", "num_blocks"), "i32:16"),
            **aot_signature(layout, plane="u8"),
        },
        constexprs={
            "BLOCK_N": _BLOCK_N,
            "PHASES": _PHASES,
            "ASM": True,
            **layout_constexprs(layout),
        },
    )


AOT_CASES: tuple[AotCase, ...] = tuple(_aot_case(type_name) for type_name in LAYOUTS)
