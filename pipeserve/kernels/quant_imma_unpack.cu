// Planar weights (quant_layout.py) -> byte operands of the integer tensor cores, and the scales of
// their groups, for one thread. A code stays where the fewest instructions put it in its byte, and
// its scale is divided by that power of two. Integers become floats by their bits: those of a float
// between 2^23 and 2^24 end in that integer.

constexpr int HALF = 0, HALF_MIN = 1, POWER = 2, U8_MIN = 3, I8 = 4, I8_PAIR = 5, NIBBLE_MIN = 6;
constexpr bool HAS_MIN = SCALES == HALF_MIN || SCALES == U8_MIN || SCALES == NIBBLE_MIN;
constexpr bool HAS_SUPER = SCALES >= U8_MIN;
constexpr bool HAS_SHORT_WORDS = SCALES == POWER || SCALES == I8_PAIR;
constexpr int GROUPS = 64 / GROUP;  // of a block of 64 columns
constexpr u32 MAGIC_BITS = 0x4B000000;
constexpr float MAGIC = 8388608.0f;  // what these bits are as a float: 2^23

// The lowest bit of a code in its byte. Codes with an offset, which is half their range, lie at the
// top, where turning the highest bit subtracts it.
DEVICE constexpr int code_position(int block, int upper) {
    if (TABLE || LOW_BITS == 8) return 0;
    if (OFFSET) return 8 - LOW_BITS - HIGH_BITS;
    if (LOW_BITS == 2) return 4 * (block & 1) + 2 * upper;
    return upper ? (HIGH_BITS ? 3 : 4) : 0;
}

DEVICE constexpr float inverse_power(int exponent) { return 1.0f / (1 << exponent); }

// BITS bits of every byte, from the bit FROM moved to the bit TO, others zero.
template <int BITS, int FROM, int TO>
DEVICE u32 moved_bits(u32 bytes) {
    constexpr u32 mask = ((1u << BITS) - 1 << TO) * 0x01010101u;
    constexpr int left = TO > FROM ? TO - FROM : 0, right = FROM > TO ? FROM - TO : 0;
    return (bytes << left >> right) & mask;
}

// Codes of four neighbouring columns in the lower or upper half of the BLOCK-th 64, out of the
// words of the planes that hold them.
template <int BLOCK, int UPPER>
DEVICE u32 four_codes(u32 low, u32 high) {
    constexpr int at = code_position(BLOCK, UPPER);
    constexpr int slice = LOW_BITS == 2 ? 2 * (BLOCK & 1) + UPPER : UPPER;
    u32 codes = moved_bits<LOW_BITS, LOW_BITS * slice, at>(low);
    if (OFFSET) codes ^= 0x80808080u;
    if (HIGH_BITS == 2) codes ^= moved_bits<2, 2 * (2 * (BLOCK & 1) + UPPER), at + LOW_BITS>(high);
    if (HIGH_BITS == 1) codes ^= moved_bits<1, 2 * BLOCK + UPPER, at + LOW_BITS>(high);
    return codes;
}

// Four values of the table, by the nibbles of 16 bits.
DEVICE u32 looked_up(u32 select, u32 top) {
    return prmt(prmt(TABLE_0 ^ 0x80808080u, TABLE_1 ^ 0x80808080u, select),
                prmt(TABLE_2 ^ 0x80808080u, TABLE_3 ^ 0x80808080u, select), top);
}
DEVICE void table_values(u32 nibbles, u32 &lower, u32 &upper) {
    u32 select = nibbles & 0x77777777u, top = (nibbles >> 1 & 0x44444444u) | 0x32103210u;
    u32 first = looked_up(select, top), second = looked_up(select >> 16, top >> 16);
    lower = prmt(first, second, 0x6420), upper = prmt(first, second, 0x7531);
}

// The byte operands of the two halves of the BLOCK-th 64 columns. 8 bits: low holds the words of
// both halves.
template <int BLOCK>
DEVICE void unpack(u32 (&lower)[4], u32 (&upper)[4], const u32 (&low)[2][4], const u32 (&high)[4]) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        if (LOW_BITS == 8) {
            lower[i] = low[0][i], upper[i] = low[1][i];
        } else if (TABLE) {
            table_values(low[0][i], lower[i], upper[i]);
        } else {
            lower[i] = four_codes<BLOCK, 0>(low[0][i], high[i]);
            upper[i] = four_codes<BLOCK, 1>(low[0][i], high[i]);
        }
    }
}

// The words of scales of a row's 256 columns, and what multiplies them.
struct RowScales {
    u32 word[4];
    float super;
};

DEVICE float byte_as_float(u32 word, int index) {
    return as_float(prmt(word, MAGIC_BITS, 0x7440 | index));
}

// What codes of the INDEX-th group of the BLOCK-th 64 columns are multiplied by.
template <int BLOCK, int INDEX>
DEVICE float group_scale(const RowScales &row) {
    constexpr float share = inverse_power(code_position(BLOCK, INDEX * GROUP / 32));
    u32 word = row.word[BLOCK];
    if (SCALES == HALF || SCALES == HALF_MIN) return half_to_float(word >> 16 * INDEX) * share;
    if (SCALES == POWER) {
        u32 exponent = word >> 8 * INDEX & 255;
        return as_float(exponent < 2 ? 0x00200000u << exponent : exponent - 1 << 23);
    }
    float super = row.super * share;
    if (SCALES == I8 || SCALES == I8_PAIR) return (float)(signed char)(word >> 8 * INDEX) * super;
    if (SCALES == NIBBLE_MIN) word &= 0x0F0F0F0Fu;
    return multiply_add(byte_as_float(word, INDEX), super, -MAGIC * super);
}

// The minima of the groups of 64 columns, without their super scale.
DEVICE void group_mins(float (&mins)[GROUPS], u32 word, u32 min_word) {
    if (SCALES == NIBBLE_MIN) word = word >> 4 & 0x0F0F0F0Fu;
#pragma unroll
    for (int i = 0; i < GROUPS; i++)
        mins[i] = SCALES == HALF_MIN
                      ? half_to_float(min_word >> 16 * i)
                      : byte_as_float(word, SCALES == U8_MIN ? 2 + i : i) - MAGIC;
}
