// What quant_mma_swiglu.cu needs of a GPU, in plain C++, for the threads of a block one by one.

#include <algorithm>
#include <cmath>
#include <cstring>

typedef unsigned int u32;
typedef unsigned short u16;
#define DEVICE static inline
using std::min;

struct float2 {
    float x, y;
};
struct Work {
    int first_row, first_token;
};
struct {
    int x;
} static threadIdx;
static unsigned char shared_memory[1 << 17];

constexpr int THREADS = WARPGROUPS * 128, BLOCK_N = WARPGROUPS * TILES * 64;

static float2 of_halves(u32 two) {
    _Float16 halves[2];
    memcpy(halves, &two, 4);
    return {(float)halves[0], (float)halves[1]};
}
static u32 to_halves(float x, float y) {
    _Float16 halves[2] = {(_Float16)x, (_Float16)y};
    u32 two;
    memcpy(&two, halves, 4);
    return two;
}
static u32 prmt(u32 a, u32 b, u32 select) {
    unsigned char bytes[8], picked[4];
    memcpy(bytes, &a, 4), memcpy(bytes + 4, &b, 4);
    for (int i = 0; i < 4; i++) picked[i] = bytes[select >> 4 * i & 7];
    u32 d;
    memcpy(&d, picked, 4);
    return d;
}
static float divide(float x, float y) { return x / y; }
static float power_of_2(float x) { return exp2f(x); }
static void load_shared_u128(u32 (&to)[4], u32 address) {
    memcpy(to, shared_memory + address, 16);
}
static void store_u128(u16 *to, const u32 (&from)[4]) { memcpy(to, from, 16); }
static int first_local_row() {
    return threadIdx.x / 128 * TILES * 64 + threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4;
}
static void store_transposed(u32 address, u32 two);

// SWIGLU

// The address is that of the row of the thread's own number, in each eight of the warp.
static void store_transposed(u32 address, u32 two) {
    int lane = threadIdx.x % 32, first = address - lane % 8 * TOKEN_BYTES;
    for (int i = 0; i < 2; i++) {
        u16 half = two >> 16 * i;
        memcpy(shared_memory + first + (lane % 4 * 2 + i) * TOKEN_BYTES + lane / 4 * 2, &half, 2);
    }
}

// A block whose outputs, rounded to float, are products[token][row].
extern "C" void run_block(const float *products, const u16 *bias, int first_row, int first_token,
                          int num_tokens, int num_features, u16 *out, u16 *interleaved) {
    Work work = {first_row, first_token};
    for (threadIdx.x = 0; threadIdx.x < THREADS; threadIdx.x++) {
        float sums[TILES][BLOCK_T / 2];
        for (int tile = 0; tile < TILES; tile++)
            for (int i = 0; i < BLOCK_T / 2; i++) {
                int token = first_token + i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2;
                int row = first_row + first_local_row() + 64 * tile + (i & 2) * 4;
                bool is_token = token < num_tokens;
                sums[tile][i] = is_token ? products[(size_t)token * 2 * num_features + row] : 0;
            }
        keep_activated(sums, work, 0, bias);
    }
    for (threadIdx.x = 0; threadIdx.x < THREADS; threadIdx.x++)
        store_activated(work, 0, out, interleaved, num_tokens, num_features);
}
