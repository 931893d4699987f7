// Instructions that quant_imma.cu is written in, by their PTX names (PTX ISA, sm_80 and later). A
// test puts plain C++ of the same meaning in this file's place.

typedef unsigned int u32;
typedef unsigned short u16;
#define DEVICE __device__ __forceinline__
#define SIGNED_CODES (OFFSET || TABLE || LOW_BITS == 8)
#define KERNEL extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_AT_ONCE)

DEVICE float as_float(u32 bits) { return __uint_as_float(bits); }
DEVICE u32 bits_of(float value) { return __float_as_uint(value); }
DEVICE float multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }

// The f16 in the lower half.
DEVICE float half_to_float(u32 bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"((u16)bits));
    return value;
}
DEVICE u16 float_to_half(float value) {
    u16 bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}
DEVICE u32 prmt(u32 a, u32 b, u32 select) {
    u32 d;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(select));
    return d;
}
// start + the sum of two signed 16-bit integers.
DEVICE u32 add_pair(u32 pair, u32 start) {
    u32 d;
    asm("dp2a.lo.s32.s32 %0, %1, %2, %3;" : "=r"(d) : "r"(pair), "r"(0x0101), "r"(start));
    return d;
}

DEVICE u32 thread_index() { return threadIdx.x; }
DEVICE u32 block_index() { return blockIdx.x; }
DEVICE u32 shared_start() {
    extern __shared__ char shared[];
    return (u32)__cvta_generic_to_shared(shared);
}
DEVICE u32 load_shared(u32 address) {
    u32 d;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(d) : "r"(address) : "memory");
    return d;
}
DEVICE uint2 load_shared_2(u32 address) {
    uint2 d;
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];"
                 : "=r"(d.x), "=r"(d.y)
                 : "r"(address)
                 : "memory");
    return d;
}
DEVICE uint4 load_shared_4(u32 address) {
    uint4 d;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(d.x), "=r"(d.y), "=r"(d.z), "=r"(d.w)
                 : "r"(address)
                 : "memory");
    return d;
}
DEVICE void store_shared(u32 address, float value) {
    asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(value) : "memory");
}
// Four matrices of 8 rows of 16 bytes; lane i names row i % 8 of the i / 8-th and gets bytes
// 4 * (i % 4) of row i / 4 of each.
DEVICE void load_matrices(u32 (&d)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"(address)
                 : "memory");
}

// To shared memory, done by the time that copies_wait says.
template <int BYTES>
DEVICE void copy_async(u32 to, const void *from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(from), "n"(BYTES)
                 : "memory");
}
// 16 bytes that are read once, past the first level cache.
DEVICE void copy_async_once(u32 to, const void *from) {
    asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16;" ::"r"(to), "l"(from)
                 : "memory");
}
DEVICE void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING>
DEVICE void copies_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}
DEVICE void warp_sync() { asm volatile("bar.warp.sync -1;" ::: "memory"); }
DEVICE void block_sync() { __syncthreads(); }

// 16 outputs, 8 tokens, 32 columns of codes, all sums on top of start.
DEVICE void multiply_32(u32 (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, u32 start) {
#if SIGNED_CODES
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%10, %10, %10, %10};"
#else
    asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%10, %10, %10, %10};"
#endif
        : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(start));
}
// The same of 16 columns.
DEVICE void multiply_16(u32 (&d)[4], u32 a0, u32 a1, u32 b, u32 start) {
#if SIGNED_CODES
    asm("mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
        "{%7, %7, %7, %7};"
#else
    asm("mma.sync.aligned.m16n8k16.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
        "{%7, %7, %7, %7};"
#endif
        : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
        : "r"(a0), "r"(a1), "r"(b), "r"(start));
}
// Sums of 16 outputs, 8 tokens, 8 groups, operands cut to the 11 bits of tf32.
DEVICE void multiply_mins(float (&d)[4], const float (&a)[4], float b0, float b1) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(bits_of(a[0])), "r"(bits_of(a[1])), "r"(bits_of(a[2])), "r"(bits_of(a[3])),
          "r"(bits_of(b0)), "r"(bits_of(b1)));
}

// Only where CLUSTERED: compute capability 9.0 and later.
DEVICE void start_next_kernel() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
DEVICE void wait_for_inputs() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
DEVICE void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
DEVICE u32 cluster_rank() {
    u32 rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
DEVICE float load_of_rank(u32 address, u32 rank) {
    float value;
    asm volatile(
        "{ .reg .b32 there; mapa.shared::cluster.u32 there, %1, %2;\n"
        "ld.shared::cluster.f32 %0, [there]; }"
        : "=f"(value)
        : "r"(address), "r"(rank)
        : "memory");
    return value;
}
