// Planar weights -> operand fragments of the tensor cores, for one thread. Knows the layout of
// quant_layout.py and the arrangement of quant_mma.cu in shared memory; compiles for the CPU too,
// where a test compares it with the twin. Codes never pass an integer conversion: a byte under the
// exponent of 1024 (0x64..) is that number plus the byte. f16x2 values are named by what both hold.
//
// Of a step of 256 columns each thread of a quad has a unit of its own, 64 columns under one word
// of scales: its bytes lie side by side, and few scales serve many weights. The columns of one
// product, which quad q has as 2q, 2q + 1, 2q + 8 and 2q + 9, are therefore not neighbours in the
// matrix; rows of x come in the same order (interleaved_rows.py).

constexpr int HALF = 0, HALF_MIN = 1, POWER = 2, U8_MIN = 3, I8 = 4, I8_PAIR = 5, NIBBLE_MIN = 6;
constexpr bool HAS_MIN = SCALES == HALF_MIN || SCALES == U8_MIN || SCALES == NIBBLE_MIN;
constexpr bool HAS_SUPER = SCALES >= U8_MIN;
constexpr bool HAS_SHORT_WORDS = SCALES == POWER || SCALES == I8_PAIR;

constexpr int STEP_COLUMNS = 256;                    // of a pipeline stage
constexpr int LOW_BYTES = STEP_COLUMNS * LOW_BITS / 8;   // of a row
constexpr int HIGH_BYTES = STEP_COLUMNS * HIGH_BITS / 8;
constexpr int LOW_ROW = LOW_BYTES < 128 ? LOW_BYTES : 128;  // wider rows lie in two tiles
constexpr int PLANES = LOW_BITS == 8 ? 2 : 1;               // of 32 bytes, of a row of a unit
constexpr int GROUPS = 64 / GROUP;
constexpr u32 EXPONENT = 0x64646464, EXPONENTS = 0x64006400;

// An integer in [1, 2047], negated, as both halves of a f16x2.
DEVICE constexpr u32 minus(int value) {
    int exponent = 0;
    while (value >> (exponent + 1)) exponent++;
    u32 half = 0x8000u | (u32)(exponent + 15) << 10 | ((u32)value << 10 >> exponent & 1023);
    return half * 0x10001u;
}

DEVICE constexpr u32 inverse_power(int exponent) { return ((u32)(15 - exponent) << 10) * 0x10001u; }

// Scale and negated minimum of every group of a row's unit.
struct UnitScales {
    u32 scale[GROUPS], less[GROUPS];
};

DEVICE void spread(u32 (&to)[GROUPS], int first, u32 two) {
    to[first] = prmt(two, 0, 0x1010), to[first + 1] = prmt(two, 0, 0x3232);
}

// word, min_word: of the unit; super: of the row's 256 columns.
DEVICE UnitScales unit_scales(u32 word, u32 min_word, u32 super) {
    UnitScales unit;
    u32 scale = prmt(super, 0, 0x1010), minimum = prmt(super, 0, 0x3232) ^ 0x80008000u;
    if (SCALES == HALF || SCALES == HALF_MIN) {
        spread(unit.scale, 0, word);
        if (HAS_MIN) spread(unit.less, 0, min_word ^ 0x80008000u);
    } else if (SCALES == POWER) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            u32 exponent = word >> (8 * i) & 255;
            unit.scale[i] = float_bits_to_half2(exponent < 1 ? 0 : (exponent - 1) << 23);
        }
    } else if (SCALES == U8_MIN) {
        u32 less = fma2(prmt(word, EXPONENT, 0x4342), minimum, mul2(minimum, minus(1024)));
        spread(unit.scale, 0, fma2(prmt(word, EXPONENT, 0x4140), scale, mul2(scale, minus(1024))));
        spread(unit.less, 0, less);
    } else {
        if (!HAS_MIN) word ^= 0x80808080u;
#pragma unroll
        for (int i = 0; i < GROUPS; i += 2) {
            u32 two = prmt(word, EXPONENT, 0x4140 + 0x0101 * i);
            if (HAS_MIN) {
                u32 less = fma2(two & 0xFFF0FFF0u, inverse_power(4), minus(64));
                two = fma2(two & 0xFF0FFF0Fu, scale, mul2(scale, minus(1024)));
                spread(unit.less, i, mul2(less, minimum));
            } else {
                two = mul2(add2(two, minus(1024 + 128)), scale);
            }
            spread(unit.scale, i, two);
        }
    }
    return unit;
}

DEVICE u32 shifted(u32 word, int left) { return left >= 0 ? word << left : word >> -left; }

// Codes of columns 32 * UPPER + i and i + 2 out of words that hold the planes' bytes i to i + 3
// from bit 8 * ODD up, shifted so that the first of their unit's bits are the lowest.
template <int UPPER, int ODD>
DEVICE u32 code_pair(u32 low, u32 high) {
    if (LOW_BITS == 8)
        return add2(and_or(low >> 8 * ODD, 0x00FF00FFu, EXPONENTS), minus(1024 + 128));
    constexpr int at = LOW_BITS * UPPER;
    constexpr u32 mask = (1u << LOW_BITS) - 1 << at;
    u32 pair = and_or(low >> 8 * ODD, mask * 0x10001u, EXPONENTS);
    if (HIGH_BITS) {
        constexpr u32 high_mask = (1u << HIGH_BITS) - 1 << at + LOW_BITS;
        constexpr int left = at + LOW_BITS - (8 * ODD + HIGH_BITS * UPPER);
        pair = and_or(shifted(high, left), high_mask * 0x10001u, pair);
    }
    if (at == 0) return add2(pair, minus(1024 + OFFSET));
    return fma2(pair, inverse_power(at), minus((1024 >> at) + OFFSET));
}

