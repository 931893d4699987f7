"""Device functions that take planar weights apart: packed codes, table look-ups, scales.

Called by the kernels of the quant family only; LOW_BITS, HIGH_BITS, OFFSET, TABLE and SCALES are
QuantLayout's fields as compile-time constants. ASM turns on inline PTX for NVIDIA; without it the
same values come from plain Triton, which also runs in its interpreter.

The unit of work is a block: 64 columns, the low half of which are its codes 0 to 31.
"""

# Triton's decorator and its functions' arguments have no types to annotate.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-decorators=False

from __future__ import annotations

import triton
import triton.language as tl

from pipeserve.kernels.quant_layout import IQ4_VALUES, MXFP4_VALUES, QuantLayout

_TABLES: dict[tuple[int, ...] | None, str] = {
    None: "",
    IQ4_VALUES: "iq4",
    MXFP4_VALUES: "mxfp4",
}


def layout_constexprs(layout: QuantLayout) -> dict[str, object]:
    """The compile-time constants that every kernel of the family takes."""
    return {
        "LOW_BITS": layout.low_bits,
        "HIGH_BITS": layout.high_bits,
        "GROUP": layout.group_size,
        "OFFSET": layout.offset,
        "SCALES": layout.scale_kind,
        "TABLE": _TABLES[layout.table],
    }


def aot_signature(layout: QuantLayout, *, plane: str) -> dict[str, str]:
    """Triton types of the arguments that hold a planar weight; plane is the planes' element."""
    return {
        "low": f"*{plane}",
        "high": f"*{plane}",
        "scales": "*i16" if layout.word_bytes == 2 else "*i32",
        "mins": "*i32",
        "supers": "*i32" if layout.has_min else "*i16",
        **dict.fromkeys(("low_stride", "high_stride", "super_stride"), "i32:16"),
    }


@triton.constexpr_function
def has_min(scale_kind):
    return scale_kind.endswith("_min")


@triton.constexpr_function
def blocks_per_plane(bits):
    """Blocks whose codes share the 32 bytes of a plane."""
    return max(1, 4 // bits)


@triton.constexpr_function
def plane_shift(bits, phase):
    """Where in a plane's bytes the codes of the phase-th block that shares it begin."""
    return phase % max(1, 4 // bits) * 2 * bits if bits else 0


@triton.constexpr_function
def _table_long(table, half):
    """Eight table entries as the bytes of a signed 64-bit integer."""
    values = IQ4_VALUES if table == "iq4" else MXFP4_VALUES
    eight = bytes(value & 255 for value in values[8 * half : 8 * half + 8])
    return int.from_bytes(eight, "little", signed=True)


@triton.constexpr_function
def table_asm(table):
    """PTX: a word of 8 nibbles -> the table's bytes for the low and for the high nibbles.

    prmt picks bytes by 3-bit selectors, so the two halves of the table are looked up apart; the
    nibbles' top bits then pick between them.
    """
    values = IQ4_VALUES if table == "iq4" else MXFP4_VALUES
    words = [
        int.from_bytes(bytes(value & 255 for value in values[i : i + 4]), "little")
        for i in range(0, 16, 4)
    ]
    return f"""{{
        .reg .b32 sel, top, a, b, r, q, t0, t1, t2, t3;
        mov.b32 t0, {words[0]:#x}; mov.b32 t1, {words[1]:#x};
        mov.b32 t2, {words[2]:#x}; mov.b32 t3, {words[3]:#x};
        and.b32 sel, $2, 0x77777777;
        shr.u32 top, $2, 1; and.b32 top, top, 0x44444444; or.b32 top, top, 0x32103210;
        prmt.b32 a, t0, t1, sel; prmt.b32 b, t2, t3, sel; prmt.b32 r, a, b, top;
        shr.u32 sel, sel, 16; shr.u32 top, top, 16;
        prmt.b32 a, t0, t1, sel; prmt.b32 b, t2, t3, sel; prmt.b32 q, a, b, top;
        prmt.b32 $0, r, q, 0x6420; prmt.b32 $1, r, q, 0x7531;
    }}"""


@triton.jit
def dot4(a, b, c, ASM: tl.constexpr):
    """c + the products of 4 signed bytes; all int32."""
    if ASM:
        c = tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], tl.int32, is_pure=True, pack=1
        )
    else:
        for i in tl.static_range(4):
            c += ((a << (24 - 8 * i)) >> 24) * ((b << (24 - 8 * i)) >> 24)
    return c


@triton.jit
def table_value(index, TABLE: tl.constexpr):
    """The signed table entry, int32, of indices 0 to 15."""
    first = tl.full(index.shape, _table_long(TABLE, 0), tl.int64)
    second = tl.full(index.shape, _table_long(TABLE, 1), tl.int64)
    eight = tl.where(index < 8, first, second)
    return ((eight >> ((index & 7) * 8).to(tl.int64)) & 255).to(tl.int8).to(tl.int32)


