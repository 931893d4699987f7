// Planar weights -> operand fragments of the tensor cores, for one thread. Knows the layout of
// quant_layout.py and the arrangement of quant_mma.cu in shared memory; compiles for the CPU too,
// where a test compares it with the twin. Codes never pass an integer conversion: a byte under the
// exponent of 1024 (0x64..) is that number plus the byte. f16x2 values are named by what both hold.

constexpr int HALF = 0, HALF_MIN = 1, POWER = 2, U8_MIN = 3, I8 = 4, I8_PAIR = 5, NIBBLE_MIN = 6;
constexpr bool HAS_MIN = SCALES == HALF_MIN || SCALES == U8_MIN || SCALES == NIBBLE_MIN;
constexpr bool HAS_SUPER = SCALES >= U8_MIN;
constexpr bool HAS_SHORT_WORDS = SCALES == POWER || SCALES == I8_PAIR;

constexpr int STEP_COLUMNS = 256;                    // of a pipeline stage
constexpr int LOW_BYTES = STEP_COLUMNS * LOW_BITS / 8;   // of a row
constexpr int HIGH_BYTES = STEP_COLUMNS * HIGH_BITS / 8;
constexpr int LOW_ROW = LOW_BYTES < 128 ? LOW_BYTES : 128;  // wider rows lie in two tiles
constexpr u32 EXPONENT = 0x64646464;

// An integer in [1, 2047], negated, as both halves of a f16x2.
DEVICE constexpr u32 minus(int value) {
    int exponent = 0;
    while (value >> (exponent + 1)) exponent++;
    u32 half = 0x8000u | (u32)(exponent + 15) << 10 | ((u32)value << 10 >> exponent & 1023);
    return half * 0x10001u;
}

DEVICE constexpr u32 inverse_power(int exponent) { return ((u32)(15 - exponent) << 10) * 0x10001u; }

// The words of scales of a row's 256 columns, and what multiplies them.
struct RowScales {
    u32 word[4], min_word[4];
    u32 scale, scale_bias, minimum, minimum_bias;
};

DEVICE void prepare(RowScales &row, u32 super) {
    if (!HAS_SUPER) return;
    row.scale = prmt(super, 0, 0x1010);
    if (HAS_MIN) {
        row.scale_bias = mul2(row.scale, minus(1024));
        row.minimum = prmt(super, 0, 0x3232) ^ 0x80008000u;
        row.minimum_bias = mul2(row.minimum, minus(1024));
    }
    if (SCALES == I8 || SCALES == I8_PAIR)
        for (int i = 0; i < 4; i++) row.word[i] ^= 0x80808080u;
}

// Scale and negated minimum of the 16 columns at 16 * STEP of the row's BLOCK-th 64.
template <int BLOCK, int STEP>
DEVICE void group_scale(const RowScales &row, u32 &scale, u32 &less) {
    constexpr int half = STEP / 2;
    u32 word = row.word[BLOCK];
    if (SCALES == HALF || SCALES == HALF_MIN) {
        scale = prmt(word, 0, half ? 0x3232 : 0x1010);
        if (HAS_MIN) less = prmt(row.min_word[BLOCK], 0, half ? 0x3232 : 0x1010) ^ 0x80008000u;
    } else if (SCALES == POWER) {
        u32 exponent = word >> (8 * half) & 255;
        scale = float_bits_to_half2(exponent < 1 ? 0 : (exponent - 1) << 23);
    } else if (SCALES == U8_MIN) {
        scale = fma2(prmt(word, EXPONENT, 0x4040 + 0x0101 * half), row.scale, row.scale_bias);
        u32 minimum = prmt(word, EXPONENT, 0x4242 + 0x0101 * half);
        less = fma2(minimum, row.minimum, row.minimum_bias);
    } else if (SCALES == NIBBLE_MIN) {
        u32 both = prmt(word, EXPONENT, 0x4040 + 0x0101 * STEP);
        scale = fma2(both & 0xFF0FFF0Fu, row.scale, row.scale_bias);
        less = fma2(both & 0xFFF0FFF0u, inverse_power(4), minus(64));
        less = mul2(less, row.minimum);
    } else {
        constexpr int byte = SCALES == I8 ? STEP : half;
        u32 code = prmt(word, EXPONENT, 0x4040 + 0x0101 * byte);
        scale = mul2(add2(code, minus(1024 + 128)), row.scale);
    }
}

// Codes of two neighbouring columns out of the bytes that hold them, one byte per 16 bits; low has
// the exponent above its bytes, high zeros.
template <int BLOCK, int UPPER>
DEVICE u32 code_pair(u32 low, u32 high) {
    constexpr int at = LOW_BITS == 2 ? 4 * (BLOCK & 1) + 2 * UPPER : 4 * UPPER;
    constexpr u32 mask = ((1u << LOW_BITS) - 1) << at;
    u32 pair = low & (0xFF00FF00u | mask * 0x10001u);
    if (HIGH_BITS) {
        constexpr int from = HIGH_BITS == 2 ? 4 * (BLOCK & 1) + 2 * UPPER : 2 * BLOCK + UPPER;
        constexpr int to = at + LOW_BITS;
        constexpr u32 high_mask = ((1u << HIGH_BITS) - 1) << to;
        u32 moved = to >= from ? high << (to >= from ? to - from : 0)
                               : high >> (to >= from ? 0 : from - to);
        pair |= moved & high_mask * 0x10001u;
    }
    if (at == 0) return add2(pair, minus(1024 + OFFSET));
    return fma2(pair, inverse_power(at), minus((1024 >> at) + OFFSET));
}

