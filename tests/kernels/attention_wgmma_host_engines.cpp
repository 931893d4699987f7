// The copy engine and the tensor cores of attention_wgmma_host.cpp, and behind the kernel what runs
// it. Copies and products are done as late as they may, or at once. Instructions as the PTX manual
// has them.

static u32 swizzled(u32 address) { return address ^ (address >> 7 & 7) << 4; }

static void do_copy(const Copy &copy) {
    const TensorMap &map = *copy.map;
    if (copy.to % 1024 || map.box[0] != 64) fail("a copy's place");
    int num_rows = 1;
    for (int d = 1; d < map.rank; d++) num_rows *= map.box[d];
    for (int row = 0; row < num_rows; row++) {
        int rest = row;
        bool is_inside = true;
        const u16 *from = (const u16 *)map.address;
        for (int d = 1; d < map.rank; d++) {
            int at = copy.at[d] + rest % map.box[d];
            rest /= map.box[d];
            is_inside = is_inside && at >= 0 && at < map.sizes[d];
            if (is_inside) from += (long)at * map.strides[d];
        }
        for (int i = 0; i < 64; i++) {
            int column = copy.at[0] + i;
            u16 value = is_inside && column < map.sizes[0] ? from[column] : 0;
            memcpy(&memory.at(swizzled(copy.to + row * 128 + 2 * i)), &value, 2);
        }
    }
    Barrier &barrier = barriers.at(copy.barrier);
    barrier.bytes -= num_rows * 128;
    barrier.check();
    progress++;
}
static void start_copy(const Copy &copy) {
    if (is_late)
        copies.push_back(copy);
    else
        do_copy(copy);
}
DEVICE void copy_queries(u32 to, const TensorMap &map, int dim, int head, int token, u32 barrier) {
    start_copy({to, &map, {dim, head, token, 0}, barrier});
}
DEVICE void copy_positions(u32 to, const TensorMap &map, int dim, int kv_head, int in_page,
                           int block, u32 barrier) {
    start_copy({to, &map, {dim, kv_head, in_page, block}, barrier});
}

struct Described {
    u32 start, leading, stride;
    explicit Described(u64 bits) {
        start = (bits & 0x3FFF) << 4, leading = (bits >> 16 & 0x3FFF) << 4;
        stride = (bits >> 32 & 0x3FFF) << 4;
        if (bits >> 62 != 1) fail("not swizzled by 128 bytes");
    }
    // Element `inner` of the dimension that rows of 128 bytes run along, and row `outer`.
    float at(int inner, int outer) const {
        u32 address = start + inner / 64 * leading + inner % 64 * 2 + outer / 8 * stride;
        return value_of(half_at(&memory.at(swizzled(address + outer % 8 * 128))));
    }
};

