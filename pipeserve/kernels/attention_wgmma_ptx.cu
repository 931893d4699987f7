// Instructions that attention_wgmma.cu is written in (PTX ISA, sm_90a). A test puts plain C++ of
// the same meaning in this file's place.

// HOPPER

DEVICE int warp_sum(int value) { return __reduce_add_sync(-1u, value); }
DEVICE int warp_max(int value) { return __reduce_max_sync(-1u, value); }
DEVICE int warp_from(int value, int lane) { return __shfl_sync(-1u, value, lane); }
DEVICE int warp_prefix_sum(int value, int lane) {
#pragma unroll
    for (int by = 1; by < 32; by *= 2) {
        int before = __shfl_up_sync(-1u, value, by);
        if (lane >= by) value += before;
    }
    return value;
}
// The first lane of which it is true, or 32.
DEVICE int warp_first(bool is_it) {
    u32 lanes = __ballot_sync(-1u, is_it);
    return lanes == 0 ? 32 : __ffs(lanes) - 1;
}

#define KERNEL extern "C" __global__ void __launch_bounds__(THREADS, 1)
#define PARAMETER const __grid_constant__

DEVICE int thread_index() { return threadIdx.x; }
DEVICE int block_index() { return blockIdx.x; }
DEVICE int num_blocks_of_grid() { return gridDim.x; }
DEVICE char *shared_start() {
    extern __shared__ char shared[];
    return shared;
}
DEVICE void block_sync() { __syncthreads(); }
DEVICE void warp_sync() { __syncwarp(); }
DEVICE float from_lane_across(float value, int mask) { return __shfl_xor_sync(-1u, value, mask); }
DEVICE u32 from_lane_across(u32 value, int mask) { return __shfl_xor_sync(-1u, value, mask); }
DEVICE int load_index(const int *from) { return __ldcg(from); }
DEVICE void store_16_bytes(u16 *to, const u32 (&words)[4]) {
    *(uint4 *)to = make_uint4(words[0], words[1], words[2], words[3]);
}
DEVICE void clear_16_bytes(u32 address) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(address), "r"(0) : "memory");
}
DEVICE float infinity() { return __int_as_float(0x7f800000); }

DEVICE float exp2_of(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
DEVICE u32 pair_of(float low, float high) {
    u32 pair;
#if IS_BF16
    asm volatile("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
#else
    asm volatile("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
#endif
    return pair;
}

// One lane of the warp: the compiler then knows that what it copies is the same for all.
DEVICE bool is_elected() {
    u32 elected;
    asm volatile(
        "{ .reg .pred elected; elect.sync _|elected, -1;\n"
        "selp.u32 %0, 1, 0, elected; }"
        : "=r"(elected));
    return elected;
}
DEVICE void named_barrier_sync(int number, int num_threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(num_threads) : "memory");
}
DEVICE void named_barrier_arrive(int number, int num_threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(number), "r"(num_threads) : "memory");
}

DEVICE void copy_queries(u32 to, const TensorMap &map, int dim, int head, int token, u32 barrier) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
        ".L2::cache_hint [%0], [%1, {%2, %3, %4}], [%5], %6;" ::"r"(to),
        "l"(&map), "r"(dim), "r"(head), "r"(token), "r"(barrier), "l"(EVICT_FIRST)
        : "memory");
}
DEVICE void copy_positions(u32 to, const TensorMap &map, int dim, int kv_head, int in_page,
                           int block, u32 barrier) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes"
        ".L2::cache_hint [%0], [%1, {%2, %3, %4, %5}], [%6], %7;" ::"r"(to),
        "l"(&map), "r"(dim), "r"(kv_head), "r"(in_page), "r"(block), "r"(barrier),
        "l"(EVICT_NORMAL)
        : "memory");
}

// Nothing computed of these values moves to before this point.
template <int COUNT>
DEVICE void settle(float (&values)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) asm volatile("" : "+f"(values[i])::"memory");
}

// What is in shared memory can be read by the tensor cores, or written by the copy engine.
DEVICE void fence_for_engines() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
DEVICE void fence_barriers() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    fence_for_engines();
}
DEVICE void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(PRODUCER_REGISTERS));
}
DEVICE void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(CONSUMER_REGISTERS));
}

// WGMMA