@triton.jit
def table_words(word, TABLE: tl.constexpr, ASM: tl.constexpr):
    """A word of 8 nibbles -> words of 4 signed bytes: of the low nibbles, of the high ones."""
    if ASM:
        low, high = tl.inline_asm_elementwise(
            table_asm(TABLE), "=r,=r,r", [word], (tl.int32, tl.int32), is_pure=True, pack=1
        )
    else:
        low = tl.zeros_like(word)
        high = tl.zeros_like(word)
        for i in tl.static_range(4):
            low |= (table_value((word >> (8 * i)) & 15, TABLE) & 255) << (8 * i)
            high |= (table_value((word >> (8 * i + 4)) & 15, TABLE) & 255) << (8 * i)
    return low, high


@triton.jit
def packed_codes(
    low, high, low_shift, high_shift, LOW_BITS: tl.constexpr, HIGH_BITS: tl.constexpr,
    TABLE: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Plane words of less than 8 bits -> words of 4 codes: of the low half, of the high half.

    The shifts lead to the block's lowest bits in a plane that several blocks share.
    """
    if TABLE != "":
        first, second = table_words(low, TABLE, ASM)
    else:
        mask: tl.constexpr = 0x01010101 * ((1 << LOW_BITS) - 1)
        if LOW_BITS < 4:
            low = low >> low_shift
        first = low & mask
        second = (low >> LOW_BITS) & mask
        if HIGH_BITS > 0:
            high_mask: tl.constexpr = 0x01010101 * ((1 << HIGH_BITS) - 1) << LOW_BITS
            high = high >> high_shift
            first |= (high << LOW_BITS) & high_mask
            second |= (high << (LOW_BITS - HIGH_BITS)) & high_mask
    return first, second


@triton.jit
def _half_value(word):
    """The lower 16 bits as f16, in float32."""
    return word.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _power_value(exponent):
    """Half of 2^(exponent - 127): e8m0 for tables of doubled values."""
    bits = tl.where(exponent < 2, 0x00200000 << tl.minimum(exponent, 1), (exponent - 1) << 23)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _load(pointer, mask):
    if mask is None:
        word = tl.load(pointer)
    else:
        word = tl.load(pointer, mask=mask, other=0)
    return word


@triton.jit
def load_scale_words(scales, mins, supers, index, super_index, mask, SCALES: tl.constexpr):
    """What scale_values takes of the blocks at index, as it lies. Where a mask is given and off,
    all is 0."""
    word = _load(scales + index, mask)
    other = word
    if SCALES == "half_min":
        other = _load(mins + index, mask)
    elif SCALES != "half" and SCALES != "power":
        other = _load(supers + super_index, mask)
    return word, other


@triton.jit
def scale_values(word, other, half, SCALES: tl.constexpr):
    """Scales and minima, float32, of the low and the high half of blocks, from their words.

    half (0 or 1) says which 16 columns of each half, where groups are that small. Without minima
    the last two are the first two.
    """
    if SCALES == "half" or SCALES == "half_min":
        first, second = _half_value(word), _half_value(word >> 16)
        first_min, second_min = first, second
        if SCALES == "half_min":
            first_min, second_min = _half_value(other), _half_value(other >> 16)
    elif SCALES == "power":
        first = _power_value(word.to(tl.int32) & 255)
        second = _power_value((word.to(tl.int32) >> 8) & 255)
        first_min, second_min = first, second
    else:
        scale = _half_value(other)
        if SCALES == "i8_pair":
            first = scale * ((word.to(tl.int32) << 24) >> 24).to(tl.float32)
            second = scale * ((word.to(tl.int32) << 16) >> 24).to(tl.float32)
            first_min, second_min = first, second
        elif SCALES == "i8":
            first = scale * ((word << (24 - 8 * half)) >> 24).to(tl.float32)
            second = scale * ((word << (8 - 8 * half)) >> 24).to(tl.float32)
            first_min, second_min = first, second
        elif SCALES == "u8_min":
            minimum = _half_value(other >> 16)
            first = scale * (word & 255).to(tl.float32)
            second = scale * ((word >> 8) & 255).to(tl.float32)
            first_min = minimum * ((word >> 16) & 255).to(tl.float32)
            second_min = minimum * ((word >> 24) & 255).to(tl.float32)
        else:
            tl.static_assert(SCALES == "nibble_min")
            minimum = _half_value(other >> 16)
            word = word >> (8 * half)
            first = scale * (word & 15).to(tl.float32)
            second = scale * ((word >> 16) & 15).to(tl.float32)
            first_min = minimum * ((word >> 4) & 15).to(tl.float32)
            second_min = minimum * ((word >> 20) & 15).to(tl.float32)
    return first, second, first_min, second_min


@triton.jit
def load_scales(scales, mins, supers, index, super_index, half, mask, SCALES: tl.constexpr):
    """scale_values of the blocks at index; where a mask is given and off, all are 0."""
    word, other = load_scale_words(scales, mins, supers, index, super_index, mask, SCALES)
    return scale_values(word, other, half, SCALES)