static void do_product(const Product &product, int warp_of_group) {
    static float a[16][16], b[16][256];
    Described keys(product.b);
    for (int k = 0; k < 16; k++)
        for (int n = 0; n < product.columns; n++)
            b[k][n] = product.has_registers ? keys.at(n, k) : keys.at(k, n);
    for (int row = 0; row < 16; row++)
        for (int k = 0; k < 16; k++)
            if (product.has_registers) {
                u32 pair = product.registers[row % 8 * 4 + k / 2 % 4][row / 8 + k / 8 * 2];
                a[row][k] = value_of(pair >> k % 2 * 16);
            } else
                a[row][k] = Described(product.a).at(k, warp_of_group * 16 + row);
    for (int lane = 0; lane < 32; lane++)
        for (int i = 0; i < product.columns / 2; i++) {
            int row = lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
            float sum = product.adds ? product.sums[lane][i] : 0.0f;
            for (int k = 0; k < 16; k++) sum += a[row][k] * b[k][column];
            product.sums[lane][i] = sum;
        }
}
static void add_product(const Product &mine) {
    Product &shared = warp().product;
    shared.sums[lane()] = mine.sums[0], shared.registers[lane()] = mine.registers[0];
    with_warp(0, [&](Warp &w) {
        Product whole = mine;
        std::copy_n(shared.sums, 32, whole.sums);
        std::copy_n(shared.registers, 32, whole.registers);
        if (is_late)
            w.open.push_back(whole);
        else
            do_product(whole, self->index / 32 % 4);
    });
}
template <int COUNT>
static void score(float (&d)[COUNT], u64 a, u64 b, bool adds) {
    Product product = {2 * COUNT, adds, false, a, b, {d}, {nullptr}};
    add_product(product);
}
template <int COUNT>
DEVICE void first_score_product(float (&d)[COUNT], u64 a, u64 b) {
    score(d, a, b, false);
}
template <int COUNT>
DEVICE void score_product(float (&d)[COUNT], u64 a, u64 b) {
    score(d, a, b, true);
}
template <int COUNT>
DEVICE void value_product(float (&d)[COUNT], const u32 (&a)[4], u64 b) {
    Product product = {2 * COUNT, true, true, 0, b, {d}, {a}};
    add_product(product);
}
DEVICE void products_begin() { warp_sync(); }
DEVICE void products_commit() {
    with_warp(0, [](Warp &w) {
        w.committed.push_back(w.open);
        w.open.clear();
    });
}
template <int PENDING>
DEVICE void products_wait() {
    with_warp(0, [](Warp &w) {
        for (; w.committed.size() > PENDING; w.committed.pop_front())
            for (const Product &product : w.committed.front())
                do_product(product, self->index / 32 % 4);
    });
}
template <int COUNT>
DEVICE void settle(float (&)[COUNT]) {}
DEVICE void prefetch_map(const TensorMap &) {}
DEVICE void start_next_kernel() {}
DEVICE void wait_for_inputs() {}
DEVICE void fence_for_engines() {}
DEVICE void fence_barriers() {}
DEVICE void give_registers() {}
DEVICE void take_registers() {}

// KERNEL

DEVICE void block_sync() { meet(named[0], THREADS, [] {}); }

struct Arguments {
    Maps maps;
    const int *table, *starts, *first_positions, *num_tokens;
    u16 *out;
    float scale_log2;
    int integers[7];
};
static const Arguments *arguments;

static void run_thread() {
    const Arguments &a = *arguments;
    const int *i = a.integers;
    attention_wgmma(a.maps, a.table, a.starts, a.first_positions, a.num_tokens, a.out, a.scale_log2,
                    i[0], i[1], i[2], i[3], i[4], i[5], i[6]);
    self->is_done = true;
    progress++;
    yield();
}

static void run_block() {
    threads = std::vector<Thread>(THREADS);
    warps = std::vector<Warp>(THREADS / 32);
    std::fill(memory.begin(), memory.end(), 0xFF);  // NaN
    barriers.clear(), named.clear();
    for (int i = 0; i < THREADS; i++) {
        Thread &thread = threads[i];
        thread.index = i, thread.is_done = false;
        thread.stack.reset(new char[1 << 16]);
        getcontext(&thread.context);
        thread.context.uc_stack.ss_sp = thread.stack.get();
        thread.context.uc_stack.ss_size = 1 << 16;
        makecontext(&thread.context, run_thread, 0);
    }
    for (bool is_any = true; is_any;) {
        is_any = false;
        long before = progress;
        for (Thread &thread : threads) {
            if (thread.is_done) continue;
            self = &thread;
            swapcontext(&scheduler, &thread.context);
            is_any = is_any || !thread.is_done;
        }
        if (!is_any || progress != before) continue;
        if (copies.empty()) fail("all threads wait");
        do_copy(copies.front());
        copies.pop_front();
    }
    if (!copies.empty()) fail("copies that nobody waits for");
}

extern "C" void run(const TensorMap *maps, const int *const *indices, u16 *out, float scale_log2,
                    const int *integers, int num_blocks, int shared_bytes, int late) {
    Arguments all = {{maps[0], maps[1], maps[2]}, indices[0], indices[1], indices[2], indices[3],
                     out, scale_log2};
    std::copy_n(integers, 7, all.integers);
    arguments = &all, grid_blocks = num_blocks, is_late = late;
    // From an address that is like a multiple of 1024, as blocks have it.
    memory = std::vector<unsigned char>(shared_bytes + 16);
    for (current_block = 0; current_block < num_blocks; current_block++) run_block();
}
