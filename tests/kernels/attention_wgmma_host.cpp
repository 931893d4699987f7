// What attention_wgmma_ptx.cu has, in plain C++: every thread of a block is a fibre that runs until
// it must wait. Here threads, warps and barriers; attention_wgmma_host_engines.cpp goes on.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <ucontext.h>
#include <vector>

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned long long u64;
using std::max;
using std::min;
#define DEVICE inline
#define KERNEL static void
#define PARAMETER const

// Sizes and strides in elements, from the innermost dimension out.
struct alignas(64) TensorMap {
    u64 address;
    int rank, sizes[4], strides[4], box[4];
};

struct Meeting {
    int arrived = 0;
    unsigned generation = 0;
};
struct Barrier {
    int count = 0, pending = 0, bytes = 0;
    u32 parity = 0;
    void check() {
        if (pending == 0 && bytes == 0) pending = count, parity ^= 1;
    }
};
struct Product {
    int columns;
    bool adds, has_registers;
    u64 a, b;
    float *sums[32];
    const u32 *registers[32];
};
struct Warp {
    Meeting meeting;
    u32 in[32], out[32];
    Product product;
    std::vector<Product> open;
    std::deque<std::vector<Product>> committed;
};
struct Copy {
    u32 to;
    const TensorMap *map;
    int at[4];
    u32 barrier;
};
struct Thread {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    int index;
    bool is_done;
};

static ucontext_t scheduler;
static Thread *self;
static std::vector<Thread> threads;
static std::vector<Warp> warps;
static std::vector<unsigned char> memory;
static std::map<u32, Barrier> barriers;
static std::map<int, Meeting> named;
static std::deque<Copy> copies;
static int current_block, grid_blocks;
static bool is_late;
static long progress;

static void fail(const char *what) {
    fprintf(stderr, "%s\n", what);
    abort();
}
static void yield() { swapcontext(&self->context, &scheduler); }

// The last to come does `together` for all.
template <class Together>
static void meet(Meeting &meeting, int size, Together together) {
    unsigned generation = meeting.generation;
    progress++;
    if (++meeting.arrived == size) {
        together();
        meeting.arrived = 0, meeting.generation++;
    }
    while (meeting.generation == generation) yield();
}
static Warp &warp() { return warps[self->index / 32]; }
static int lane() { return self->index % 32; }
template <class Together>
static u32 with_warp(u32 mine, Together together) {
    Warp &here = warp();
    here.in[lane()] = mine;
    meet(here.meeting, 32, [&] { together(here); });
    return here.out[lane()];
}

static u16 half_at(const unsigned char *from) {
    u16 bits;
    memcpy(&bits, from, 2);
    return bits;
}
static float value_of(u16 bits) {
#if IS_BF16
    u32 wide = (u32)bits << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
#else
    _Float16 half;
    memcpy(&half, &bits, 2);
    return (float)half;
#endif
}
static u32 bits_of(float value) {
#if IS_BF16
    u32 wide;
    memcpy(&wide, &value, 4);
    return (wide + 0x7FFF + (wide >> 16 & 1)) >> 16;
#else
    _Float16 half = (_Float16)value;
    u16 bits;
    memcpy(&bits, &half, 2);
    return bits;
#endif
}

DEVICE int thread_index() { return self->index; }
DEVICE int block_index() { return current_block; }
DEVICE int num_blocks_of_grid() { return grid_blocks; }
DEVICE char *shared_start() { return (char *)memory.data() + 16; }
DEVICE u32 shared_address(const void *pointer) {
    return (u32)((const unsigned char *)pointer - memory.data());
}
DEVICE void block_sync();
DEVICE void warp_sync() {
    with_warp(0, [](Warp &) {});
}
DEVICE int warp_sum(int value) {
    return with_warp(value, [](Warp &w) {
        u32 sum = 0;
        for (u32 x : w.in) sum += x;
        std::fill_n(w.out, 32, sum);
    });
}
DEVICE int warp_max(int value) {
    return with_warp(value, [](Warp &w) {
        int most = (int)w.in[0];
        for (u32 x : w.in) most = max(most, (int)x);
        std::fill_n(w.out, 32, (u32)most);
    });
}
DEVICE int warp_from(int value, int from) {
    return with_warp(value, [=](Warp &w) { std::fill_n(w.out, 32, w.in[from]); });
}
DEVICE int warp_prefix_sum(int value, int) {
    return with_warp(value, [](Warp &w) {
        u32 sum = 0;
        for (int i = 0; i < 32; i++) w.out[i] = sum += w.in[i];
    });
}
DEVICE int warp_first(bool is_it) {
    return with_warp(is_it, [](Warp &w) {
        int first = std::find(w.in, w.in + 32, 1u) - w.in;
        std::fill_n(w.out, 32, (u32)first);
    });
}
DEVICE u32 from_lane_across(u32 value, int mask) {
    return with_warp(value, [=](Warp &w) {
        for (int i = 0; i < 32; i++) w.out[i] = w.in[i ^ mask];
    });
}
DEVICE float from_lane_across(float value, int mask) {
    u32 bits;
    memcpy(&bits, &value, 4);
    bits = from_lane_across(bits, mask);
    memcpy(&value, &bits, 4);
    return value;
}
DEVICE int load_index(const int *from) { return *from; }
DEVICE void store_16_bytes(u16 *to, const u32 (&words)[4]) { memcpy(to, words, 16); }
DEVICE void clear_16_bytes(u32 address) { memset(&memory[address], 0, 16); }
DEVICE float infinity() { return INFINITY; }
DEVICE float exp2_of(float x) { return std::exp2(x); }
DEVICE u32 pair_of(float low, float high) { return bits_of(low) | bits_of(high) << 16; }

DEVICE void barrier_init(u32 barrier, u32 count) {
    Barrier fresh;
    fresh.count = fresh.pending = count;
    barriers[barrier] = fresh;
}
static void arrive(u32 barrier) {
    Barrier &here = barriers.at(barrier);
    if (--here.pending < 0) fail("one arrival too many");
    here.check();
    progress++;
}
DEVICE void barrier_arrive_of_warp(u32 barrier) {
    with_warp(0, [=](Warp &) { arrive(barrier); });
}
DEVICE bool is_elected() { return lane() == 0; }
DEVICE void barrier_expect(u32 barrier, u32 num_bytes) {
    barriers.at(barrier).bytes += num_bytes;
    arrive(barrier);
}
DEVICE void barrier_wait(u32 barrier, u32 parity) {
    while (barriers.at(barrier).parity == parity) yield();
}
DEVICE void named_barrier_arrive(int number, int num_threads) {
    Meeting &here = named[number];
    progress++;
    if (++here.arrived == num_threads) here.arrived = 0, here.generation++;
}
DEVICE void named_barrier_sync(int number, int num_threads) {
    meet(named[number], num_threads, [] {});
}
