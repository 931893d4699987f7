"""Few rows times a planar quantised matrix: activations as bytes, exact integer dot products.

Launched by the stage thread, capturable in a CUDA graph. Results do not change from run to run:
where few outputs leave the card idle, the columns are cut into a fixed number of parts whose sums a
second kernel adds in order. Twin: quant_reference.matmul_int8.

Shapes: T tokens, N outputs, K inputs padded to blocks of 64, G groups. A block is 64
columns; a piece is what a thread takes of a row at once: a block, or where groups are of 16 columns
16 from each half of one.
"""

# Triton's decorator and its functions' arguments have no types to annotate, and tuples grow in
# unrolled loops.
# mypy: disable-error-code="assignment,var-annotated"
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
from pipeserve.kernels.quant_decode import (
    aot_signature,
    blocks_per_plane,
    dot4,
    has_min,
    layout_constexprs,
    load_scale_words,
    packed_codes,
    scale_values,
)
from pipeserve.kernels.quant_layout import LAYOUTS, UNIT, PlanarWeight
from pipeserve.kernels.quant_reference import QuantisedRows
from pipeserve.kernels.quant_split import card_limits, has_ptx, sum_parts

MAX_ROWS = 8


@triton.constexpr_function
def halves_per_piece(group_size):
    """How many times 16 columns of each half of a block a thread takes at once: as many as share
    their scales, since each scaling costs what 16 products do."""
    return group_size // 16


@triton.jit
def _load(pointer, mask, WHOLE: tl.constexpr):
    """A masked load costs an instruction per register more: 0 where the mask is off."""
    if WHOLE:
        loaded = tl.load(pointer)
    elif len(pointer.shape) == 2:
        loaded = tl.load(pointer, mask=mask[:, None], other=0)
    else:
        loaded = tl.load(pointer, mask=mask, other=0)
    return loaded


@triton.jit
def _load_words(base, offset, mask, HALVES: tl.constexpr, WHOLE: tl.constexpr):
    """4 * HALVES words from each offset of [P] on -> so many times [P], all a thread's own."""
    words = ()
    for half in tl.static_range(HALVES):
        index = offset[:, None] + (half * 4 + tl.arange(0, 4))[None, :]
        four = _load(base + index, mask, WHOLE)
        even, odd = tl.split(tl.reshape(four, (offset.shape[0], 2, 2)))
        first, third = tl.split(even)
        second, fourth = tl.split(odd)
        words = words + (first, second, third, fourth)  # noqa: RUF005
    return words


