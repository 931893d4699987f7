// What quant_imma_ptx.cu has, in plain C++: every thread of a cluster is a fibre that runs until it
// must meet others. Copies happen as late as they may, or as soon. Instructions as the PTX manual
// has them.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <initializer_list>
#include <memory>
#include <ucontext.h>
#include <vector>

typedef unsigned int u32;
typedef unsigned short u16;
struct uint2 {
    u32 x, y;
};
struct uint4 {
    u32 x, y, z, w;
};
#define DEVICE inline
#define KERNEL extern "C" void

struct Meeting {
    int size = 0, arrived = 0;
    unsigned generation = 0;
};
struct Warp {
    Meeting meeting;
    u32 in[32][6];
    u32 out[32][4];
};
struct Block {
    Meeting meeting;
    std::vector<unsigned char> memory;
    std::vector<Warp> warps;
};
struct Copy {
    u32 to;
    const char *from;
    int bytes;
};
struct Thread {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    Block *block;
    u32 index, block_index, rank;
    bool is_done = false, has_inputs = false;
    std::vector<Copy> open_group;
    std::deque<std::vector<Copy>> groups;
};

static ucontext_t scheduler;
static Thread *self;
static std::vector<Block> blocks;  // of the cluster that runs
static Meeting cluster_meeting;
static bool copies_are_late;
static long num_arrivals;

static void fail(const char *what) {
    fprintf(stderr, "%s\n", what);
    abort();
}

// The last to come does `together` for all.
template <class Together>
static void meet(Meeting &meeting, Together together) {
    unsigned generation = meeting.generation;
    num_arrivals++;
    if (++meeting.arrived == meeting.size) {
        together();
        meeting.arrived = 0, meeting.generation++;
    }
    while (meeting.generation == generation) swapcontext(&self->context, &scheduler);
}

static unsigned char *place(Block &block, u32 address, u32 bytes) {
    if (address + bytes > block.memory.size()) fail("past the shared memory");
    if (address % bytes) fail("a misaligned address");
    return &block.memory[address];
}
template <class Value>
static Value read_shared(u32 address) {
    Value value;
    memcpy(&value, place(*self->block, address, sizeof value), sizeof value);
    return value;
}

