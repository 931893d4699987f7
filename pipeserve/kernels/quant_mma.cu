// x W^T of planar weights on Hopper's tensor cores: weights unpacked in registers as the first
// operand, interleaved activations from shared memory as the second. The copy engine keeps up to
// STAGES steps of 256 columns in flight. The blocks of a cluster take parts of the columns of the
// same outputs; their sums are added in a fixed order, over distributed shared memory.

// HOPPER

DEVICE u32 prmt(u32 a, u32 b, u32 select) {
    u32 d;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(select));
    return d;
}
DEVICE u32 and_or(u32 a, u32 b, u32 c) {
    u32 d;
    asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
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
DEVICE u32 load_shared_u32(u32 address) {
    u32 d;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(d) : "r"(address));
    return d;
}
DEVICE void load_shared_u128(u32 (&to)[4], u32 address) {
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address));
}
// A warp's halves of 8 rows (lane / 4) and 8 columns (2 (lane % 4) and the next): column i to the 16
// bytes whose address lane i has.
DEVICE void store_transposed(u32 address, u32 two) {
    asm volatile("stmatrix.sync.aligned.m8n8.x1.trans.shared.b16 [%0], {%1};" ::"r"(address),
                 "r"(two)
                 : "memory");
}
DEVICE void store_u128(u16 *to, const u32 (&from)[4]) {
    *(uint4 *)to = {from[0], from[1], from[2], from[3]};
}
// As Triton divides.
DEVICE float divide(float x, float y) {
    float d;
    asm("div.full.f32 %0, %1, %2;" : "=f"(d) : "f"(x), "f"(y));
    return d;
}
DEVICE float power_of_2(float x) {
    float d;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(d) : "f"(x));
    return d;
}

// UNPACK

constexpr int THREADS = WARPGROUPS * 128;
constexpr int BLOCK_N = WARPGROUPS * TILES * 64;
constexpr int LOW_TILES = LOW_BYTES / LOW_ROW;
constexpr int X_BLOCK_BYTES = BLOCK_T * 128;  // of 64 columns
constexpr int X_SLOT_BYTES = X_BLOCKS * X_BLOCK_BYTES;
constexpr int X_BYTES = X_SLOTS * X_SLOT_BYTES;
constexpr int WORD_BYTES = HAS_SHORT_WORDS ? 0 : BLOCK_N * 16;
constexpr int MIN_BYTES = SCALES == HALF_MIN ? BLOCK_N * 16 : 0;
constexpr int HIGH_AT = BLOCK_N * LOW_BYTES;
constexpr int WORDS_AT = HIGH_AT + BLOCK_N * HIGH_BYTES;
constexpr int MINS_AT = WORDS_AT + WORD_BYTES;
constexpr int COPIED_BYTES = MINS_AT + MIN_BYTES;
constexpr int STAGE_BYTES = (COPIED_BYTES + 1023) / 1024 * 1024;
constexpr int PITCH = BLOCK_N + 4;  // of the sums' rows: no two threads in one bank

// One arrival per warp. Neither branch nor thread index: the compiler would take products that are
// in flight across it one at a time.
DEVICE void barrier_arrive_if(u32 condition, u32 barrier) {
    asm volatile(
        "{ .reg .pred here, elected; setp.ne.u32 here, %0, 0; elect.sync _|elected, -1;\n"
        "and.pred here, here, elected; @here mbarrier.arrive.shared::cta.b64 _, [%1]; }" ::"r"(
            condition),
        "r"(barrier)
        : "memory");
}



// WGMMA

