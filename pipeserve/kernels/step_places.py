"""Where a step's decode rows stand: cache slots, lengths and their rows of the block table, in one
launch.

Launched by the stage thread, capturable in a CUDA graph. Twin: reference.decode_places.

Shapes: S rows of the step, R all rows, B entries of a row of the block table.
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

_BLOCK = 1024


@triton.jit
def decode_places_kernel(
    table, rows, positions, slots, lengths, out, num_columns, table_stride, block_size,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK entries of one row's block table; the first program of a row writes its numbers too."""
    start_next_kernel(PDL)
    wait_for_inputs(PDL)
    seq = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row_table = table + tl.load(rows + seq).to(tl.int64) * table_stride
    entry = tl.load(row_table + column, mask=column < num_columns)
    tl.store(out + seq.to(tl.int64) * num_columns + column, entry, mask=column < num_columns)
    if tl.program_id(1) == 0:
        position = tl.load(positions + seq)
        seen = tl.maximum(position, 0)
        slot = tl.load(row_table + seen // block_size) * block_size + seen % block_size
        tl.store(slots + seq, tl.where(position < 0, -1, slot))
        tl.store(lengths + seq, position + 1)


def decode_places(
    table_RB: Tensor, rows_S: Tensor, positions_S: Tensor, block_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """slots_S, lengths_S and the rows' block table [S, B], each in the type of its source."""
    assert table_RB.stride(1) == 1, "a row of the block table is contiguous"
    assert rows_S.is_contiguous() and positions_S.is_contiguous(), "vectors are contiguous"
    num_seqs, num_columns = len(rows_S), table_RB.shape[1]
    slots_S, lengths_S = torch.empty_like(positions_S), torch.empty_like(positions_S)
    table_SB = table_RB.new_empty((num_seqs, num_columns))
    decode_places_kernel[(num_seqs, triton.cdiv(num_columns, _BLOCK))](
        table_RB, rows_S, positions_S, slots_S, lengths_S, table_SB, num_columns,
        table_RB.stride(0), block_size, BLOCK=_BLOCK, **launch_options(table_RB.device),
    )  # fmt: skip
    return slots_S, lengths_S, table_SB


AOT_CASES: tuple[AotCase, ...] = (
    AotCase(
        name="decode_places",
        kernel=decode_places_kernel,
        signature={
            **dict.fromkeys(("table", "rows", "positions", "slots", "lengths", "out"), "*i64"),
            **dict.fromkeys(("num_columns", "table_stride", "block_size"), "i32"),
        },
        constexprs={"BLOCK": _BLOCK, "PDL": True},
    ),
)
