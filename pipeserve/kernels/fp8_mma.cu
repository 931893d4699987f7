// x W^T of 8-bit floats on Hopper's tensor cores, for so few rows that reading the weights is all
// that takes time: both operands from shared memory, where the copy engine keeps up to STAGES steps
// of columns in flight. The weights of the first steps are asked for before the activations are
// there. The blocks of a cluster take parts of the columns of the same outputs; their sums are added
// in a fixed order, over distributed shared memory.

// HOPPER


constexpr int CONSUMERS = WARPGROUPS * 128;
constexpr int THREADS = CONSUMERS + 32;  // the last warp starts the copies
constexpr int BLOCK_N = WARPGROUPS * TILES * 64;
constexpr int ATOM = 128;                // bytes of a row that the tensor cores take out of one tile
constexpr int WEIGHT_ATOM_BYTES = BLOCK_N * ATOM, X_ATOM_BYTES = BLOCK_T * ATOM;
constexpr int WEIGHT_BYTES = ATOMS * WEIGHT_ATOM_BYTES;
constexpr int STAGE_BYTES = WEIGHT_BYTES + ATOMS * X_ATOM_BYTES;
constexpr int PITCH = BLOCK_N + 4;       // of the sums' rows: no two threads in one bank
constexpr int SCALE_PITCH = BLOCK_T + 2;  // of the rows of x's scales

// WGMMA

struct Maps {
    TensorMap weights, x;
};

// What a block works on.
struct Work {
    int first_row, first_token, first_step, num_steps, part;
};

// Shared memory: slots for steps of both operands, and per slot a barrier that it is full and one
// that it is empty.
struct Ring {
    u32 slots, full, empty;
    float *scales;  // with GROUPED x's, a row of tokens per 128 columns
};

struct Cursor {
    u32 slot = 0, parity = 0;
    DEVICE void advance() {
        if (++slot == STAGES) slot = 0, parity ^= 1;
    }
};

DEVICE void copy_weights(const Maps &maps, const Work &work, int i, u32 slot, const Ring &ring) {
    u32 barrier = ring.full + 8 * slot, to = ring.slots + slot * STAGE_BYTES;
    barrier_expect(barrier, STAGE_BYTES);
#pragma unroll
    for (int atom = 0; atom < ATOMS; atom++)
        copy_tile(to + atom * WEIGHT_ATOM_BYTES, maps.weights,
                  ((work.first_step + i) * ATOMS + atom) * ATOM, work.first_row, barrier,
                  EVICT_FIRST);
}

DEVICE void copy_x(const Maps &maps, const Work &work, int i, u32 slot, const Ring &ring) {
    u32 barrier = ring.full + 8 * slot, to = ring.slots + slot * STAGE_BYTES + WEIGHT_BYTES;
#pragma unroll
    for (int atom = 0; atom < ATOMS; atom++)
        copy_tile(to + atom * X_ATOM_BYTES, maps.x,
                  ((work.first_step + i) * ATOMS + atom) * ATOM, work.first_token, barrier,
                  EVICT_NORMAL);
}

// One thread; the first steps' weights are on their way.
DEVICE void copy_all(const Maps &maps, const Work &work, const Ring &ring) {
    wait_for_inputs();
    for (int i = 0; i < min(STAGES, work.num_steps); i++) copy_x(maps, work, i, i, ring);
    Cursor refilled;
    for (int i = STAGES; i < work.num_steps; i++) {
        barrier_wait(ring.empty + 8 * refilled.slot, refilled.parity);
        copy_weights(maps, work, i, refilled.slot, ring);
        copy_x(maps, work, i, refilled.slot, ring);
        refilled.advance();
    }
}

// Eight rows of 128 bytes, swizzled, follow each other: an operand's descriptor.
DEVICE u64 descriptor(u32 address) {
    return (u64)(address >> 4 & 0x3FFF) | 1ull << 16 | 64ull << 32 | 1ull << 62;
}

