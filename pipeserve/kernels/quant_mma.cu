// x W^T of planar weights on Hopper's tensor cores: weights unpacked in registers as the first
// operand, activations from shared memory as the second. The copy engine keeps up to
// STAGES steps of 256 columns in flight. The blocks of a cluster take parts of the columns of the
// same outputs and add them over distributed shared memory, in order.

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned long long u64;
#define DEVICE __device__ __forceinline__

DEVICE u32 prmt(u32 a, u32 b, u32 select) {
    u32 d;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(select));
    return d;
}
DEVICE u32 add2(u32 a, u32 b) {
    u32 d;
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}
DEVICE u32 mul2(u32 a, u32 b) {
    u32 d;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}
DEVICE u32 fma2(u32 a, u32 b, u32 c) {
    u32 d;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}
DEVICE u32 float_bits_to_half2(u32 bits) {
    u32 d;
    asm("cvt.rn.f16x2.f32 %0, %1, %1;" : "=r"(d) : "f"(__uint_as_float(bits)));
    return d;
}
DEVICE u32 load_shared_u16(u32 address) {
    u16 d;
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(d) : "r"(address));
    return d;
}
DEVICE uint4 load_shared_u128(u32 address) {
    uint4 d;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(d.x), "=r"(d.y), "=r"(d.z), "=r"(d.w)
                 : "r"(address));
    return d;
}

// UNPACK

struct alignas(64) TensorMap {
    char bytes[128];
};

constexpr int THREADS = WARPGROUPS * 128;
constexpr int BLOCK_N = WARPGROUPS * TILES * 64;
constexpr int LOW_TILES = LOW_BYTES / LOW_ROW;
constexpr int X_BLOCK_BYTES = BLOCK_T * 128;  // of 64 columns
constexpr int X_BYTES = X_SLOTS * X_BLOCKS * X_BLOCK_BYTES;
constexpr int WORD_BYTES = HAS_SHORT_WORDS ? 0 : BLOCK_N * 16;
constexpr int MIN_BYTES = SCALES == HALF_MIN ? BLOCK_N * 16 : 0;
constexpr int HIGH_AT = BLOCK_N * LOW_BYTES;
constexpr int WORDS_AT = HIGH_AT + BLOCK_N * HIGH_BYTES;
constexpr int MINS_AT = WORDS_AT + WORD_BYTES;
constexpr int COPIED_BYTES = MINS_AT + MIN_BYTES;
constexpr int STAGE_BYTES = (COPIED_BYTES + 1023) / 1024 * 1024;
constexpr int PITCH = BLOCK_N + 4;  // of the sums' rows: no two threads of a warp in one bank

DEVICE u32 shared_address(const void *pointer) { return (u32)__cvta_generic_to_shared(pointer); }

DEVICE void barrier_init(u32 barrier, u32 count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
// One arrival per warp. Neither branch nor thread index: the compiler would take products that are
// in flight across it one at a time.
DEVICE void barrier_arrive_if(bool condition, u32 barrier) {
    asm volatile(
        "{ .reg .pred here, elected; setp.ne.u32 here, %0, 0; elect.sync _|elected, -1;\n"
        "and.pred here, here, elected; @here mbarrier.arrive.shared::cta.b64 _, [%1]; }" ::"r"(
            (u32)condition),
        "r"(barrier)
        : "memory");
}
DEVICE void barrier_expect(u32 barrier, u32 num_bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier),
                 "r"(num_bytes)
                 : "memory");
}
// No branch that the compiler sees: it would move sums about between products in flight.
DEVICE void barrier_wait(u32 barrier, u32 parity) {
    asm volatile(
        "{ .reg .pred done;\n"
        "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again; }" ::"r"(barrier),
        "r"(parity)
        : "memory");
}

constexpr u64 EVICT_FIRST = 0x12F0000000000000ull, EVICT_NORMAL = 0x1000000000000000ull;

