"""A batch of rows times a planar quantised matrix on the tensor cores, in f16 or bf16.

Launched by the stage thread, capturable in a CUDA graph. The weight tile is the first operand: it
is unpacked, scaled and used in registers, and the batch is the short side. Where the outputs leave
the card idle the columns are cut into a fixed number of parts, which a second kernel adds in order,
so results do not change from run to run. Twin: quant_reference.matmul.

Shapes: T tokens, N outputs, K inputs. A block is 64 columns.
"""

# Triton's decorator and its functions' arguments have no types to annotate.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-decorators=False

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
import triton
import triton.language as tl
from torch import Tensor

from pipeserve.kernels.aot import AotCase
from pipeserve.kernels.quant_decode import aot_signature, layout_constexprs
from pipeserve.kernels.quant_halves import block_weights
from pipeserve.kernels.quant_layout import LAYOUTS, PLANE_BYTES, UNIT, PlanarWeight, QuantLayout
from pipeserve.kernels.quant_split import CardLimits, card_limits, has_ptx, sum_parts


@triton.jit
def gemm_kernel(
    x, low, high, scales, mins, supers, bias, out,
    num_tokens, num_rows, num_blocks, blocks_per_part, x_stride, low_stride, high_stride,
    super_stride, out_stride, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, PHASES: tl.constexpr,
    WIDE: tl.constexpr, EVEN: tl.constexpr, LOW_BITS: tl.constexpr, HIGH_BITS: tl.constexpr,
    GROUP: tl.constexpr, OFFSET: tl.constexpr, SCALES: tl.constexpr, TABLE: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N outputs of BLOCK_T tokens over one part of the columns.

    Planes count in bytes. One product takes the same halves of WIDE blocks that lie PHASES apart,
    and PHASES of them are unrolled, so that shifts within shared planes are constants. Without EVEN
    the last blocks may lie past the end. out is [parts, T, N], its tokens out_stride apart.
    """
    first_row = tl.program_id(0) * BLOCK_N
    first_token = tl.program_id(1) * BLOCK_T
    part = tl.program_id(2)
    row = tl.minimum(tl.arange(0, BLOCK_N), num_rows - 1 - first_row)
    low += first_row.to(tl.int64) * low_stride
    if HIGH_BITS > 0:
        high += first_row.to(tl.int64) * high_stride
    scales += first_row.to(tl.int64) * num_blocks
    if SCALES == "half_min":
        mins += first_row.to(tl.int64) * num_blocks
    supers += first_row.to(tl.int64) * super_stride
    token = tl.minimum(tl.arange(0, BLOCK_T), num_tokens - 1 - first_token)
    x += first_token.to(tl.int64) * x_stride + token[:, None] * x_stride
    x_column = tl.arange(0, WIDE * 32)
    x_column = (x_column // 32 * (PHASES * 64) + x_column % 32)[None, :]
    total = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
    end = tl.minimum((part + 1) * blocks_per_part, num_blocks)
    for start in range(part * blocks_per_part, end, PHASES * WIDE):
        for phase in tl.static_range(PHASES):
            first, second = block_weights(
                low, high, scales, mins, supers, row, start + phase, num_blocks, low_stride,
                high_stride, super_stride, phase, PHASES, WIDE, EVEN, LOW_BITS, HIGH_BITS, GROUP,
                OFFSET, SCALES, TABLE, x.dtype.element_ty, x.dtype.element_ty, ASM,
            )  # fmt: skip
            pointer = x + (x_column + (start + phase) * 64)
            if EVEN:
                x_first = tl.load(pointer)
                x_second = tl.load(pointer + 32)
            else:
                inside = (x_column + (start + phase) * 64) < num_blocks * 64
                x_first = tl.load(pointer, mask=inside, other=0)
                x_second = tl.load(pointer + 32, mask=inside, other=0)
            total = tl.dot(first, tl.trans(x_first), total)
            total = tl.dot(second, tl.trans(x_second), total)
    column = first_row + tl.arange(0, BLOCK_N)
    if bias is not None:
        shift = tl.load(bias + column, mask=column < num_rows, other=0)
        total += shift.to(tl.float32)[:, None]
    tokens = first_token + tl.arange(0, BLOCK_T)
    index = (part * num_tokens + tokens).to(tl.int64)[None, :] * out_stride + column[:, None]
    inside = (column < num_rows)[:, None] & (tokens < num_tokens)[None, :]
    tl.store(out + index, total.to(out.dtype.element_ty), mask=inside)


def phases_of(layout: QuantLayout) -> int:
    """Blocks after which all of a type's planes repeat."""
    bits = (layout.low_bits, layout.high_bits or layout.low_bits)
    return max(max(1, 4 // plane_bits) for plane_bits in bits)


@dataclass(frozen=True, slots=True, kw_only=True)
class GemmTiling:
    """How a product is cut; a result's bits depend on it."""

    block_n: int
    block_t: int
    wide: int
    """Blocks whose halves one product takes."""
    num_warps: int
    num_stages: int
    num_parts: int
    """Of the columns."""


def gemm(
    x_TK: Tensor, weight: PlanarWeight, bias_N: Tensor | None = None,
    *, out_dtype: torch.dtype | None = None, out_TN: Tensor | None = None,
    tiling: GemmTiling | None = None,
) -> Tensor:  # fmt: skip
    """x W^T + b [T, N], in x's type unless told otherwise, for any number of tokens.

    x is f16 or bf16 with rows of unit stride, and weights are rounded to its type. out_TN: written
    to instead; its rows may lie anywhere. tiling overrides the measured choice.
    """
    num_tokens, num_columns = x_TK.shape
    num_rows, num_blocks = weight.num_rows, weight.scales.shape[1]
    assert x_TK.stride(1) == 1, f"activations have column stride {x_TK.stride(1)}"
    assert num_columns == weight.num_columns, f"{num_columns} columns, not {weight.num_columns}"
    assert num_columns % UNIT == 0, f"{num_columns} columns are no multiple of {UNIT}"
    phases = phases_of(weight.layout)
    if tiling is None:
        tiling = choose_tiling(weight, num_tokens, card_limits(x_TK.device))
    step = phases * tiling.wide
    blocks_per_part = triton.cdiv(triton.cdiv(num_blocks, step), tiling.num_parts) * step
    num_parts = triton.cdiv(num_blocks, blocks_per_part)
    is_whole = num_parts == 1
    if out_TN is None:
        out_TN = x_TK.new_empty((num_tokens, num_rows), dtype=out_dtype or x_TK.dtype)
    assert out_TN.shape == (num_tokens, num_rows) and out_TN.stride(1) == 1, "outputs do not fit"
    sums = out_TN
    if not is_whole:
        sums = x_TK.new_empty((num_parts, num_tokens, num_rows), dtype=torch.float32)
    row_programs = triton.cdiv(num_rows, tiling.block_n)
    high, supers = weight.high, weight.supers
    gemm_kernel[(row_programs, triton.cdiv(num_tokens, tiling.block_t), num_parts)](
        x_TK, weight.low, high, weight.scales, weight.mins,
        weight.scales if supers is None else supers, bias_N if is_whole else None, sums,
        num_tokens, num_rows, num_blocks, blocks_per_part, x_TK.stride(0), weight.low.shape[1],
        0 if high is None else high.shape[1], 0 if supers is None else supers.shape[1],
        sums.stride(-2), BLOCK_N=tiling.block_n, BLOCK_T=tiling.block_t, PHASES=phases,
        WIDE=tiling.wide, EVEN=num_blocks % step == 0, ASM=has_ptx(x_TK.device),
        num_warps=tiling.num_warps, num_stages=tiling.num_stages,
        **layout_constexprs(weight.layout),
    )  # fmt: skip
    return out_TN if is_whole else sum_parts(sums, bias_N, out_TN.dtype, out_TN=out_TN)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Preference:
    """What was fastest for so many tokens."""

    block_n: int
    wide: int
    num_warps: int
    num_stages: int
    warps_wanted: int
    """Per multiprocessor, before columns are no longer cut into parts."""


_PREFERENCES: Mapping[int, _Preference] = MappingProxyType(
    {
        8: _Preference(block_n=32, wide=4, num_warps=2, num_stages=3, warps_wanted=7),
        16: _Preference(block_n=32, wide=4, num_warps=2, num_stages=3, warps_wanted=7),
        32: _Preference(block_n=64, wide=2, num_warps=2, num_stages=3, warps_wanted=7),
        64: _Preference(block_n=128, wide=2, num_warps=8, num_stages=2, warps_wanted=13),
        128: _Preference(block_n=64, wide=1, num_warps=4, num_stages=2, warps_wanted=10),
        256: _Preference(block_n=128, wide=2, num_warps=8, num_stages=3, warps_wanted=7),
    }
)
"""By block_t; measured on an H100 with the matrices of an 8B model in Q4_K.

Few tokens: many small programs. Many: the rows of a program share what it reads of x, so more of
them. Wider products wait less often for each other."""


def choose_tiling(weight: PlanarWeight, num_tokens: int, limits: CardLimits) -> GemmTiling:
    """The preferred tiling, made narrower and then shorter until it fits the shared memory."""
    preferred_t = min(256, max(8, triton.next_power_of_2(num_tokens)))
    block_t, wide, num_stages = next(
        candidate
        for candidate in _candidates(preferred_t, phases_of(weight.layout))
        if shared_bytes(weight.layout, _PREFERENCES[candidate[0]].block_n, *candidate)
        <= limits.shared_bytes
    )
    preferred = _PREFERENCES[block_t]
    step = phases_of(weight.layout) * wide
    num_programs = triton.cdiv(weight.num_rows, preferred.block_n)
    num_programs *= triton.cdiv(num_tokens, block_t)
    wanted_programs = preferred.warps_wanted * limits.num_multiprocessors // preferred.num_warps
    num_blocks, num_parts = weight.scales.shape[1], 1
    while num_programs * num_parts < wanted_programs and num_parts * 4 * step < num_blocks:
        num_parts *= 2
    return GemmTiling(
        block_n=preferred.block_n,
        block_t=block_t,
        wide=wide,
        num_warps=preferred.num_warps,
        num_stages=num_stages,
        num_parts=num_parts,
    )


def _candidates(preferred_t: int, phases: int) -> Iterator[tuple[int, int, int]]:
    """block_t, wide, num_stages, best first. Unrolled phases widen a step as much as wide does."""
    for block_t in sorted(_PREFERENCES, reverse=True):
        if block_t <= preferred_t:
            preferred = _PREFERENCES[block_t]
            wide = max(1, preferred.wide // phases)
            if phases == 1:
                yield block_t, wide, preferred.num_stages
            yield block_t, wide, 2
            yield block_t, 1, 2


def shared_bytes(
    layout: QuantLayout, block_n: int, block_t: int, wide: int, num_stages: int
) -> int:
    """What the kernel takes at most: tiles in flight, or at its end the sums on their way out."""
    num_planes = 2 if layout.high_bits or layout.low_bits == 8 else 1
    row_bytes = PLANE_BYTES * num_planes + 16
    per_stage = phases_of(layout) * wide
    x_bytes = num_stages * per_stage * UNIT * 2 * block_t
    weight_bytes = (num_stages - 1) * per_stage * block_n * row_bytes
    return max(x_bytes + weight_bytes, block_n * block_t * 4)


_INTEGERS = ("num_rows", "num_blocks", "blocks_per_part", "x_stride", "out_stride")


def _aot_case(type_name: str, dtype: str, block_t: int) -> AotCase:
    layout = LAYOUTS[type_name]
    return AotCase(
        name=f"gemm_{type_name}_{dtype}_{block_t}",
        kernel=gemm_kernel,
        signature={
            "x": f"*{dtype}",
            "bias": f"*{dtype}",
            "out": "*fp32",
            "num_tokens": "i32",
            **dict.fromkeys(_INTEGERS, "i32:16"),
            **aot_signature(layout, plane="u8"),
        },
        constexprs={
            "BLOCK_N": 64,
            "BLOCK_T": block_t,
            "PHASES": phases_of(layout),
            "WIDE": 2,
            "EVEN": True,
            "ASM": True,
            **layout_constexprs(layout),
        },
        num_stages=2,
    )


AOT_CASES: tuple[AotCase, ...] = (
    *(_aot_case(type_name, "fp16", 16) for type_name in LAYOUTS),
    *(_aot_case(type_name, "bf16", 64) for type_name in LAYOUTS),
)