// What a block works on. parts: of the columns, one for each block of the cluster.
struct Work {
    int first_row, first_token, first_step, num_steps;
    u32 parts, part;
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
DEVICE void copy_weights(const Maps &maps, const Work &work, int i, int slot, const Rings &rings) {
    int step = work.first_step + i;
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
DEVICE void copy_x(const Maps &maps, const Work &work, int i, int slot, const Rings &rings) {
    int column = work.first_step * STEP_COLUMNS + i * X_BLOCKS * 64;
    u32 to = rings.x + slot * X_SLOT_BYTES, barrier = rings.x_full + 8 * slot;
    barrier_expect(barrier, X_SLOT_BYTES);
#pragma unroll
    for (int block = 0; block < X_BLOCKS; block++)
        copy_tile(to + block * X_BLOCK_BYTES, maps.x, column + block * 64, work.first_token,
                  barrier, EVICT_NORMAL);
}

// A slot of a ring of COUNT, and whether the ring has been passed an odd number of times.
template <int COUNT>
struct Cursor {
    u32 slot = 0, parity = 0;
    DEVICE void advance() {
        if (++slot == COUNT) slot = 0, parity ^= 1;
    }
};

// What a thread loads past shared memory, a step ahead: super scales, and words of 16 bits.
struct Ahead {
    u32 super[TILES][2], word[TILES][2];
};

DEVICE void load_ahead(Ahead &ahead, const void *supers, const void *words, int num_all_steps,
                       const int (&row)[TILES][2], int step, int quad) {
#pragma unroll
    for (int tile = 0; tile < TILES; tile++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            size_t index = (size_t)row[tile][i] * num_all_steps + step;
            if (HAS_SUPER)
                ahead.super[tile][i] = HAS_MIN ? __ldg((const u32 *)supers + index)
                                               : (u32)__ldg((const u16 *)supers + index);
            if (HAS_SHORT_WORDS)
                ahead.word[tile][i] = (u32)__ldg((const u16 *)words + 4 * index + quad);
        }
}

DEVICE UnitScales load_scales(u32 stage, int local_row, int quad, u32 super, u32 word) {
    u32 min_word = 0, at = stage + local_row * 16 + quad * 4;
    if (!HAS_SHORT_WORDS) word = load_shared_u32(at + WORDS_AT);
    if (SCALES == HALF_MIN) min_word = load_shared_u32(at + MINS_AT);
    return unit_scales(word, min_word, super);
}

// Eight rows of 128 bytes, swizzled, follow each other: the second operand's descriptor.
DEVICE u64 x_descriptor(u32 address) {
    return (u64)(address >> 4 & 0x3FFF) | 1ull << 16 | 64ull << 32 | 1ull << 62;
}

// Where a thread's bytes of the planes lie, and those it has loaded ahead.
struct Operand {
    u32 low, high;
    Bytes bytes[TILES];
};

template <int HALF_UNIT>
DEVICE void load_half_unit(Operand &from) {
#pragma unroll
    for (int tile = 0; tile < TILES; tile++)
        load_bytes<HALF_UNIT>(from.bytes[tile], from.low + tile * 64 * LOW_ROW,
                              from.high + tile * 64 * HIGH_BYTES);
}

constexpr int X_PER_STEP = 4 / X_BLOCKS;

// Where a warp is in the rings; the slots that it fills again next, and the barriers of those that
// it has almost done with.
struct Place {
    Cursor<STAGES> weights, refilled;
    Cursor<X_SLOTS> x, x_refilled;
    u32 done, x_done;
};

template <int BLOCK>
DEVICE void multiply_block(float (&sums)[TILES][BLOCK_T / 2], u32 (&a)[TILES][4][4],
                           Operand &from, const UnitScales (&units)[TILES][2], int quad,
                           bool is_later, Place &place, const Rings &rings) {
#pragma unroll
    for (int tile = 0; tile < TILES; tile++)
        unpack<BLOCK>(a[tile], from.bytes[tile], units[tile], quad);
    u32 x_full = rings.x_full + 8 * place.x.slot;
    if (BLOCK % X_BLOCKS == 0) barrier_wait(x_full, place.x.parity);
    u64 descriptor = x_descriptor(rings.x + place.x.slot * X_SLOT_BYTES +
                                  BLOCK % X_BLOCKS * X_BLOCK_BYTES);
    products_begin();
#pragma unroll
    for (int step = 0; step < 4; step++)
#pragma unroll
        for (int tile = 0; tile < TILES; tile++)
            multiply_add(sums[tile], a[tile][step], descriptor + 2 * step);
    products_commit();
    if (BLOCK == 1) load_half_unit<1>(from);
    products_wait<1>();
    // All products but this block's are done.
    if (BLOCK % X_BLOCKS == 0) {
        barrier_arrive_if(BLOCK > 0 || is_later, place.x_done);
        place.x_done = x_full + 8 * X_SLOTS;
    }
    if (BLOCK == 0) barrier_arrive_if(is_later, place.done);
    if ((BLOCK + 1) % X_BLOCKS == 0) place.x.advance();
}

// Fills again what was freed a block before BLOCK, when others are likely past it; a warp of its
// own for each BLOCK. step: the present one, after another one if is_later.
template <int BLOCK>
DEVICE void refill(const Maps &maps, const Work &work, int step, bool is_later, int warp,
                   Place &place, const Rings &rings) {
    constexpr bool FREES_X = (BLOCK + 3) % X_BLOCKS == 0;
    constexpr int FREED = (BLOCK - 1 + X_BLOCKS) / X_BLOCKS - 2;  // from the step's first slot of x
    bool is_mine = warp == BLOCK;
    if (FREES_X && (FREED >= 0 || is_later)) {
        int next = step * X_PER_STEP + FREED + X_SLOTS;
        if (is_mine && next < work.num_steps * X_PER_STEP) {
            barrier_wait(rings.x_empty + 8 * place.x_refilled.slot, place.x_refilled.parity);
            if (threadIdx.x % 32 == 0) copy_x(maps, work, next, place.x_refilled.slot, rings);
        }
        place.x_refilled.advance();
    }
    if (BLOCK == 2 && is_later) {
        int next = step - 1 + STAGES;
        if (is_mine && next < work.num_steps) {
            barrier_wait(rings.empty + 8 * place.refilled.slot, place.refilled.parity);
            if (threadIdx.x % 32 == 0) copy_weights(maps, work, next, place.refilled.slot, rings);
        }
        place.refilled.advance();
    }
    __syncwarp();
}

// Of the two outputs 8 apart that a thread has of each tile.
DEVICE int first_local_row() {
    return threadIdx.x / 128 * TILES * 64 + threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4;
}

DEVICE void consume(float (&sums)[TILES][BLOCK_T / 2], const Maps &maps, const Work &work,
                    const Rings &rings, const void *supers, const void *words, int num_rows,
                    int num_all_steps) {
    int lane = threadIdx.x % 32, quad = lane % 4, local_row = first_local_row();
    int warp = __shfl_sync(-1u, threadIdx.x / 32, 0);  // known to be one for the warp
    int row[TILES][2];
#pragma unroll
    for (int tile = 0; tile < TILES; tile++)
#pragma unroll
        for (int i = 0; i < 2; i++)
            row[tile][i] = min(work.first_row + local_row + 64 * tile + 8 * i, num_rows - 1);
    u32 low_at = low_place(local_row, quad, BLOCK_N * LOW_ROW);
    u32 high_at = HIGH_AT + high_place(local_row, quad);
    Ahead ahead;
    load_ahead(ahead, supers, words, num_all_steps, row, work.first_step, quad);
    Place place;
    place.done = place.x_done = 0;
    int i = 0;
    do {  // there is a step: a way past them would set sums while products may be in flight
        bool is_later = i > 0;
        u32 stage = rings.weights + place.weights.slot * STAGE_BYTES;
        u32 full = rings.full + 8 * place.weights.slot;
        Ahead here = ahead;
        if (i + 1 < work.num_steps)
            load_ahead(ahead, supers, words, num_all_steps, row, work.first_step + i + 1, quad);
        barrier_wait(full, place.weights.parity);
        Operand from;
        from.low = stage + low_at, from.high = stage + high_at;
        load_half_unit<0>(from);
        UnitScales units[TILES][2];
#pragma unroll
        for (int tile = 0; tile < TILES; tile++)
#pragma unroll
            for (int j = 0; j < 2; j++)
                units[tile][j] = load_scales(stage, local_row + 64 * tile + 8 * j, quad,
                                             here.super[tile][j], here.word[tile][j]);
        u32 a[2][TILES][4][4];
        multiply_block<0>(sums, a[0], from, units, quad, is_later, place, rings);
        refill<0>(maps, work, i, is_later, warp, place, rings);
        multiply_block<1>(sums, a[1], from, units, quad, is_later, place, rings);
        refill<1>(maps, work, i, is_later, warp, place, rings);
        multiply_block<2>(sums, a[0], from, units, quad, is_later, place, rings);
        refill<2>(maps, work, i, is_later, warp, place, rings);
        multiply_block<3>(sums, a[1], from, units, quad, is_later, place, rings);
        refill<3>(maps, work, i, is_later, warp, place, rings);
        place.done = full + 8 * STAGES;
        place.weights.advance();
    } while (++i < work.num_steps);
    products_wait<0>();
#pragma unroll
    for (int tile = 0; tile < TILES; tile++)
#pragma unroll
        for (int i = 0; i < BLOCK_T / 2; i++) asm volatile("" : "+f"(sums[tile][i])::"memory");
}

DEVICE void keep_sums(const float (&sums)[TILES][BLOCK_T / 2], float *kept) {
    int row = first_local_row();
#pragma unroll
    for (int tile = 0; tile < TILES; tile++)
#pragma unroll
        for (int i = 0; i < BLOCK_T / 2; i++) {
            int token = i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2;
            kept[token * PITCH + row + 64 * tile + (i & 2) * 4] = sums[tile][i];
        }
}

DEVICE float2 of_halves(u32 two) {
    float2 value;
    asm("{ .reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h; }"
        : "=f"(value.x), "=f"(value.y)
        : "r"(two));
    return value;
}

DEVICE u32 to_halves(float x, float y) {
    u32 two;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(two) : "f"(y), "f"(x));
    return two;
}

DEVICE void store_pair(float x, float y, const u16 *bias, void *out, size_t index, int row) {
    if (bias) {
        float2 more = of_halves(*(const u32 *)(bias + row));
        x += more.x, y += more.y;
    }
    if (OUT_F32) {
        *(float2 *)((float *)out + index) = {x, y};
    } else {
        *(u32 *)((u16 *)out + index) = to_halves(x, y);
    }
}

// Adds the sums of the PARTS blocks of a cluster in their order; each block takes some tokens.
template <int PARTS>
DEVICE void store_sums(const Work &work, u32 kept, const u16 *bias, void *out, int num_rows,
                       int num_tokens, int out_stride) {
    constexpr int FOURS = BLOCK_N / 4;
    int part = work.part, tokens = min(BLOCK_T, num_tokens - work.first_token);
    for (int i = threadIdx.x; i < (tokens + PARTS - 1 - part) / PARTS * FOURS; i += THREADS) {
        int token = i / FOURS * PARTS + part, local_row = i % FOURS * 4;
        int row = work.first_row + local_row;
        if (row >= num_rows) continue;
        float4 value[PARTS];
#pragma unroll
        for (int j = 0; j < PARTS; j++)
            value[j] = load_of_rank(kept + (token * PITCH + local_row) * 4, j);
        float4 total = value[0];
#pragma unroll
        for (int j = 1; j < PARTS; j++) {
            total.x += value[j].x, total.y += value[j].y;
            total.z += value[j].z, total.w += value[j].w;
        }
        size_t index = (size_t)(work.first_token + token) * out_stride + row;
        store_pair(total.x, total.y, bias, out, index, row);
        if (row + 2 < num_rows) store_pair(total.z, total.w, bias, out, index + 2, row + 2);
    }
}

// A tile has a cluster, whose size is a power of 2.
DEVICE Work work_of(int num_token_tiles, int num_all_steps) {
    Work work;
    work.parts = cluster_size();
    work.part = cluster_rank();
    int shift = __ffs(work.parts) - 1, tile = blockIdx.x >> shift;
    int row_tile = num_token_tiles == 1 ? tile : tile / num_token_tiles;
    work.first_row = row_tile * BLOCK_N;
    work.first_token = (tile - row_tile * num_token_tiles) * BLOCK_T;
    work.first_step = num_all_steps * work.part >> shift;
    work.num_steps = (num_all_steps * (work.part + 1) >> shift) - work.first_step;
    return work;
}

// SWIGLU

// Of two products by the same x the first lets the second start once x is there, which so need not
// wait for the first: it waits when it is done, so that whoever waits for it has waited for both.
constexpr int FIRST = 1, SECOND = 2;

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_AT_ONCE)
    quant_mma(const __grid_constant__ Maps maps, const void *supers, const void *words,
              const u16 *bias, void *out, u16 *interleaved_out, int num_rows, int num_tokens,
              int num_all_steps, int num_token_tiles, int out_stride, int turn) {
    if (turn != FIRST) start_next_kernel();
    extern __shared__ char shared[];
    char *stages = shared + (1024 - (shared_address(shared) & 1023)) % 1024;
    Rings rings = rings_at(shared_address(stages));
    Work work = work_of(num_token_tiles, num_all_steps);
    if (threadIdx.x == 0) {
        prefetch_map(maps.low);
        if (WORD_BYTES) prefetch_map(maps.words);
        prefetch_map(maps.x);
        for (int i = 0; i < X_SLOTS; i++) {
            barrier_init(rings.x_full + 8 * i, 1);
            barrier_init(rings.x_empty + 8 * i, WARPGROUPS * 4);
        }
        for (int i = 0; i < STAGES; i++) {
            barrier_init(rings.full + 8 * i, 1);
            barrier_init(rings.empty + 8 * i, WARPGROUPS * 4);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    }
    __syncthreads();
    // No kernel before this one has written the weights.
    if (threadIdx.x == 0)
        for (int i = 0; i < min(STAGES, work.num_steps); i++)
            copy_weights(maps, work, i, i, rings);
    if (turn != SECOND) wait_for_inputs();
    if (turn == FIRST) start_next_kernel();
    if (threadIdx.x == 32)
        for (int i = 0; i < min(X_SLOTS, work.num_steps * X_PER_STEP); i++)
            copy_x(maps, work, i, i, rings);
    __syncwarp();
    float sums[TILES][BLOCK_T / 2];
#pragma unroll
    for (int t = 0; t < TILES; t++)
#pragma unroll
        for (int i = 0; i < BLOCK_T / 2; i++) sums[t][i] = 0.0f;
    consume(sums, maps, work, rings, supers, words, num_rows, num_all_steps);
    __syncthreads();  // the sums take the place of the rings
#if SWIGLU
    keep_activated(sums, work, shared_address(stages), bias);
    __syncthreads();
    store_activated(work, shared_address(stages), (u16 *)out, interleaved_out, num_tokens,
                    out_stride);
#else
    keep_sums(sums, (float *)stages);
    if (work.parts == 1)
        __syncthreads();
    else
        cluster_sync();
    u32 kept = shared_address(stages);
    switch (work.parts) {
        case 1:
            store_sums<1>(work, kept, bias, out, num_rows, num_tokens, out_stride);
            break;
        case 2:
            store_sums<2>(work, kept, bias, out, num_rows, num_tokens, out_stride);
            break;
        case 4:
            store_sums<4>(work, kept, bias, out, num_rows, num_tokens, out_stride);
            break;
        default:
            store_sums<8>(work, kept, bias, out, num_rows, num_tokens, out_stride);
    }
    __syncwarp();
    if (work.parts > 1) cluster_wait_for_readers();  // no block ends while others read its sums
#endif
    if (turn == SECOND) wait_for_inputs();
}