// With GROUPED, by all warps but the last; no copy waits for another. Past the matrix's columns x
// is 0 and has no scale.
DEVICE void load_scales(const float *x_scales, const Work &work, int num_tokens, int num_groups,
                        float *to) {
    int first = work.first_step * ATOMS, count = work.num_steps * ATOMS;
    int tokens_on = CONSUMERS / count, groups_on = CONSUMERS % count;
    int token = threadIdx.x / count, group = threadIdx.x % count;
    u32 at = shared_address(to);
    while (token < BLOCK_T) {
        bool is_inside = work.first_token + token < num_tokens && first + group < num_groups;
        size_t index = (size_t)(work.first_token + token) * num_groups + first + group;
        asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(
                         at + 4 * (group * SCALE_PITCH + token)),
                     "l"(is_inside ? x_scales + index : x_scales), "r"(is_inside ? 4 : 0)
                     : "memory");
        token += tokens_on, group += groups_on;
        if (group >= count) group -= count, token++;
    }
    asm volatile("cp.async.wait_all;" ::: "memory");
    asm volatile("bar.sync 1, %0;" ::"n"(CONSUMERS) : "memory");
}

// What the products of 128 columns come to, once they are there.
DEVICE void add_part(float (&sums)[BLOCK_T / 2], float (&part)[BLOCK_T / 2], const float *scales) {
#pragma unroll
    for (int i = 0; i < BLOCK_T / 2; i += 4) {
        float2 two = {1.0f, 1.0f};  // of the neighbouring tokens that a thread has
        if (GROUPED) two = *(const float2 *)(scales + 2 * i + threadIdx.x % 4 * 2);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            asm volatile("" : "+f"(part[i + j])::"memory");
            if (GROUPED)
                sums[i + j] += part[i + j] * (j % 2 ? two.y : two.x);
            else
                sums[i + j] += part[i + j];
        }
    }
}

// One warpgroup's outputs. The tensor cores keep sums in fewer bits than float32 has, so those of
// each 128 columns leave them.
DEVICE void multiply_all(float (&sums)[TILES][BLOCK_T / 2], int group, const Work &work,
                         const Ring &ring) {
    Cursor at;
    for (int i = 0; i < work.num_steps; i++) {
        u32 slot = ring.slots + at.slot * STAGE_BYTES;
        u64 weights = descriptor(slot + group * TILES * 64 * ATOM);
        u64 x = descriptor(slot + WEIGHT_BYTES);
        barrier_wait(ring.full + 8 * at.slot, at.parity);
#pragma unroll
        for (int atom = 0; atom < ATOMS; atom++) {
            float part[TILES][BLOCK_T / 2];
            asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
            for (int k = 0; k < 4; k++)
#pragma unroll
                for (int tile = 0; tile < TILES; tile++) {
                    u64 a = weights + (atom * WEIGHT_ATOM_BYTES + tile * 64 * ATOM >> 4) + 2 * k;
                    u64 b = x + (atom * X_ATOM_BYTES >> 4) + 2 * k;
                    if (k == 0)
                        multiply<0>(part[tile], a, b);
                    else
                        multiply<1>(part[tile], a, b);
                }
            asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
            asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
            if (atom == ATOMS - 1) barrier_arrive_of_warp(ring.empty + 8 * at.slot);
#pragma unroll
            for (int tile = 0; tile < TILES; tile++)
                add_part(sums[tile], part[tile],
                         ring.scales + (i * ATOMS + atom) * SCALE_PITCH);
        }
        at.advance();
    }
#pragma unroll
    for (int tile = 0; tile < TILES; tile++)
#pragma unroll
        for (int i = 0; i < BLOCK_T / 2; i++) asm volatile("" : "+f"(sums[tile][i])::"memory");
}

DEVICE void keep_sums(const float (&sums)[TILES][BLOCK_T / 2], int group, float *kept) {
    int row = group * TILES * 64 + threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4;
#pragma unroll
    for (int tile = 0; tile < TILES; tile++)
#pragma unroll
        for (int i = 0; i < BLOCK_T / 2; i++) {
            int token = i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2;
            kept[token * PITCH + row + 64 * tile + (i & 2) * 4] = sums[tile][i];
        }
}

DEVICE float bf16_value(u32 bits) { return __uint_as_float(bits << 16); }

DEVICE u32 bf16_pair(float low, float high) {
    u32 two;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(two) : "f"(high), "f"(low));
    return two;
}

