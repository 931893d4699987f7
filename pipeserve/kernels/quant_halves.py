"""Device functions that turn packed codes into f16 or bf16 for the tensor cores.

Called by the kernels of the quant family only. The inline PTX works on four neighbouring codes in a
register and never converts an integer: a byte under the exponent of 1024 (f16) or 128 (bf16) is
that number plus the byte, and one subtraction, offset included, leaves the code. All exact.
"""

# Triton's decorator and its functions' arguments have no types to annotate.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-decorators=False

from __future__ import annotations

import triton
import triton.language as tl

from pipeserve.kernels.quant_decode import (
    blocks_per_plane,
    has_min,
    load_scales,
    plane_shift,
    table_asm,
    table_value,
)


@triton.constexpr_function
def _widen(source: str, targets: tuple[str, str], offset: int, signed: bool, is_bf16: bool) -> str:
    """PTX: 4 bytes in a register -> two pairs of halves. Needs registers e, c and f0 to f3."""
    flip = f"xor.b32 e, {source}, 0x80808080;" if signed else f"mov.b32 e, {source};"
    if not is_bf16:
        minus = 0x64006400 + 0x10001 * (offset + 128 * signed)  # 1024 + ...
        return f"""{flip} mov.b32 c, {minus:#x};
            prmt.b32 f0, e, 0x64646464, 0x4140; prmt.b32 f1, e, 0x64646464, 0x4342;
            sub.f16x2 {targets[0]}, f0, c; sub.f16x2 {targets[1]}, f1, c;"""
    if not signed:
        minus = 0xC300C300 + 0x10001 * offset  # -128 - offset
        return f"""{flip} mov.b32 c, {minus:#x}; mov.b32 f2, 0x3F803F80;
            prmt.b32 f0, e, 0x43434343, 0x4140; prmt.b32 f1, e, 0x43434343, 0x4342;
            fma.rn.bf16x2 {targets[0]}, f0, f2, c; fma.rn.bf16x2 {targets[1]}, f1, f2, c;"""
    # Eight bits do not fit beside bf16's exponent: by way of 2^23 in float32.
    steps = [
        f"prmt.b32 f{i}, e, 0x4B000000, 0x754{i}; sub.f32 f{i}, f{i}, 0f4B000080;" for i in range(4)
    ]
    return f"""{flip} {" ".join(steps)}
        cvt.rn.bf16x2.f32 {targets[0]}, f1, f0; cvt.rn.bf16x2.f32 {targets[1]}, f3, f2;"""


_REGISTERS = ".reg .b32 first, second, e, c, f0, f1, f2, f3;"


@triton.constexpr_function
def _bytes_asm(is_bf16):
    """PTX: 4 signed bytes -> 4 halves."""
    return f"{{ {_REGISTERS} {_widen('$2', ('$0', '$1'), 0, True, is_bf16)} }}"


@triton.constexpr_function
def _codes_asm(low_bits, high_bits, low_shift, high_shift, offset, table, is_bf16):
    """PTX: 4 plane bytes, and 4 of the high plane, -> 4 halves of either half of the block."""
    if table:
        look_up = table_asm(table).replace("$2", "$4")
        look_up = look_up.replace("$0", "first").replace("$1", "second")
        return f"""{{ {_REGISTERS} {look_up}
            {_widen("first", ("$0", "$1"), 0, True, is_bf16)}
            {_widen("second", ("$2", "$3"), 0, True, is_bf16)} }}"""
    if low_bits == 4 and not high_bits and not is_bf16:
        # The high nibble needs no shift: 1024 + 16 code, times 1/16, minus 64.
        return f"""{{ {_REGISTERS}
            prmt.b32 f0, $4, 0x64646464, 0x4140; prmt.b32 f1, $4, 0x64646464, 0x4342;
            and.b32 f2, f0, 0xFFF0FFF0; and.b32 f3, f1, 0xFFF0FFF0;
            and.b32 f0, f0, 0xFF0FFF0F; and.b32 f1, f1, 0xFF0FFF0F;
            mov.b32 c, {0x64006400 + 0x10001 * offset:#x};
            sub.f16x2 $0, f0, c; sub.f16x2 $1, f1, c;
            mov.b32 c, {0xD400D400 + 0x100010 * offset:#x}; mov.b32 e, 0x2C002C00;
            fma.rn.f16x2 $2, f2, e, c; fma.rn.f16x2 $3, f3, e, c; }}"""
    mask = 0x01010101 * ((1 << low_bits) - 1)
    steps = [
        f"shr.u32 first, $4, {low_shift}; and.b32 first, first, {mask:#x};",
        f"shr.u32 second, $4, {low_shift + low_bits}; and.b32 second, second, {mask:#x};",
    ]
    if high_bits:
        mask = 0x01010101 * ((1 << high_bits) - 1) << low_bits
        shifts = (("first", high_shift), ("second", high_shift + high_bits))
        for target, shift in ((name, start - low_bits) for name, start in shifts):
            move = f"shr.u32 e, $5, {shift};" if shift >= 0 else f"shl.b32 e, $5, {-shift};"
            steps.append(f"{move} and.b32 e, e, {mask:#x}; or.b32 {target}, {target}, e;")
    return f"""{{ {_REGISTERS} {" ".join(steps)}
        {_widen("first", ("$0", "$1"), offset, False, is_bf16)}
        {_widen("second", ("$2", "$3"), offset, False, is_bf16)} }}"""


@triton.constexpr_function
def _twice(dtype):
    return dtype, dtype