DEVICE float as_float(u32 bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
DEVICE u32 bits_of(float value) {
    u32 bits;
    memcpy(&bits, &value, 4);
    return bits;
}
DEVICE float multiply_add(float a, float b, float c) { return std::fma(a, b, c); }
DEVICE float half_to_float(u32 bits) {
    u16 low = (u16)bits;
    _Float16 half;
    memcpy(&half, &low, 2);
    return (float)half;
}
DEVICE u16 float_to_half(float value) {
    _Float16 half = (_Float16)value;
    u16 bits;
    memcpy(&bits, &half, 2);
    return bits;
}
DEVICE u32 prmt(u32 a, u32 b, u32 select) {
    unsigned long long bytes = (unsigned long long)b << 32 | a;
    u32 picked = 0;
    for (int i = 0; i < 4; i++) {
        u32 nibble = select >> 4 * i & 15, byte = bytes >> 8 * (nibble & 7) & 255;
        if (nibble & 8) byte = byte & 128 ? 255 : 0;
        picked |= byte << 8 * i;
    }
    return picked;
}
DEVICE u32 add_pair(u32 pair, u32 start) {
    return start + (int)(short)(pair & 0xFFFF) + (int)(short)(pair >> 16);
}

DEVICE u32 thread_index() { return self->index; }
DEVICE u32 block_index() { return self->block_index; }
DEVICE u32 shared_start() { return 16; }
DEVICE u32 load_shared(u32 address) { return read_shared<u32>(address); }
DEVICE uint2 load_shared_2(u32 address) { return read_shared<uint2>(address); }
DEVICE uint4 load_shared_4(u32 address) { return read_shared<uint4>(address); }
DEVICE void store_shared(u32 address, float value) {
    memcpy(place(*self->block, address, 4), &value, 4);
}

template <class Together>
static void with_warp(std::initializer_list<u32> mine, u32 (&d)[4], Together together) {
    Warp &warp = self->block->warps[self->index / 32];
    int lane = self->index % 32;
    std::copy(mine.begin(), mine.end(), warp.in[lane]);
    meet(warp.meeting, [&] { together(warp.in, warp.out); });
    memcpy(d, warp.out[lane], 16);
}
DEVICE void load_matrices(u32 (&d)[4], u32 address) {
    with_warp({address}, d, [](u32 (&in)[32][6], u32 (&out)[32][4]) {
        for (int lane = 0; lane < 32; lane++)
            for (int i = 0; i < 4; i++) {
                place(*self->block, in[8 * i + lane / 4][0], 16);
                out[lane][i] = read_shared<u32>(in[8 * i + lane / 4][0] + lane % 4 * 4);
            }
    });
}
static int code_at(u32 word, int i, bool is_signed) {
    u32 byte = word >> 8 * i & 255;
    return is_signed ? (int)(signed char)byte : (int)byte;
}
// quarters: of 16 columns, 1 or 2 of them, each in this many registers of a per row.
static void multiply(u32 (&in)[32][6], u32 (&out)[32][4], int halves, u32 start) {
    bool is_signed = OFFSET || TABLE || LOW_BITS == 8;
    for (int lane = 0; lane < 32; lane++)
        for (int i = 0; i < 4; i++) {
            int row = lane / 4, token = lane % 4 * 2 + i % 2, sum = 0;
            for (int k = 0; k < 16 * halves; k++) {
                int at = k / 4 % 4;
                u32 a = in[4 * row + at][i / 2 + k / 16 * 2], b = in[4 * token + at][4 + k / 16];
                sum += code_at(a, k % 4, is_signed) * code_at(b, k % 4, true);
            }
            out[lane][i] = start + sum;
        }
}
DEVICE void multiply_32(u32 (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, u32 start) {
    with_warp({a[0], a[1], a[2], a[3], b0, b1}, d,
              [=](auto &in, auto &out) { multiply(in, out, 2, start); });
}
DEVICE void multiply_16(u32 (&d)[4], u32 a0, u32 a1, u32 b, u32 start) {
    with_warp({a0, a1, 0, 0, b, 0}, d, [=](auto &in, auto &out) { multiply(in, out, 1, start); });
}
static float cut(u32 bits) { return as_float(bits & 0xFFFFE000u); }
DEVICE void multiply_mins(float (&d)[4], const float (&a)[4], float b0, float b1) {
    u32 products[4];
    u32 bits[4] = {bits_of(a[0]), bits_of(a[1]), bits_of(a[2]), bits_of(a[3])};
    with_warp({bits[0], bits[1], bits[2], bits[3], bits_of(b0), bits_of(b1)}, products,
              [](u32 (&in)[32][6], u32 (&out)[32][4]) {
                  for (int lane = 0; lane < 32; lane++)
                      for (int i = 0; i < 4; i++) {
                          int row = lane / 4, token = lane % 4 * 2 + i % 2;
                          double sum = 0;
                          for (int k = 0; k < 8; k++)
                              sum += (double)cut(in[4 * row + k % 4][i / 2 + k / 4 * 2]) *
                                     cut(in[4 * token + k % 4][4 + k / 4]);
                          out[lane][i] = bits_of((float)sum);
                      }
              });
    for (int i = 0; i < 4; i++) d[i] += as_float(products[i]);
}

static void do_copies(const std::vector<Copy> &group) {
    for (const Copy &copy : group)
        memcpy(place(*self->block, copy.to, copy.bytes), copy.from, copy.bytes);
}
template <int BYTES>
DEVICE void copy_async(u32 to, const void *from) {
    if ((size_t)from % BYTES) fail("a misaligned source");
    self->open_group.push_back({to, (const char *)from, BYTES});
    if (!copies_are_late) do_copies({self->open_group.back()});
}
DEVICE void copy_async_once(u32 to, const void *from) { copy_async<16>(to, from); }
DEVICE void copies_commit() {
    self->groups.push_back(self->open_group);
    self->open_group.clear();
}
template <int PENDING>
DEVICE void copies_wait() {
    for (; self->groups.size() > PENDING; self->groups.pop_front())
        if (copies_are_late) do_copies(self->groups.front());
}
DEVICE void block_sync() {
    meet(self->block->meeting, [] {});
}
DEVICE void warp_sync() {
    meet(self->block->warps[self->index / 32].meeting, [] {});
}
DEVICE void start_next_kernel() {}
DEVICE void wait_for_inputs() { self->has_inputs = true; }
DEVICE void cluster_sync() {
    meet(cluster_meeting, [] {});
}
DEVICE float load_of_rank(u32 address, u32 rank) {
    float value;
    memcpy(&value, place(blocks[rank], address, 4), 4);
    return value;
}

// SOURCE

struct Arguments {
    const char *codes, *scales, *x_sums, *low, *high, *words, *mins, *supers;
    const u16 *bias;
    void *out;
    int num_rows, num_tokens, num_all_steps, num_token_tiles, num_parts, out_stride;
};
static const Arguments *arguments;

static void run_thread() {
    const Arguments &a = *arguments;
    quant_imma(a.codes, a.scales, a.x_sums, a.low, a.high, a.words, a.mins, a.supers, a.bias, a.out,
               a.num_rows, a.num_tokens, a.num_all_steps, a.num_token_tiles, a.num_parts,
               a.out_stride);
    if (CLUSTERED && !self->has_inputs) fail("it has not waited for its inputs");
    self->is_done = true;
    swapcontext(&self->context, &scheduler);
}

static void run_cluster(u32 first_block, int size, int shared_bytes) {
    blocks.assign(size, Block());
    std::vector<Thread> threads(size * THREADS);
    cluster_meeting = Meeting{size * THREADS};
    for (Block &block : blocks) {
        block.meeting.size = THREADS;
        block.memory.assign(16 + shared_bytes, 255);
        block.warps.resize(WARPS);
        for (Warp &warp : block.warps) warp.meeting.size = 32;
    }
    for (size_t i = 0; i < threads.size(); i++) {
        Thread &thread = threads[i];
        thread.index = i % THREADS, thread.rank = i / THREADS;
        thread.block = &blocks[thread.rank], thread.block_index = first_block + thread.rank;
        thread.stack.reset(new char[65536]);
        getcontext(&thread.context);
        thread.context.uc_stack.ss_sp = thread.stack.get();
        thread.context.uc_stack.ss_size = 65536;
        makecontext(&thread.context, run_thread, 0);
    }
    for (bool is_any = true; is_any;) {
        is_any = false;
        long before = num_arrivals;
        for (Thread &thread : threads) {
            if (thread.is_done) continue;
            is_any = true, self = &thread;
            swapcontext(&scheduler, &thread.context);
            if (thread.is_done) num_arrivals++;
        }
        if (is_any && before == num_arrivals) {
            bool is_stuck = true;
            for (Thread &thread : threads) {
                if (thread.is_done) continue;
                self = &thread;
                swapcontext(&scheduler, &thread.context);
                is_stuck = is_stuck && before == num_arrivals && !thread.is_done;
            }
            if (is_stuck) fail("threads wait for each other");
        }
    }
}

extern "C" void run(const Arguments *given, int num_blocks, int shared_bytes, int are_late) {
    arguments = given, copies_are_late = are_late;
    int size = CLUSTERED ? given->num_parts : 1;
    for (int block = 0; block < num_blocks; block += size) run_cluster(block, size, shared_bytes);
}