// The low and high nibbles of the two lowest bytes, looked up; the table holds bytes raised by 128.
DEVICE void table_pairs(u32 bytes, u32 &lower, u32 &upper) {
    u32 select = bytes & 0x7777;
    u32 top = (bytes >> 1 & 0x4444) | 0x3210;
    u32 values = prmt(prmt(TABLE_0, TABLE_1, select), prmt(TABLE_2, TABLE_3, select), top);
    lower = add2(prmt(values, EXPONENT, 0x4240), minus(1024 + 128));
    upper = add2(prmt(values, EXPONENT, 0x4341), minus(1024 + 128));
}

// Of four bytes of the planes, or of both: codes[UPPER][ODD].
DEVICE void code_pairs(u32 (&codes)[2][2], const u32 (&low)[PLANES], u32 high) {
    if (TABLE) {
        u32 even_first = prmt(low[0], 0, 0x3120);
        table_pairs(even_first, codes[0][0], codes[1][0]);
        table_pairs(even_first >> 16, codes[0][1], codes[1][1]);
        return;
    }
    codes[0][0] = code_pair<0, 0>(low[0], high), codes[0][1] = code_pair<0, 1>(low[0], high);
    codes[1][0] = code_pair<1, 0>(low[PLANES - 1], high);
    codes[1][1] = code_pair<1, 1>(low[PLANES - 1], high);
}

DEVICE u32 weigh(u32 code, u32 scale, u32 less) {
    return HAS_MIN ? fma2(code, scale, less) : mul2(code, scale);
}

// Where the 16 bytes of a row begin in a plane's tile, which is swizzled by bits 7 and up.
DEVICE u32 sixteen_bytes(int row, int row_bytes, int which) {
    u32 line = row * row_bytes;
    return (line ^ (line >> 3 & (row_bytes - 16))) ^ 16 * which;
}

// Where a thread's bytes of its unit begin, relative to the planes. tile_bytes: between the two
// tiles of 8-bit rows.
DEVICE u32 low_place(int row, int quad, u32 tile_bytes) {
    if (LOW_BITS == 8) return quad / 2 * tile_bytes + sixteen_bytes(row, LOW_ROW, quad % 2 * 4);
    return sixteen_bytes(row, LOW_ROW, LOW_BITS == 4 ? quad * 2 : quad / 2 * 2);
}
DEVICE u32 high_place(int row, int quad) {
    if (!HIGH_BITS) return 0;
    return sixteen_bytes(row, HIGH_BYTES, HIGH_BITS == 2 ? quad / 2 * 2 : 0);
}

// Half of the bytes of a unit, of two rows 8 apart.
struct Bytes {
    u32 low[2][PLANES][4], high[2][4];
};

template <int HALF_UNIT>
DEVICE void load_bytes(Bytes &bytes, u32 low, u32 high) {
#pragma unroll
    for (int row = 0; row < 2; row++) {
#pragma unroll
        for (int plane = 0; plane < PLANES; plane++)
            load_shared_u128(bytes.low[row][plane],
                             (low ^ (32 * plane + 16 * HALF_UNIT)) + row * 8 * LOW_ROW);
        if (HIGH_BITS)
            load_shared_u128(bytes.high[row], (high ^ 16 * HALF_UNIT) + row * 8 * HIGH_BYTES);
    }
}

// Fragments a[step] of the four products of a step's BLOCK-th 64 interleaved columns, for two rows.
template <int BLOCK>
DEVICE void unpack(u32 (&a)[4][4], const Bytes &bytes, const UnitScales (&units)[2], int quad) {
#pragma unroll
    for (int row = 0; row < 2; row++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            constexpr int first_word = 2 * (BLOCK % 2);
            u32 low[PLANES], high = 0, codes[2][2];
#pragma unroll
            for (int plane = 0; plane < PLANES; plane++)
                low[plane] = bytes.low[row][plane][first_word + i];
            if (LOW_BITS == 2) low[0] >>= 4 * (quad & 1);
            if (HIGH_BITS) high = bytes.high[row][first_word + i];
            if (HIGH_BITS == 2) high >>= 4 * (quad & 1);
            if (HIGH_BITS == 1) high >>= 2 * quad;
            if (LOW_BITS == 8) low[0] ^= 0x80808080u, low[PLANES - 1] ^= 0x80808080u;
            code_pairs(codes, low, high);
#pragma unroll
            for (int upper = 0; upper < 2; upper++) {
                int group = GROUP == 32 ? upper : 2 * upper + BLOCK / 2;
#pragma unroll
                for (int odd = 0; odd < 2; odd++)
                    a[2 * i + upper][row + 2 * odd] =
                        weigh(codes[upper][odd], units[row].scale[group], units[row].less[group]);
            }
        }
}