@triton.jit
def signed_halves(codes, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """Signed bytes, held as uint8, in DTYPE."""
    if ASM and DTYPE == tl.bfloat16:
        halves = tl.inline_asm_elementwise(
            _bytes_asm(True), "=r,=r,r", [codes], tl.bfloat16, is_pure=True, pack=4
        )
    elif ASM:
        halves = tl.inline_asm_elementwise(
            _bytes_asm(False), "=r,=r,r", [codes], tl.float16, is_pure=True, pack=4
        )
    else:
        halves = codes.to(tl.int8, bitcast=True).to(DTYPE)
    return halves


@triton.jit
def code_halves(
    low, high, LOW_SHIFT: tl.constexpr, HIGH_SHIFT: tl.constexpr, LOW_BITS: tl.constexpr,
    HIGH_BITS: tl.constexpr, OFFSET: tl.constexpr, TABLE: tl.constexpr, DTYPE: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """Plane bytes (uint8, neighbouring columns along the last axis) -> code - offset, or the
    table's value, in DTYPE: of the low half of the block, of the high half."""
    if ASM:
        asm: tl.constexpr = _codes_asm(
            LOW_BITS, HIGH_BITS, LOW_SHIFT, HIGH_SHIFT, OFFSET, TABLE, DTYPE == tl.bfloat16
        )
        if HIGH_BITS > 0:
            first, second = tl.inline_asm_elementwise(
                asm, "=r,=r,=r,=r,r,r", [low, high], _twice(DTYPE), is_pure=True, pack=4
            )
        else:
            first, second = tl.inline_asm_elementwise(
                asm, "=r,=r,=r,=r,r", [low], _twice(DTYPE), is_pure=True, pack=4
            )
    else:
        word = low.to(tl.int32) >> LOW_SHIFT
        a = word & ((1 << LOW_BITS) - 1)
        b = (word >> LOW_BITS) & ((1 << LOW_BITS) - 1)
        if TABLE != "":
            a, b = table_value(a, TABLE), table_value(b, TABLE)
        if HIGH_BITS > 0:
            word = high.to(tl.int32) >> HIGH_SHIFT
            a |= (word & ((1 << HIGH_BITS) - 1)) << LOW_BITS
            b |= ((word >> HIGH_BITS) & ((1 << HIGH_BITS) - 1)) << LOW_BITS
        first, second = (a - OFFSET).to(DTYPE), (b - OFFSET).to(DTYPE)
    return first, second


@triton.jit
def _scaled(codes, scale, minimum, SCALES: tl.constexpr):
    """[N, C] codes by scales [N, S], each for C / S columns, in the type of the codes."""
    rows: tl.constexpr = codes.shape[0]
    columns: tl.constexpr = codes.shape[1]
    shape: tl.constexpr = (rows, scale.shape[1], columns // scale.shape[1])
    wide = tl.broadcast_to(scale.to(codes.dtype)[:, :, None], shape)
    weights = codes * tl.reshape(wide, (rows, columns))
    if has_min(SCALES):
        less = tl.broadcast_to(minimum.to(codes.dtype)[:, :, None], shape)
        weights -= tl.reshape(less, (rows, columns))
    return weights


@triton.jit
def block_weights(
    low, high, scales, mins, supers, row, first_block, num_blocks, low_stride, high_stride,
    super_stride, PHASE: tl.constexpr, STEP: tl.constexpr, WIDE: tl.constexpr, EVEN: tl.constexpr,
    LOW_BITS: tl.constexpr, HIGH_BITS: tl.constexpr, GROUP: tl.constexpr, OFFSET: tl.constexpr,
    SCALES: tl.constexpr, TABLE: tl.constexpr, CODES: tl.constexpr, DTYPE: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """Weights [N, WIDE * 32] of the low halves of WIDE blocks, and of the high halves.

    row: [N]. The blocks are first_block and every STEP-th from there, STEP a multiple of the blocks
    that share a plane and PHASE first_block modulo that. Without EVEN, blocks past the end read as
    the last. Codes are unpacked to CODES, f16 or bf16, exactly, and scaled in DTYPE.
    """
    column = tl.arange(0, WIDE * 32)
    block = first_block + column // 32 * STEP
    scale_column = tl.arange(0, WIDE * (32 // GROUP))
    scale_block = first_block + scale_column // (32 // GROUP) * STEP
    if not EVEN:
        block = tl.minimum(block, num_blocks - 1)
        scale_block = tl.minimum(scale_block, num_blocks - 1)
    byte = column % 32
    if LOW_BITS == 8:
        offset = (row * low_stride)[:, None] + (block * 64 + byte)[None, :]
        first = signed_halves(tl.load(low + offset), CODES, ASM)
        second = signed_halves(tl.load(low + offset + 32), CODES, ASM)
    else:
        plane = block // blocks_per_plane(LOW_BITS)
        low_bytes = tl.load(low + ((row * low_stride)[:, None] + (plane * 32 + byte)[None, :]))
        high_bytes = low_bytes
        if HIGH_BITS > 0:
            plane = block // blocks_per_plane(HIGH_BITS)
            offset = (row * high_stride)[:, None] + (plane * 32 + byte)[None, :]
            high_bytes = tl.load(high + offset)
        first, second = code_halves(
            low_bytes, high_bytes, plane_shift(LOW_BITS, PHASE), plane_shift(HIGH_BITS, PHASE),
            LOW_BITS, HIGH_BITS, OFFSET, TABLE, CODES, ASM,
        )  # fmt: skip
    s_a, s_b, m_a, m_b = load_scales(
        scales, mins, supers, (row * num_blocks)[:, None] + scale_block[None, :],
        (row * super_stride)[:, None] + (scale_block // 4)[None, :],
        (scale_column % (32 // GROUP))[None, :], None, SCALES,
    )  # fmt: skip
    first = _scaled(first.to(DTYPE), s_a, m_a, SCALES)
    second = _scaled(second.to(DTYPE), s_b, m_b, SCALES)
    return first, second