// Adds the sums of the cluster's blocks in the order of their parts; each block takes some tokens.
template <int PARTS>
DEVICE void store_sums(const Work &work, u32 kept, const float *x_scales,
                       const float *weight_scales, const u16 *bias, u16 *out, int num_rows,
                       int num_tokens) {
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
        float x_scale = GROUPED ? 1.0f : x_scales[work.first_token + token];
        float4 scale = *(const float4 *)(weight_scales + row);
        total.x *= x_scale * scale.x, total.y *= x_scale * scale.y;
        total.z *= x_scale * scale.z, total.w *= x_scale * scale.w;
        if (bias) {
            uint2 more = *(const uint2 *)(bias + row);
            total.x += bf16_value(more.x & 0xFFFF), total.y += bf16_value(more.x >> 16);
            total.z += bf16_value(more.y & 0xFFFF), total.w += bf16_value(more.y >> 16);
        }
        uint2 four = {bf16_pair(total.x, total.y), bf16_pair(total.z, total.w)};
        *(uint2 *)(out + (size_t)(work.first_token + token) * num_rows + row) = four;
    }
}

// Tiles of outputs go round fastest, so that blocks that run at once share few tiles of x.
DEVICE Work work_of(int num_row_tiles, int num_all_steps) {
    int parts = cluster_size(), tile = blockIdx.x / parts;
    Work work;
    work.part = cluster_rank();
    work.first_row = tile % num_row_tiles * BLOCK_N;
    work.first_token = tile / num_row_tiles * BLOCK_T;
    work.first_step = work.part * num_all_steps / parts;
    work.num_steps = (work.part + 1) * num_all_steps / parts - work.first_step;
    return work;
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_AT_ONCE)
    fp8_mma(const __grid_constant__ Maps maps, const float *x_scales, const float *weight_scales,
            const u16 *bias, u16 *out, int num_rows, int num_tokens, int num_row_tiles,
            int num_all_steps, int num_groups) {
    start_next_kernel();
    extern __shared__ char shared[];
    char *slots = shared + (1024 - (shared_address(shared) & 1023)) % 1024;
    Ring ring;
    ring.slots = shared_address(slots);
    ring.full = ring.slots + STAGES * STAGE_BYTES;
    ring.empty = ring.full + 8 * STAGES;
    ring.scales = (float *)(slots + STAGES * (STAGE_BYTES + 16));
    Work work = work_of(num_row_tiles, num_all_steps);
    int warp = __shfl_sync(-1u, threadIdx.x / 32, 0);  // known to be one for the warp
    if (threadIdx.x == CONSUMERS) {
        prefetch_map(maps.weights);
        prefetch_map(maps.x);
        for (int i = 0; i < STAGES; i++) {
            barrier_init(ring.full + 8 * i, 1);
            barrier_init(ring.empty + 8 * i, WARPGROUPS * 4);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        // No kernel before this one has written the weights.
        for (int i = 0; i < min(STAGES, work.num_steps); i++)
            copy_weights(maps, work, i, i, ring);
    }
    __syncwarp();
    __syncthreads();
    if (warp == WARPGROUPS * 4) {
        if (threadIdx.x == CONSUMERS) copy_all(maps, work, ring);
        __syncwarp();
        wait_for_inputs();
        __syncthreads();
    } else {
        float sums[TILES][BLOCK_T / 2];
#pragma unroll
        for (int tile = 0; tile < TILES; tile++)
#pragma unroll
            for (int i = 0; i < BLOCK_T / 2; i++) sums[tile][i] = 0.0f;
        wait_for_inputs();
        if (GROUPED) load_scales(x_scales, work, num_tokens, num_groups, ring.scales);
        multiply_all(sums, warp / 4, work, ring);
        __syncthreads();  // the sums take the place of the slots
        keep_sums(sums, warp / 4, (float *)slots);
    }
    if (cluster_size() == 1)
        __syncthreads();
    else
        cluster_sync();
    u32 kept = shared_address(slots);
    switch (cluster_size()) {
        case 1:
            store_sums<1>(work, kept, x_scales, weight_scales, bias, out, num_rows, num_tokens);
            break;
        case 2:
            store_sums<2>(work, kept, x_scales, weight_scales, bias, out, num_rows, num_tokens);
            break;
        case 4:
            store_sums<4>(work, kept, x_scales, weight_scales, bias, out, num_rows, num_tokens);
            break;
        default:
            store_sums<8>(work, kept, x_scales, weight_scales, bias, out, num_rows, num_tokens);
    }
    __syncwarp();
    if (cluster_size() > 1) cluster_wait_for_readers();  // no block ends while others read its sums
}