DEVICE void copy_tile(u32 to, const TensorMap &map, int column, int row, u32 barrier, u64 hint) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
        ".L2::cache_hint [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
        "l"(&map), "r"(column), "r"(row), "r"(barrier), "l"(hint)
        : "memory");
}

DEVICE void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING>
DEVICE void products_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// WGMMA

DEVICE void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
DEVICE u32 cluster_rank() {
    u32 rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
DEVICE u32 cluster_size() {
    u32 size;
    asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
    return size;
}
DEVICE float2 load_of_rank(u32 address, u32 rank) {
    float2 value;
    asm volatile(
        "{ .reg .b32 there; mapa.shared::cluster.u32 there, %2, %3;\n"
        "ld.shared::cluster.v2.f32 {%0, %1}, [there]; }"
        : "=f"(value.x), "=f"(value.y)
        : "r"(address), "r"(rank)
        : "memory");
    return value;
}

// What a block works on.
struct Work {
    int first_row, first_token, first_step, num_steps;
};

struct Maps {
    TensorMap low, high, words, mins, x;
};

// Shared memory: two rings of slots, of X_BLOCKS * 64 columns of x and of steps of the weights,
// and per slot a barrier that it is full and one that it is empty.
struct Rings {
    u32 x, weights, x_full, x_empty, full, empty;
};

DEVICE Rings rings_at(u32 start) {
    Rings rings;
    rings.x = start;
    rings.weights = start + X_BYTES;
    rings.x_full = rings.weights + STAGES * STAGE_BYTES;
    rings.x_empty = rings.x_full + 8 * X_SLOTS;
    rings.full = rings.x_empty + 8 * X_SLOTS;
    rings.empty = rings.full + 8 * STAGES;
    return rings;
}

// Starts the copies of the i-th step of weights; one thread.
DEVICE void copy_weights(const Maps &maps, const Work &work, int i, const Rings &rings) {
    int slot = i % STAGES, step = work.first_step + i;
    u32 to = rings.weights + slot * STAGE_BYTES, barrier = rings.full + 8 * slot;
    barrier_expect(barrier, COPIED_BYTES);
#pragma unroll
    for (int tile = 0; tile < LOW_TILES; tile++)
        copy_tile(to + tile * BLOCK_N * LOW_ROW, maps.low, step * LOW_BYTES + tile * LOW_ROW,
                  work.first_row, barrier, EVICT_FIRST);
    if (HIGH_BITS)
        copy_tile(to + HIGH_AT, maps.high, step * HIGH_BYTES, work.first_row, barrier, EVICT_FIRST);
    if (WORD_BYTES)
        copy_tile(to + WORDS_AT, maps.words, step * 4, work.first_row, barrier, EVICT_FIRST);
    if (MIN_BYTES)
        copy_tile(to + MINS_AT, maps.mins, step * 4, work.first_row, barrier, EVICT_FIRST);
}

// Starts the copies of the i-th slot's content of x; one thread.
DEVICE void copy_x(const Maps &maps, const Work &work, int i, const Rings &rings) {
    int slot = i % X_SLOTS, column = work.first_step * STEP_COLUMNS + i * X_BLOCKS * 64;
    u32 to = rings.x + slot * X_BLOCKS * X_BLOCK_BYTES, barrier = rings.x_full + 8 * slot;
    barrier_expect(barrier, X_BLOCKS * X_BLOCK_BYTES);
#pragma unroll
    for (int block = 0; block < X_BLOCKS; block++)
        copy_tile(to + block * X_BLOCK_BYTES, maps.x, column + block * 64, work.first_token,
                  barrier, EVICT_NORMAL);
}

// What a thread loads past shared memory, a step ahead: super scales, and words of 16 bits.
struct Ahead {
    u32 super[TILES][2];
    uint2 words[TILES][2];
};

DEVICE void load_ahead(Ahead &ahead, const void *supers, const void *words, int num_all_steps,
                       const int (&row)[TILES][2], int step) {
#pragma unroll
    for (int tile = 0; tile < TILES; tile++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            size_t index = (size_t)row[tile][i] * num_all_steps + step;
            if (HAS_SUPER)
                ahead.super[tile][i] = HAS_MIN ? __ldg((const u32 *)supers + index)
                                               : (u32)__ldg((const u16 *)supers + index);
            if (HAS_SHORT_WORDS) ahead.words[tile][i] = __ldg((const uint2 *)words + index);
        }
}

DEVICE void load_scales(RowScales &row, u32 stage, int local_row, u32 super, uint2 words) {
    if (HAS_SHORT_WORDS) {
        row.word[0] = words.x & 0xFFFF, row.word[1] = words.x >> 16;
        row.word[2] = words.y & 0xFFFF, row.word[3] = words.y >> 16;
    } else {
        uint4 four = load_shared_u128(stage + WORDS_AT + local_row * 16);
        row.word[0] = four.x, row.word[1] = four.y, row.word[2] = four.z, row.word[3] = four.w;
    }
    if (SCALES == HALF_MIN) {
        uint4 four = load_shared_u128(stage + MINS_AT + local_row * 16);
        row.min_word[0] = four.x, row.min_word[1] = four.y;
        row.min_word[2] = four.z, row.min_word[3] = four.w;
    }
    prepare(row, super);
}

// Eight rows of 128 bytes, swizzled, follow each other: the second operand's descriptor.
DEVICE u64 x_descriptor(u32 address) {
    return (u64)(address >> 4 & 0x3FFF) | 1ull << 16 | 64ull << 32 | 1ull << 62;
}

// Where a thread's first bytes of the planes lie, and the bytes it has loaded ahead.
struct Operand {
    u32 low, high;
    Bytes bytes[TILES];
};

template <int BLOCK>
DEVICE void load_block(Operand &from) {
#pragma unroll
    for (int tile = 0; tile < TILES; tile++)
        load_bytes<BLOCK>(from.bytes[tile], from.low + tile * 64 * LOW_ROW,
                          from.high + tile * 64 * HIGH_BYTES, BLOCK_N * LOW_ROW);
}

template <int BLOCK>
DEVICE void multiply_block(float (&sums)[TILES][BLOCK_T / 2], u32 (&a)[TILES][4][4],
                           Operand &from, const RowScales (&rows)[TILES][2], int i,
                           const Rings &rings) {
#pragma unroll
    for (int tile = 0; tile < TILES; tile++)
        unpack<BLOCK>(a[tile], from.bytes[tile], rows[tile]);
    int group = (4 * i + BLOCK) / X_BLOCKS, slot = group % X_SLOTS;
    if (BLOCK % X_BLOCKS == 0) barrier_wait(rings.x_full + 8 * slot, group / X_SLOTS & 1);
    u64 descriptor =
        x_descriptor(rings.x + (slot * X_BLOCKS + BLOCK % X_BLOCKS) * X_BLOCK_BYTES);
    products_begin();
#pragma unroll
    for (int step = 0; step < 4; step++)
#pragma unroll
        for (int tile = 0; tile < TILES; tile++)
            multiply_add(sums[tile], a[tile][step], descriptor + 2 * step);
    products_commit();
    if (BLOCK < 3) load_block<(BLOCK + 1) % 4>(from);
    products_wait<1>();
    // All products but this block's are done.
    if (BLOCK % X_BLOCKS == 0)
        barrier_arrive_if(group > 0, rings.x_empty + 8 * ((group - 1) % X_SLOTS));
    if (BLOCK == 0) barrier_arrive_if(i > 0, rings.empty + 8 * ((i - 1) % STAGES));
}

// The first warp fills again what was freed a block before BLOCK, when others are likely past it.
template <int BLOCK>
DEVICE void refill(const Maps &maps, const Work &work, int i, const Rings &rings) {
    if (__shfl_sync(-1u, threadIdx.x / 32, 0) != 0) return;  // known to be one for the warp
    int freed = (4 * i + BLOCK - 1) / X_BLOCKS - 1;
    if ((BLOCK + 3) % X_BLOCKS == 0 && freed >= 0 &&
        freed + X_SLOTS < work.num_steps * (4 / X_BLOCKS)) {
        barrier_wait(rings.x_empty + 8 * (freed % X_SLOTS), freed / X_SLOTS & 1);
        if (threadIdx.x == 0) copy_x(maps, work, freed + X_SLOTS, rings);
    }
    if (BLOCK == 1 && i > 0 && i - 1 + STAGES < work.num_steps) {
        barrier_wait(rings.empty + 8 * ((i - 1) % STAGES), (i - 1) / STAGES & 1);
        if (threadIdx.x == 0) copy_weights(maps, work, i - 1 + STAGES, rings);
    }
    __syncwarp();
}

DEVICE void consume(float (&sums)[TILES][BLOCK_T / 2], const Maps &maps, const Work &work,
                    const Rings &rings, const void *supers, const void *words, int num_rows,
                    int num_all_steps) {
    int lane = threadIdx.x % 32, quad = lane % 4;
    int local_row = threadIdx.x / 128 * TILES * 64 + threadIdx.x / 32 % 4 * 16 + lane / 4;
    int row[TILES][2];
#pragma unroll
    for (int tile = 0; tile < TILES; tile++)
#pragma unroll
        for (int i = 0; i < 2; i++)
            row[tile][i] = min(work.first_row + local_row + 64 * tile + 8 * i, num_rows - 1);
    u32 low_at = first_byte(local_row, LOW_ROW, quad);
    u32 high_at = HIGH_AT + (HIGH_BITS ? first_byte(local_row, HIGH_BYTES, quad) : 0);
    Ahead ahead;
    load_ahead(ahead, supers, words, num_all_steps, row, work.first_step);
    for (int i = 0; i < work.num_steps; i++) {
        int slot = i % STAGES;
        u32 stage = rings.weights + slot * STAGE_BYTES;
        Ahead here = ahead;
        if (i + 1 < work.num_steps)
            load_ahead(ahead, supers, words, num_all_steps, row, work.first_step + i + 1);
        barrier_wait(rings.full + 8 * slot, i / STAGES & 1);
        Operand from;
        from.low = stage + low_at, from.high = stage + high_at;
        load_block<0>(from);
        RowScales rows[TILES][2];
#pragma unroll
        for (int tile = 0; tile < TILES; tile++)
#pragma unroll
            for (int j = 0; j < 2; j++)
                load_scales(rows[tile][j], stage, local_row + 64 * tile + 8 * j,
                            here.super[tile][j], here.words[tile][j]);
        u32 a[2][TILES][4][4];
        multiply_block<0>(sums, a[0], from, rows, i, rings);
        refill<0>(maps, work, i, rings);
        multiply_block<1>(sums, a[1], from, rows, i, rings);
        refill<1>(maps, work, i, rings);
        multiply_block<2>(sums, a[0], from, rows, i, rings);
        refill<2>(maps, work, i, rings);
        multiply_block<3>(sums, a[1], from, rows, i, rings);
        refill<3>(maps, work, i, rings);
    }
    products_wait<0>();
#pragma unroll
    for (int tile = 0; tile < TILES; tile++)
#pragma unroll
        for (int i = 0; i < BLOCK_T / 2; i++) asm volatile("" : "+f"(sums[tile][i])::"memory");
}

DEVICE void keep_sums(const float (&sums)[TILES][BLOCK_T / 2], float *kept) {
    int lane = threadIdx.x % 32;
    int row = threadIdx.x / 128 * TILES * 64 + threadIdx.x / 32 % 4 * 16 + lane / 4;
#pragma unroll
    for (int tile = 0; tile < TILES; tile++)
#pragma unroll
        for (int i = 0; i < BLOCK_T / 2; i++) {
            int token = i / 4 * 8 + lane % 4 * 2 + i % 2;
            kept[token * PITCH + row + 64 * tile + (i & 2) * 4] = sums[tile][i];
        }
}

// Adds the blocks' sums in the order of their ranks; each block of the cluster takes some tokens.
DEVICE void store_sums(const Work &work, u32 kept, const u16 *bias, void *out, int num_rows,
                       int num_tokens, int out_stride) {
    u32 rank = cluster_rank(), size = cluster_size();
    int tokens = min(BLOCK_T, num_tokens - work.first_token);
    constexpr int PAIRS = BLOCK_N / 2;
    for (int i = threadIdx.x; i < tokens * PAIRS; i += THREADS) {
        int token = i / PAIRS, pair = i % PAIRS * 2;
        if (token % size != rank || work.first_row + pair >= num_rows) continue;
        float2 total = {0.0f, 0.0f};
        for (u32 part = 0; part < size; part++) {
            float2 value = load_of_rank(kept + (token * PITCH + pair) * 4, part);
            total.x += value.x, total.y += value.y;
        }
        if (bias) {
            u32 two = *(const u32 *)(bias + work.first_row + pair);
            float x, y;
            asm("{ .reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h; }"
                : "=f"(x), "=f"(y)
                : "r"(two));
            total.x += x, total.y += y;
        }
        size_t index = (size_t)(work.first_token + token) * out_stride + work.first_row + pair;
        if (OUT_F32) {
            *(float2 *)((float *)out + index) = total;
        } else {
            u32 two;
            asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(two) : "f"(total.y), "f"(total.x));
            *(u32 *)((u16 *)out + index) = two;
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_AT_ONCE)
    quant_mma(const __grid_constant__ Maps maps, const void *supers, const void *words,
              const u16 *bias, void *out, int num_rows, int num_tokens, int num_all_steps,
              int num_token_tiles, int out_stride) {
    extern __shared__ char shared[];
    char *stages = shared + (1024 - (shared_address(shared) & 1023)) % 1024;
    Rings rings = rings_at(shared_address(stages));
    u32 rank = cluster_rank(), size = cluster_size();
    int tile = blockIdx.x / size;
    Work work;
    work.first_row = tile / num_token_tiles * BLOCK_N;
    work.first_token = tile % num_token_tiles * BLOCK_T;
    work.first_step = num_all_steps * rank / size;
    work.num_steps = num_all_steps * (rank + 1) / size - work.first_step;
    if (threadIdx.x == 0) {
        for (int i = 0; i < X_SLOTS; i++) {
            barrier_init(rings.x_full + 8 * i, 1);
            barrier_init(rings.x_empty + 8 * i, THREADS / 32);
        }
        for (int i = 0; i < STAGES; i++) {
            barrier_init(rings.full + 8 * i, 1);
            barrier_init(rings.empty + 8 * i, THREADS / 32);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        for (int i = 0; i < min(STAGES, work.num_steps); i++) copy_weights(maps, work, i, rings);
        for (int i = 0; i < min(X_SLOTS, work.num_steps * (4 / X_BLOCKS)); i++)
            copy_x(maps, work, i, rings);
    }
    __syncthreads();
    float sums[TILES][BLOCK_T / 2];
#pragma unroll
    for (int t = 0; t < TILES; t++)
#pragma unroll
        for (int i = 0; i < BLOCK_T / 2; i++) sums[t][i] = 0.0f;
    consume(sums, maps, work, rings, supers, words, num_rows, num_all_steps);
    __syncthreads();  // the sums take the place of the rings
    keep_sums(sums, (float *)stages);
    cluster_sync();
    store_sums(work, shared_address(stages), bias, out, num_rows, num_tokens, out_stride);
    __syncwarp();
    cluster_sync();  // no block ends while others read its sums
}
