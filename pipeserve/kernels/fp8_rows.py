"""Few rows times a matrix in 8-bit floats (e4m3), at the speed at which the matrix can be read.

Launched by the stage thread, capturable in a CUDA graph. The weight tile is the first operand of
the tensor cores and the rows are the short side. Where the outputs leave the card idle the columns
are cut into a fixed number of parts, which a second kernel adds in order, so results do not change
from run to run. Twin: fp8_reference.scaled_product.

Shapes: T tokens, N outputs, K inputs.
"""

# Triton's decorator and its functions' arguments have no types to annotate.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-decorators=False

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

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
from pipeserve.kernels.fp8_reference import FP8_GROUP, Fp8Rows, Fp8Weight
from pipeserve.kernels.quant_split import CardLimits, card_limits, sum_parts


@triton.jit(do_not_specialize=["num_tokens"])
def fp8_rows_kernel(
    x, x_scales, weights, weight_scales, bias, out, num_tokens, num_rows, num_columns,
    columns_per_part, out_stride, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr, GROUPED: tl.constexpr, EVEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N outputs of BLOCK_T tokens over one part of the columns.

    out is [parts, T, N], its tokens out_stride apart. Without EVEN the last columns may lie past
    the end. Sums leave the tensor cores' narrow registers every 128 columns; with GROUPED, where
    BLOCK_K is so many, times x's scales for those. Rows past the end are the last one once more.
    """
    start_next_kernel(PDL)
    first_row = tl.program_id(0) * BLOCK_N
    part = tl.program_id(1)
    first_token = tl.program_id(2) * BLOCK_T
    row = tl.minimum(first_row + tl.arange(0, BLOCK_N), num_rows - 1)
    token = tl.minimum(first_token + tl.arange(0, BLOCK_T), num_tokens - 1)
    weights += row.to(tl.int64) * num_columns
    x += token.to(tl.int64) * num_columns
    begin = part * columns_per_part
    end = tl.minimum(begin + columns_per_part, num_columns)
    weight_scale = tl.load(weight_scales + row)
    wait_for_inputs(PDL)
    total = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
    for start in range(begin, end, BLOCK_K):
        column = (start + tl.arange(0, BLOCK_K))[None, :]
        if EVEN:
            weight_tile = tl.load(weights[:, None] + column)
            x_tile = tl.load(x[:, None] + column)
        else:
            weight_tile = tl.load(weights[:, None] + column, mask=column < end, other=0.0)
            x_tile = tl.load(x[:, None] + column, mask=column < end, other=0.0)
        if GROUPED:
            x_scale = tl.load(x_scales + token * (num_columns // 128) + start // 128)
            total += tl.dot(weight_tile, tl.trans(x_tile)) * x_scale[None, :]
        else:
            total = tl.dot(weight_tile, tl.trans(x_tile), total, max_num_imprecise_acc=128)
    total *= weight_scale[:, None]
    if not GROUPED:
        total *= tl.load(x_scales + token)[None, :]
    if bias is not None:
        total += tl.load(bias + row).to(tl.float32)[:, None]
    out_row = first_row + tl.arange(0, BLOCK_N)
    out_token = first_token + tl.arange(0, BLOCK_T)
    index = (part * num_tokens + out_token).to(tl.int64)[None, :] * out_stride + out_row[:, None]
    inside = (out_row < num_rows)[:, None] & (out_token < num_tokens)[None, :]
    tl.store(out + index, total.to(out.dtype.element_ty), mask=inside)


@dataclass(frozen=True, slots=True, kw_only=True)
class RowsTiling:
    """How a product is cut; a result's bits depend on it."""

    block_n: int
    block_t: int
    block_k: int
    num_warps: int
    num_stages: int
    num_parts: int
    """Of the columns."""


def multiply_rows(
    x: Fp8Rows, weight: Fp8Weight, bias_N: Tensor | None = None,
    *, tiling: RowsTiling | None = None,
) -> Tensor:  # fmt: skip
    """x W^T + b [T, N] in bf16. tiling overrides choose_tiling."""
    num_tokens, num_columns = x.codes_TK.shape
    num_rows = weight.codes_NK.shape[0]
    assert weight.codes_NK.shape[1] == num_columns, f"{num_columns} columns do not fit the matrix"
    assert x.codes_TK.is_contiguous() and weight.codes_NK.is_contiguous(), "rows lie side by side"
    device = x.codes_TK.device
    if tiling is None:
        tiling = choose_tiling(num_rows, num_columns, num_tokens, card_limits(device))
    block_k = FP8_GROUP if x.is_grouped else tiling.block_k
    columns_per_part = triton.cdiv(triton.cdiv(num_columns, block_k), tiling.num_parts) * block_k
    num_parts = triton.cdiv(num_columns, columns_per_part)
    is_whole = num_parts == 1
    out_TN = torch.empty((num_tokens, num_rows), dtype=torch.bfloat16, device=device)
    sums = out_TN
    if not is_whole:
        sums = torch.empty((num_parts, num_tokens, num_rows), dtype=torch.float32, device=device)
    grid = (triton.cdiv(num_rows, tiling.block_n), num_parts)
    fp8_rows_kernel[(*grid, triton.cdiv(num_tokens, tiling.block_t))](
        x.codes_TK, x.scales_TG, weight.codes_NK, weight.scales_1N, bias_N if is_whole else None,
        sums, num_tokens, num_rows, num_columns, columns_per_part, sums.stride(-2),
        BLOCK_N=tiling.block_n, BLOCK_T=tiling.block_t, BLOCK_K=block_k, GROUPED=x.is_grouped,
        EVEN=num_columns % block_k == 0, num_warps=tiling.num_warps, num_stages=tiling.num_stages,
        **launch_options(device),
    )  # fmt: skip
    return out_TN if is_whole else sum_parts(sums, bias_N, out_TN.dtype, out_TN=out_TN)


def shared_bytes(tiling: RowsTiling) -> int:
    """What the kernel takes: tiles in flight, or at its end the sums on their way out."""
    tiles = tiling.num_stages * (tiling.block_n + tiling.block_t) * tiling.block_k
    return max(tiles, tiling.block_n * tiling.block_t * 4)


_BLOCK_N, _BLOCK_K, _NUM_WARPS = 64, 128, 4
_NUM_STAGES: Mapping[int, int] = MappingProxyType({16: 9, 32: 8, 64: 6, 128: 4})
"""By block_t; measured on an H200 with the matrices of an 8B model, as is all here."""
_PROGRAMS_AT_ONCE = 2
"""Per multiprocessor; columns are cut into parts as long as all programs run at once."""
_MIN_COLUMNS = 1024
"""Of a part: parts cost their start, and that their sums meet."""


def choose_tiling(
    num_rows: int, num_columns: int, num_tokens: int, limits: CardLimits
) -> RowsTiling:
    """The smallest tile that holds the tokens, with as many stages as fit the shared memory."""
    block_t = next((size for size in _NUM_STAGES if size >= num_tokens), max(_NUM_STAGES))
    num_programs = triton.cdiv(num_rows, _BLOCK_N) * triton.cdiv(num_tokens, block_t)
    num_places = _PROGRAMS_AT_ONCE * limits.num_multiprocessors
    num_parts = 1
    while (
        num_programs * num_parts * 2 <= num_places and num_columns >= num_parts * 2 * _MIN_COLUMNS
    ):
        num_parts *= 2
    tiling = RowsTiling(
        block_n=_BLOCK_N,
        block_t=block_t,
        block_k=_BLOCK_K,
        num_warps=_NUM_WARPS,
        num_stages=_NUM_STAGES[block_t],
        num_parts=num_parts,
    )
    while tiling.num_stages > 2 and shared_bytes(tiling) > limits.shared_bytes:
        tiling = replace(tiling, num_stages=tiling.num_stages - 1)
    return tiling


def _aot_case(block_t: int, num_stages: int, out: str) -> AotCase:
    return AotCase(
        name=f"fp8_rows_{block_t}_{out}",
        kernel=fp8_rows_kernel,
        signature={
            "x": "*fp8e4nv",
            "x_scales": "*fp32",
            "weights": "*fp8e4nv",
            "weight_scales": "*fp32",
            "bias": "*bf16",
            "out": f"*{out}",
            "num_tokens": "i32",
            "num_rows": "i32:16",
            "num_columns": "i32:16",
            "columns_per_part": "i32:16",
            "out_stride": "i32:16",
        },
        constexprs={
            "BLOCK_N": _BLOCK_N,
            "BLOCK_T": block_t,
            "BLOCK_K": _BLOCK_K,
            "GROUPED": out == "bf16",
            "EVEN": out == "bf16",
            "PDL": True,
        },
        num_warps=_NUM_WARPS,
        num_stages=num_stages,
        needs_e4m3=True,
    )


AOT_CASES: tuple[AotCase, ...] = (
    _aot_case(16, 9, "bf16"),
    _aot_case(32, 4, "fp32"),
    _aot_case(64, 4, "fp32"),
    _aot_case(128, 3, "bf16"),
)