@triton.jit
def _load_row(
    low, high, scales, mins, supers, row, num_blocks, low_stride, high_stride, super_stride, start,
    end, HALVES: tl.constexpr, PIECES: tl.constexpr, LOW_BITS: tl.constexpr,
    HIGH_BITS: tl.constexpr, SCALES: tl.constexpr,
):  # fmt: skip
    """PIECES pieces of a row from `start` on, as they lie: nothing here waits for a load."""
    piece = start + tl.arange(0, PIECES)
    mask = piece < end
    block = piece * HALVES // 2
    half = piece * HALVES % 2
    low_row = low + row * low_stride
    if LOW_BITS == 8:
        low_words = _load_words(low_row, block * 16 + half * 4, mask, HALVES, False)
        high_words = _load_words(low_row, block * 16 + 8 + half * 4, mask, HALVES, False)
    else:
        low_per: tl.constexpr = blocks_per_plane(LOW_BITS)
        low_words = _load_words(low_row, block // low_per * 8 + half * 4, mask, HALVES, False)
        high_words = ()
        if HIGH_BITS > 0:
            high_per: tl.constexpr = blocks_per_plane(HIGH_BITS)
            high_offset = block // high_per * 8 + half * 4
            high_words = _load_words(high + row * high_stride, high_offset, mask, HALVES, False)
    min_row = mins
    if SCALES == "half_min":
        min_row = mins + row * num_blocks
    scale_words = load_scale_words(
        scales + row * num_blocks, min_row, supers + row * super_stride, block, block // 4, mask,
        SCALES,
    )  # fmt: skip
    return low_words, high_words, scale_words


@triton.jit
def _load_rows(
    low, high, scales, mins, supers, first_row, num_rows, num_blocks, low_stride, high_stride,
    super_stride, start, end, BLOCK_N: tl.constexpr, HALVES: tl.constexpr, PIECES: tl.constexpr,
    LOW_BITS: tl.constexpr, HIGH_BITS: tl.constexpr, SCALES: tl.constexpr,
):  # fmt: skip
    rows = ()
    for r in tl.static_range(BLOCK_N):
        row = tl.minimum(first_row + r, num_rows - 1).to(tl.int64)
        words = _load_row(
            low, high, scales, mins, supers, row, num_blocks, low_stride, high_stride,
            super_stride, start, end, HALVES, PIECES, LOW_BITS, HIGH_BITS, SCALES,
        )  # fmt: skip
        rows = rows + (words,)  # noqa: RUF005
    return rows


@triton.jit
def _codes(
    low_words, high_words, block, HALVES: tl.constexpr, LOW_BITS: tl.constexpr,
    HIGH_BITS: tl.constexpr, TABLE: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """A row's pieces as words of codes: of the low half of the block, of the high half."""
    first = ()
    second = ()
    if LOW_BITS == 8:
        first = low_words
        second = high_words
    else:
        low_shift = block % blocks_per_plane(LOW_BITS) * (2 * LOW_BITS)
        high_shift = 0
        if HIGH_BITS > 0:
            high_shift = block % blocks_per_plane(HIGH_BITS) * (2 * HIGH_BITS)
        for i in tl.static_range(4 * HALVES):
            high_word = low_words[i]
            if HIGH_BITS > 0:
                high_word = high_words[i]
            codes = packed_codes(
                low_words[i], high_word, low_shift, high_shift, LOW_BITS, HIGH_BITS, TABLE, ASM
            )
            first = first + (codes[0],)  # noqa: RUF005
            second = second + (codes[1],)  # noqa: RUF005
    return first, second


@triton.jit
def _dot(codes, x, start, HALVES: tl.constexpr, ASM: tl.constexpr):
    """start + words of codes times words of activations."""
    for i in tl.static_range(4 * HALVES):
        start = dot4(codes[i], x[i], start, ASM)
    return start


@triton.jit
def _load_pair(base, index, mask, WHOLE: tl.constexpr):
    """Entries index and index + 1 by one load -> two tensors, a thread's own."""
    return tl.split(_load(base + index[:, None] + tl.arange(0, 2)[None, :], mask, WHOLE))


@triton.jit
def _load_sums(x_sums, group, half, mask, HALVES: tl.constexpr, WHOLE: tl.constexpr):
    """Sums of a piece's codes, int32: in the group at index `group`, in the next one."""
    if HALVES == 2:
        index = group[:, None] * 2 + tl.arange(0, 4)[None, :]
        four = _load(x_sums + index, mask, WHOLE).to(tl.int32)
        even, odd = tl.split(tl.reshape(four, (group.shape[0], 2, 2)))
        first, second = tl.split(even + odd)
    else:
        first = _load(x_sums + group * 2 + half, mask, WHOLE).to(tl.int32)
        second = _load(x_sums + group * 2 + half + 2, mask, WHOLE).to(tl.int32)
    return first, second


@triton.jit
def _stack(columns, first: tl.constexpr, count: tl.constexpr, step: tl.constexpr):
    """[P] tensors first, first + step, ... -> [P, count] in order; registers only."""
    if count == 1:
        stacked = columns[first][:, None]
    else:
        half: tl.constexpr = count // 2
        stacked = tl.join(
            _stack(columns, first, half, step), _stack(columns, first + half * step, half, step)
        )
        stacked = tl.reshape(tl.permute(stacked, (0, 2, 1)), (stacked.shape[0], count))
    return stacked


@triton.jit
def gemv_kernel(
    x, x_scales, x_sums, low, high, scales, mins, supers, bias, out,
    num_rows, num_pieces, pieces_per_part, low_stride, high_stride, super_stride, out_stride,
    T: tl.constexpr, BLOCK_N: tl.constexpr, PIECES: tl.constexpr, LOW_BITS: tl.constexpr,
    HIGH_BITS: tl.constexpr, GROUP: tl.constexpr, OFFSET: tl.constexpr, SCALES: tl.constexpr,
    TABLE: tl.constexpr, WHOLE: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N outputs of all T tokens over one part of the columns.

    x and the planes count in words of 4 bytes, strides too. out is [parts, T, N]. Rows and tokens
    are unrolled, so that a thread's activations serve all rows from registers. Weights are loaded
    an iteration ahead, the first ones before the activations are there. WHOLE: PIECES divides
    every part.
    """
    start_next_kernel(PDL)
    first_row = tl.program_id(0) * BLOCK_N
    part = tl.program_id(1)
    halves: tl.constexpr = halves_per_piece(GROUP)
    num_blocks = num_pieces * halves // 2
    totals = ()
    for _ in tl.static_range(T * BLOCK_N):
        totals = totals + (tl.zeros((PIECES,), tl.float32),)  # noqa: RUF005
    begin = part * pieces_per_part
    end = tl.minimum(begin + pieces_per_part, num_pieces)
    loaded = _load_rows(
        low, high, scales, mins, supers, first_row, num_rows, num_blocks, low_stride, high_stride,
        super_stride, begin, end, BLOCK_N, halves, PIECES, LOW_BITS, HIGH_BITS, SCALES,
    )  # fmt: skip
    wait_for_inputs(PDL)
    for start in range(begin, end, PIECES):
        rows = loaded
        loaded = _load_rows(
            low, high, scales, mins, supers, first_row, num_rows, num_blocks, low_stride,
            high_stride, super_stride, start + PIECES, end, BLOCK_N, halves, PIECES, LOW_BITS,
            HIGH_BITS, SCALES,
        )  # fmt: skip
        piece = start + tl.arange(0, PIECES)
        mask = piece < end
        block = piece * halves // 2
        half = piece * halves % 2
        weights = ()
        for r in tl.static_range(BLOCK_N):
            low_words, high_words, scale_words = rows[r]
            codes = _codes(low_words, high_words, block, halves, LOW_BITS, HIGH_BITS, TABLE, ASM)
            row_scales = scale_values(scale_words[0], scale_words[1], half, SCALES)
            weights = weights + ((codes, row_scales),)  # noqa: RUF005
        new_totals = ()
        for t in tl.static_range(T):
            offset = (t * num_blocks + block) * 16 + half * 4
            x_a = _load_words(x, offset, mask, halves, WHOLE)
            x_b = _load_words(x, offset + 8, mask, halves, WHOLE)
            group = (t * num_blocks + block) * 2
            x_scale_a, x_scale_b = _load_pair(x_scales, group, mask, WHOLE)
            sum_a = tl.zeros_like(piece)
            sum_b = sum_a
            if has_min(SCALES) or OFFSET != 0:
                sum_a, sum_b = _load_sums(x_sums, group, half, mask, halves, WHOLE)
            for r in tl.static_range(BLOCK_N):
                total = totals[t * BLOCK_N + r]
                codes, row_scales = weights[r]
                dot_a = _dot(codes[0], x_a, sum_a * -OFFSET, halves, ASM)
                dot_b = _dot(codes[1], x_b, sum_b * -OFFSET, halves, ASM)
                total += (row_scales[0] * x_scale_a) * dot_a.to(tl.float32)
                total += (row_scales[1] * x_scale_b) * dot_b.to(tl.float32)
                if has_min(SCALES):
                    total -= row_scales[2] * (x_scale_a * sum_a.to(tl.float32))
                    total -= row_scales[3] * (x_scale_b * sum_b.to(tl.float32))
                new_totals = new_totals + (total,)  # noqa: RUF005
        totals = new_totals
    column = first_row + tl.arange(0, BLOCK_N)
    for t in tl.static_range(T):
        result = tl.sum(_stack(totals, t * BLOCK_N, BLOCK_N, 1), axis=0)
        if bias is not None:
            result += tl.load(bias + column, mask=column < num_rows, other=0).to(tl.float32)
        index = (part * T + t).to(tl.int64) * out_stride + column
        tl.store(out + index, result.to(out.dtype.element_ty), mask=column < num_rows)


def gemv(
    x: QuantisedRows, weight: PlanarWeight, bias_N: Tensor | None = None,
    *, out_dtype: torch.dtype = torch.float32, out_TN: Tensor | None = None,
    block_n: int | None = None, pieces: int | None = None, num_parts: int | None = None,
) -> Tensor:  # fmt: skip
    """x W^T + b [T, N] for 1 to 8 tokens, in out_dtype, or in out_TN, whose rows may lie anywhere.

    The last three override the measured choice.
    """
    num_tokens = x.codes_TK.shape[0]
    num_rows = weight.num_rows
    assert 1 <= num_tokens <= MAX_ROWS, f"{num_tokens} rows; gemv takes 1 to {MAX_ROWS}"
    num_blocks = weight.scales.shape[1]
    num_pieces = num_blocks * 2 // halves_per_piece(weight.layout.group_size)
    assert x.codes_TK.shape[1] == num_blocks * UNIT, "activations do not fit the weight's columns"
    device = x.codes_TK.device
    multiprocessors = card_limits(device).num_multiprocessors
    group_size = weight.layout.group_size
    chosen = _tiling(num_rows, num_pieces, num_tokens, group_size, multiprocessors)
    block_n, pieces = block_n or chosen[0], pieces or chosen[1]
    num_parts = num_parts or chosen[2]
    pieces_per_part = triton.cdiv(triton.cdiv(num_pieces, pieces), num_parts) * pieces
    num_parts = triton.cdiv(num_pieces, pieces_per_part)
    is_whole = num_parts == 1
    if out_TN is None:
        out_TN = torch.empty((num_tokens, num_rows), dtype=out_dtype, device=device)
    assert out_TN.shape == (num_tokens, num_rows) and out_TN.stride(1) == 1, "outputs do not fit"
    sums = out_TN
    if not is_whole:
        sums = torch.empty((num_parts, num_tokens, num_rows), dtype=torch.float32, device=device)
    supers = weight.supers
    gemv_kernel[(triton.cdiv(num_rows, block_n), num_parts)](
        x.codes_TK.view(torch.int32), x.scales_TG, x.sums_TG, weight.low.view(torch.int32),
        None if weight.high is None else weight.high.view(torch.int32), weight.scales, weight.mins,
        weight.scales if supers is None else supers, bias_N if is_whole else None, sums,
        num_rows, num_pieces, pieces_per_part, weight.low.shape[1] // 4,
        0 if weight.high is None else weight.high.shape[1] // 4,
        0 if supers is None else supers.shape[1], sums.stride(-2),
        T=num_tokens, BLOCK_N=block_n, PIECES=pieces, WHOLE=num_pieces % pieces == 0,
        ASM=has_ptx(device), num_warps=max(1, pieces // 32), **launch_options(device),
        **layout_constexprs(weight.layout),
    )  # fmt: skip
    if not is_whole:
        sum_parts(sums, bias_N, out_TN.dtype, out_TN=out_TN)
    return out_TN


def _tiling(
    num_rows: int, num_pieces: int, num_tokens: int, group_size: int, num_multiprocessors: int
) -> tuple[int, int, int]:
    """BLOCK_N, PIECES, parts of the columns: measured on an H100 with Q4_K and Q6_K.

    A program of one warp over 2048 columns (two with groups of 16, whose pieces are half as long)
    is best throughout. More rows pay once their activations are read for several tokens.
    """
    pieces = 32 if group_size == 32 else 64
    block_n = 2 if num_tokens <= 32 // group_size else 4
    num_programs = triton.cdiv(num_rows, block_n) * (pieces // 32)
    num_parts = 1
    while num_programs * num_parts < 4 * num_multiprocessors and num_parts * pieces < num_pieces:
        num_parts *= 2
    return block_n, pieces, num_parts


_INTEGERS = ("num_rows", "num_pieces", "pieces_per_part", "out_stride")


def _aot_case(type_name: str, num_tokens: int) -> AotCase:
    layout = LAYOUTS[type_name]
    return AotCase(
        name=f"gemv_{type_name}_{num_tokens}",
        kernel=gemv_kernel,
        signature={
            "x": "*i32",
            "x_scales": "*fp32",
            "x_sums": "*i16",
            "bias": "*fp16",
            "out": "*fp16",
            **dict.fromkeys(_INTEGERS, "i32:16"),
            **aot_signature(layout, plane="i32"),
        },
        constexprs={
            "T": num_tokens,
            "BLOCK_N": 4 if num_tokens == 1 else 2,  # more take minutes to compile for AMD
            "PIECES": 32,
            "WHOLE": num_tokens == 1,
            "ASM": True,
            "PDL": True,
            **layout_constexprs(layout),
        },
        num_warps=1,
    )


AOT_CASES: tuple[AotCase, ...] = (
    *(_aot_case(type_name, 1) for type_name in LAYOUTS),
    *(_aot_case(type_name, MAX_ROWS) for type_name in ("Q4_K", "Q6_K", "Q8_0", "IQ4_XS")),
)