// The two bytes' low and high nibbles, looked up; the table holds bytes raised by 128.
DEVICE void table_pairs(u32 bytes, u32 &lower, u32 &upper) {
    u32 select = bytes & 0x7777;
    u32 top = (bytes >> 1 & 0x4444) | 0x3210;
    u32 values = prmt(prmt(TABLE_0, TABLE_1, select), prmt(TABLE_2, TABLE_3, select), top);
    lower = add2(prmt(values, EXPONENT, 0x4240), minus(1024 + 128));
    upper = add2(prmt(values, EXPONENT, 0x4341), minus(1024 + 128));
}

DEVICE u32 weigh(u32 code, u32 scale, u32 less) {
    return HAS_MIN ? fma2(code, scale, less) : mul2(code, scale);
}

// Where a thread's bytes of a row begin in a plane's tile, which is swizzled by bits 7 and up.
DEVICE u32 first_byte(int row, int row_bytes, int quad) {
    u32 line = row * row_bytes;
    return (line ^ (line >> 3 & (row_bytes - 16))) + 2 * quad;
}

// The bytes of two rows, 8 apart, that a thread needs for 64 columns: two neighbours each.
struct Bytes {
    u32 low[2][LOW_BITS == 8 ? 4 : 2][2], high[2][2][2];
};

// low and high: this thread's first byte of the upper row. tile_bytes: between the two tiles of
// 8-bit rows.
template <int BLOCK>
DEVICE void load_bytes(Bytes &bytes, u32 low, u32 high, u32 tile_bytes) {
    constexpr int low_at = (LOW_BITS == 2 ? BLOCK / 2 : BLOCK) * (LOW_BITS == 8 ? 64 : 32);
    constexpr int high_at = (HIGH_BITS == 2 ? BLOCK / 2 : 0) * 32;
    if (LOW_BITS == 8) low += low_at / 128 * tile_bytes;
#pragma unroll
    for (int row = 0; row < 2; row++)
#pragma unroll
        for (int i = 0; i < (LOW_BITS == 8 ? 8 : 4); i++) {
            int step = i / 2, eight = i % 2;
            u32 line = (low ^ (low_at % 128 + 16 * step)) + row * 8 * LOW_ROW;
            bytes.low[row][step][eight] = load_shared_u16(line + 8 * eight);
            if (!HIGH_BITS) continue;
            u32 high_line = (high ^ (high_at + 16 * step)) + row * 8 * HIGH_BYTES;
            bytes.high[row][step][eight] = load_shared_u16(high_line + 8 * eight);
        }
}

// Fragments a[step] of four products of 16 columns, for the BLOCK-th 64 columns of the two rows.
template <int BLOCK>
DEVICE void unpack(u32 (&a)[4][4], const Bytes &bytes, const RowScales (&rows)[2]) {
#pragma unroll
    for (int row = 0; row < 2; row++) {
        u32 scale[4], less[4];
        group_scale<BLOCK, 0>(rows[row], scale[0], less[0]);
        group_scale<BLOCK, 2>(rows[row], scale[2], less[2]);
        scale[1] = scale[0], less[1] = less[0], scale[3] = scale[2], less[3] = less[2];
        if (GROUP == 16) {
            group_scale<BLOCK, 1>(rows[row], scale[1], less[1]);
            group_scale<BLOCK, 3>(rows[row], scale[3], less[3]);
        }
#pragma unroll
        for (int i = 0; i < (LOW_BITS == 8 ? 8 : 4); i++) {
            int step = i / 2, eight = i % 2, to = row + 2 * eight;
            u32 two = bytes.low[row][step][eight];
            if (LOW_BITS == 8) {
                u32 code = add2(prmt(two ^ 0x8080, EXPONENT, 0x4140), minus(1024 + 128));
                a[step][to] = weigh(code, scale[step], less[step]);
                continue;
            }
            u32 lower, upper;
            if (TABLE) {
                table_pairs(two, lower, upper);
            } else {
                u32 spread = prmt(two, EXPONENT, 0x4140), high = 0;
                if (HIGH_BITS) high = prmt(bytes.high[row][step][eight], 0, 0x4140);
                lower = code_pair<BLOCK, 0>(spread, high);
                upper = code_pair<BLOCK, 1>(spread, high);
            }
            a[step][to] = weigh(lower, scale[step], less[step]);
            a[step + 2][to] = weigh(upper, scale[step + 2], less[step + 2]);
        }
    }
}
