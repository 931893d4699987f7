// What quant_mma_unpack.cu needs of a GPU, in plain C++: instructions as the PTX manual has them.

#include <cstring>

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned long long u64;
#define DEVICE static inline

static const unsigned char *shared_memory;

static void load_shared_u128(u32 (&to)[4], u32 address) {
    memcpy(to, shared_memory + address, 16);
}

static u32 prmt(u32 a, u32 b, u32 select) {
    u64 bytes = (u64)b << 32 | a;
    u32 picked = 0;
    for (int i = 0; i < 4; i++) picked |= (u32)(bytes >> 8 * (select >> 4 * i & 7) & 255) << 8 * i;
    return picked;
}

static u32 and_or(u32 a, u32 b, u32 c) { return (a & b) | c; }

static double value_of(u32 bits) {
    u16 low = (u16)bits;
    _Float16 half;
    memcpy(&half, &low, 2);
    return (double)half;
}

// Products and sums of halves are exact in double precision, so this rounds once.
static u32 half_of(double value) {
    _Float16 half = (_Float16)value;
    u16 bits;
    memcpy(&bits, &half, 2);
    return bits;
}

static u32 fma2(u32 a, u32 b, u32 c) {
    u32 low = half_of(value_of(a) * value_of(b) + value_of(c));
    return low | half_of(value_of(a >> 16) * value_of(b >> 16) + value_of(c >> 16)) << 16;
}

static u32 add2(u32 a, u32 b) {
    return half_of(value_of(a) + value_of(b)) | half_of(value_of(a >> 16) + value_of(b >> 16)) << 16;
}

static u32 mul2(u32 a, u32 b) {
    return half_of(value_of(a) * value_of(b)) | half_of(value_of(a >> 16) * value_of(b >> 16)) << 16;
}

static u32 float_bits_to_half2(u32 bits) {
    float value;
    memcpy(&value, &bits, 4);
    return half_of(value) * 0x10001u;
}

// UNPACK

// The fragments a[block][step] of one thread, whose upper row is `row` of the tile.
extern "C" void unpack_step(const unsigned char *memory, u32 high_at, u32 tile_bytes, int row,
                            int quad, const u32 *words, const u32 *min_words, const u32 *supers,
                            u32 (*fragments)[4][4]) {
    shared_memory = memory;
    UnitScales units[2];
    for (int i = 0; i < 2; i++)
        units[i] = unit_scales(words[4 * i + quad], min_words[4 * i + quad], supers[i]);
    u32 low = low_place(row, quad, tile_bytes), high = high_at + high_place(row, quad);
    Bytes bytes;
    load_bytes<0>(bytes, low, high);
    unpack<0>(fragments[0], bytes, units, quad), unpack<1>(fragments[1], bytes, units, quad);
    load_bytes<1>(bytes, low, high);
    unpack<2>(fragments[2], bytes, units, quad), unpack<3>(fragments[3], bytes, units, quad);
}
