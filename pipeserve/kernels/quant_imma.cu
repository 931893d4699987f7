// x W^T of planar weights and activations as signed bytes, on integer tensor cores: the weights are
// the first operand, unpacked in registers. Every group's exact integer sums are scaled and added
// in float32. A block takes WARPS * ROW_TILES * 16 outputs and BLOCK_T tokens; copies of STAGES - 1
// steps of 256 columns are in flight while it works on one. Where the columns are cut into parts,
// their sums meet in order: in the cluster of their blocks, or in a buffer for a second kernel.

// PTX

// UNPACK

constexpr int THREADS = WARPS * 32;
constexpr int ROWS = WARPS * ROW_TILES * 16;
constexpr int TOKEN_TILES = BLOCK_T / 8;
constexpr int STEP_COLUMNS = 256, MAX_PARTS = 8;
// Bytes of a row, or of a token, that a step takes.
constexpr int LOW_BYTES = 32 * LOW_BITS, HIGH_BYTES = 32 * HIGH_BITS;
constexpr int WORD_BYTES = HAS_SHORT_WORDS ? 8 : 16, MIN_BYTES = SCALES == HALF_MIN ? 16 : 0;
constexpr int SUPER_BYTES = HAS_SUPER ? 4 : 0, SUM_BYTES = HAS_MIN ? 32 : 0;
// Where a stage holds what.
constexpr int HIGH_AT = ROWS * LOW_BYTES;
constexpr int X_AT = HIGH_AT + ROWS * HIGH_BYTES;
constexpr int X_SCALES_AT = X_AT + BLOCK_T * STEP_COLUMNS;  // [4][BLOCK_T][2], as blocks need them
constexpr int X_SUMS_AT = X_SCALES_AT + BLOCK_T * 32;
constexpr int WORDS_AT = X_SUMS_AT + BLOCK_T * SUM_BYTES;
constexpr int MINS_AT = WORDS_AT + ROWS * WORD_BYTES;
constexpr int SUPERS_AT = MINS_AT + ROWS * MIN_BYTES;
constexpr int STAGE_BYTES = (SUPERS_AT + ROWS * SUPER_BYTES + 255) / 256 * 256;
constexpr int PITCH = ROWS + 4;  // of the tokens of the block's sums: no two lanes in one bank

// Integer sums begin at the middle of the numbers that are integers plus 2^23, as floats have it.
constexpr u32 START = MAGIC_BITS + (1 << 22);
constexpr float START_VALUE = MAGIC + (1 << 22);

struct Weight {
    const char *low, *high, *words, *mins, *supers;
};
struct Activations {
    const char *codes, *scales, *sums;
};
// What a block works on.
struct Work {
    int first_row, first_token, first_step, num_steps;
    int num_rows, num_tokens, num_all_steps;
};

DEVICE int least(int a, int b) { return a < b ? a : b; }

// 16-byte pieces of a row of BYTES are permuted, so that the same piece of eight rows that follow
// each other lies in all banks.
template <int BYTES>
DEVICE int swizzle(int row) {
    if (BYTES >= 128) return (row & 7) * 16;
    return (row * BYTES / 128 & BYTES / 16 - 1) * 16;
}

// What a thread copies of BYTES of each of COUNT rows: in pieces of PIECE bytes, THREADS at a time.
template <int COUNT, int BYTES>
struct Pieces {
    static constexpr int PIECE = BYTES < 16 ? BYTES : 16, PER_ROW = BYTES / PIECE;
    static constexpr int ALL = COUNT * PER_ROW, EACH = (ALL + THREADS - 1) / THREADS;
    u32 from[EACH];  // of the matrix's first column

    DEVICE static int row(int j) { return thread_index() / PER_ROW + j * (THREADS / PER_ROW); }
    DEVICE static int at() { return thread_index() % PER_ROW * PIECE; }
    DEVICE static bool has(int j) {
        return (j + 1) * THREADS <= ALL || thread_index() < ALL - j * THREADS;
    }
    // Rows at and past num_rows: as the last one.
    DEVICE void find(int first_row, int num_rows, u32 stride) {
#pragma unroll
        for (int j = 0; j < EACH; j++)
            from[j] = least(first_row + row(j), num_rows - 1) * stride + at();
    }
    // Copies of one column on, of a plane swizzled.
    template <bool IS_PLANE>
    DEVICE void copy(u32 to, const char *column) const {
#pragma unroll
        for (int j = 0; j < EACH; j++) {
            if (!has(j)) continue;
            if (IS_PLANE)
                copy_async_once(to + row(j) * BYTES + (at() ^ swizzle<BYTES>(row(j))),
                                column + from[j]);
            else
                copy_async<PIECE>(to + row(j) * BYTES + at(), column + from[j]);
        }
    }
};

struct WeightPieces {
    Pieces<ROWS, LOW_BYTES> low;
    Pieces<ROWS, HIGH_BYTES ? HIGH_BYTES : 16> high;
    Pieces<ROWS, WORD_BYTES> words;
    Pieces<ROWS, 16> mins;
    Pieces<ROWS, 4> supers;
};
struct XPieces {
    Pieces<BLOCK_T, 256> codes;
    Pieces<4 * BLOCK_T, 8> scales;
    Pieces<BLOCK_T, 32> sums;
};

DEVICE void find_weights(WeightPieces &pieces, const Work &work) {
    u32 row = work.first_row, all = work.num_all_steps;
    pieces.low.find(row, work.num_rows, all * LOW_BYTES);
    if constexpr (HIGH_BYTES > 0) pieces.high.find(row, work.num_rows, all * HIGH_BYTES);
    pieces.words.find(row, work.num_rows, all * WORD_BYTES);
    if constexpr (MIN_BYTES > 0) pieces.mins.find(row, work.num_rows, all * MIN_BYTES);
    if constexpr (HAS_SUPER) pieces.supers.find(row, work.num_rows, all * (HAS_MIN ? 4 : 2));
}

DEVICE void find_x(XPieces &pieces, const Work &work) {
    u32 token = work.first_token, all = work.num_all_steps;
    pieces.codes.find(token, work.num_tokens, all * 256);
#pragma unroll
    for (int j = 0; j < pieces.scales.EACH; j++) {
        u32 pair = pieces.scales.row(j);  // of a token's four: blocks of 64 columns
        pieces.scales.from[j] =
            least(token + pair % BLOCK_T, work.num_tokens - 1) * all * 32 + pair / BLOCK_T * 8;
    }
    if constexpr (HAS_MIN) pieces.sums.find(token, work.num_tokens, all * 32);
}

DEVICE void copy_weights(const Weight &from, const WeightPieces &pieces, u32 step, u32 to) {
    pieces.low.copy<true>(to, from.low + step * LOW_BYTES);
    if constexpr (HIGH_BYTES > 0)
        pieces.high.copy<true>(to + HIGH_AT, from.high + step * HIGH_BYTES);
    pieces.words.copy<false>(to + WORDS_AT, from.words + step * WORD_BYTES);
    if constexpr (MIN_BYTES > 0)
        pieces.mins.copy<false>(to + MINS_AT, from.mins + step * MIN_BYTES);
    if constexpr (HAS_SUPER && HAS_MIN)
        pieces.supers.copy<false>(to + SUPERS_AT, from.supers + step * 4);
    if constexpr (HAS_SUPER && !HAS_MIN) {  // of 16 bits: with the neighbour that shares its word
#pragma unroll
        for (int j = 0; j < pieces.supers.EACH; j++)
            if (pieces.supers.has(j))
                copy_async<4>(to + SUPERS_AT + pieces.supers.row(j) * 4,
                              from.supers + (pieces.supers.from[j] + step * 2 & ~3u));
    }
}

DEVICE void copy_x(const Activations &from, const XPieces &pieces, u32 step, u32 to) {
    pieces.codes.copy<true>(to + X_AT, from.codes + step * 256);
    pieces.scales.copy<false>(to + X_SCALES_AT, from.scales + step * 32);
    if constexpr (HAS_MIN) pieces.sums.copy<false>(to + X_SUMS_AT, from.sums + step * 32);
}

// What a thread reads of a stage, from the stage's start on.
struct Places {
    u32 low, high, x, scales;
    u32 row, super_half[ROW_TILES][2];
};

DEVICE Places places_of(const Work &work) {
    int lane = thread_index() % 32, row = thread_index() / 32 * ROW_TILES * 16;
    int matrix_row = lane % 16, piece = lane / 16 * 16;
    Places places;
    places.low = (row + matrix_row) * LOW_BYTES + (piece ^ swizzle<LOW_BYTES>(matrix_row));
    if constexpr (HIGH_BYTES > 0)
        places.high =
            HIGH_AT + (row + matrix_row) * HIGH_BYTES + (piece ^ swizzle<HIGH_BYTES>(matrix_row));
    places.x = X_AT + lane % 8 * 256 + ((lane / 8 ^ lane % 8) * 16);
    places.scales = X_SCALES_AT + lane % 4 * 16;
    places.row = row + lane / 4;
#pragma unroll
    for (int tile = 0; tile < ROW_TILES; tile++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            int at = least(work.first_row + places.row + 16 * tile + 8 * i, work.num_rows - 1);
            places.super_half[tile][i] = at * work.num_all_steps & 1;
        }
    return places;
}

DEVICE u32 load_super(const Places &places, u32 stage, int tile, int i, int step) {
    u32 word = load_shared(stage + SUPERS_AT + (places.row + 16 * tile + 8 * i) * 4);
    return HAS_MIN ? word : word >> 16 * ((places.super_half[tile][i] + step) & 1);
}

DEVICE void load_scales(RowScales &row, u32 stage, u32 local_row, u32 super) {
    if (HAS_SHORT_WORDS) {
        uint2 two = load_shared_2(stage + WORDS_AT + local_row * 8);
        row.word[0] = two.x & 0xFFFF, row.word[1] = two.x >> 16;
        row.word[2] = two.y & 0xFFFF, row.word[3] = two.y >> 16;
    } else {
        uint4 four = load_shared_4(stage + WORDS_AT + local_row * 16);
        row.word[0] = four.x, row.word[1] = four.y, row.word[2] = four.z, row.word[3] = four.w;
    }
    if (HAS_SUPER) row.super = half_to_float(super);
}

typedef float Sums[ROW_TILES][TOKEN_TILES][4];

// Per half of a block: what its groups' codes are multiplied by, and what takes their common start
// off again. Of two groups it is taken off at once, in float32: that is exact, and the sum between
// them is rounded to less than a unit of the integer sums.
template <int BLOCK>
DEVICE void block_scales(float (&scale)[GROUPS], float (&less)[2], const RowScales &row) {
    scale[0] = group_scale<BLOCK, 0>(row), scale[1] = group_scale<BLOCK, 1>(row);
    if constexpr (GROUPS == 4) {
        scale[2] = group_scale<BLOCK, 2>(row), scale[3] = group_scale<BLOCK, 3>(row);
        less[0] = -START_VALUE * (scale[0] + scale[1]);
        less[1] = -START_VALUE * (scale[2] + scale[3]);
    } else {
        less[0] = -START_VALUE * scale[0], less[1] = -START_VALUE * scale[1];
    }
}

// Half a block's products of 16 outputs and 8 tokens. x_scale: of the thread's two tokens.
DEVICE void multiply_half(float (&sums)[4], const u32 (&a)[4], u32 b0, u32 b1,
                          const float (&scale)[2][GROUPS], const float (&less)[2][2], int half,
                          float x_scale_0, float x_scale_1) {
    u32 c[4], d[4];
    if constexpr (GROUP == 16) {
        multiply_16(c, a[0], a[1], b0, START);
        multiply_16(d, a[2], a[3], b1, START);
    } else {
        multiply_32(c, a, b0, b1, START);
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
        int row = i / 2;
        float value;
        if constexpr (GROUP == 16) {
            value = multiply_add(as_float(c[i]), scale[row][2 * half], less[row][half]);
            value = multiply_add(as_float(d[i]), scale[row][2 * half + 1], value);
        } else {
            value = multiply_add(as_float(c[i]), scale[row][half], less[row][half]);
        }
        sums[i] = multiply_add(value, i % 2 ? x_scale_1 : x_scale_0, sums[i]);
    }
}

template <int BLOCK>
DEVICE void multiply_block(Sums &sums, const Places &places, u32 stage,
                           const RowScales (&rows)[ROW_TILES][2]) {
    u32 lower[ROW_TILES][4], upper[ROW_TILES][4];
    float scale[ROW_TILES][2][GROUPS], less[ROW_TILES][2][2];
#pragma unroll
    for (int tile = 0; tile < ROW_TILES; tile++) {
        u32 low[2][4], high[4];
        constexpr int first = (LOW_BITS == 2 ? BLOCK / 2 : BLOCK) * (LOW_BITS == 8 ? 64 : 32);
        u32 low_at = (stage + places.low ^ first) + tile * 16 * LOW_BYTES;
        load_matrices(low[0], low_at);
        if constexpr (LOW_BITS == 8)
            load_matrices(low[1], (stage + places.low ^ first + 32) + tile * 16 * LOW_BYTES);
        constexpr int high_first = HIGH_BITS == 2 ? BLOCK / 2 * 32 : 0;
        if constexpr (HIGH_BYTES > 0)
            load_matrices(high, (stage + places.high ^ high_first) + tile * 16 * HIGH_BYTES);
        unpack<BLOCK>(lower[tile], upper[tile], low, high);
#pragma unroll
        for (int i = 0; i < 2; i++)
            block_scales<BLOCK>(scale[tile][i], less[tile][i], rows[tile][i]);
    }
#pragma unroll
    for (int tokens = 0; tokens < TOKEN_TILES; tokens++) {
        // The compiler would start more products than registers can hold.
        if (ROW_TILES * TOKEN_TILES > 2 && tokens * ROW_TILES % 4 == 0) warp_sync();
        u32 b[4];
        load_matrices(b, (stage + places.x ^ BLOCK * 64) + tokens * 2048);
        uint4 x_scale = load_shared_4(stage + places.scales + (BLOCK * BLOCK_T + 8 * tokens) * 8);
#pragma unroll
        for (int tile = 0; tile < ROW_TILES; tile++) {
            multiply_half(sums[tile][tokens], lower[tile], b[0], b[1], scale[tile], less[tile], 0,
                          as_float(x_scale.x), as_float(x_scale.z));
            multiply_half(sums[tile][tokens], upper[tile], b[2], b[3], scale[tile], less[tile], 1,
                          as_float(x_scale.y), as_float(x_scale.w));
        }
    }
}

// The operand of the sums of the activations' groups, cut in two for precision, where lane i % 4
// holds block i % 4 of the step.
struct XSums {
    float upper[GROUPS], rest[GROUPS];
};

DEVICE void load_x_sums(XSums &x, u32 stage, int tokens) {
    int lane = thread_index() % 32, token = tokens * 8 + lane / 4, block = lane % 4;
    uint2 scales = load_shared_2(stage + X_SCALES_AT + (block * BLOCK_T + token) * 8);
    uint2 pairs = load_shared_2(stage + X_SUMS_AT + token * SUM_BYTES + block * 8);
#pragma unroll
    for (int i = 0; i < GROUPS; i++) {
        u32 pair = i * GROUP < 32 ? pairs.x : pairs.y;
        if (GROUP == 16) pair = i % 2 ? pair >> 16 : pair & 0xFFFF;
        float sum = as_float(add_pair(pair, START)) - START_VALUE;
        float value = sum * as_float(i * GROUP < 32 ? scales.x : scales.y);
        x.upper[i] = as_float(bits_of(value) & 0xFFFFE000u);
        x.rest[i] = value - x.upper[i];
    }
}

DEVICE void subtract_mins(Sums &sums, const Places &places, u32 stage,
                          const u32 (&supers)[ROW_TILES][2]) {
    int block = thread_index() % 4;
    float mins[ROW_TILES][2][GROUPS];
#pragma unroll
    for (int tile = 0; tile < ROW_TILES; tile++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            u32 at = (places.row + 16 * tile + 8 * i) * 16 + block * 4, min_word = 0;
            if (SCALES == HALF_MIN) min_word = load_shared(stage + MINS_AT + at);
            group_mins(mins[tile][i], load_shared(stage + WORDS_AT + at), min_word);
        }
#pragma unroll
    for (int tokens = 0; tokens < TOKEN_TILES; tokens++) {
        XSums x;
        load_x_sums(x, stage, tokens);
#pragma unroll
        for (int tile = 0; tile < ROW_TILES; tile++) {
            float products[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
            for (int i = 0; i < GROUPS; i += 2) {
                float (&m)[2][GROUPS] = mins[tile];
                float a[4] = {m[0][i], m[1][i], m[0][i + 1], m[1][i + 1]};
                multiply_mins(products, a, x.rest[i], x.rest[i + 1]);
                multiply_mins(products, a, x.upper[i], x.upper[i + 1]);
            }
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float super = HAS_SUPER ? half_to_float(supers[tile][i / 2] >> 16) : 1.0f;
                sums[tile][tokens][i] = multiply_add(products[i], -super, sums[tile][tokens][i]);
            }
        }
    }
}

DEVICE void multiply_step(Sums &sums, const Places &places, u32 stage, int step) {
    RowScales rows[ROW_TILES][2];
    u32 supers[ROW_TILES][2];
#pragma unroll
    for (int tile = 0; tile < ROW_TILES; tile++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            if (HAS_SUPER) supers[tile][i] = load_super(places, stage, tile, i, step);
            load_scales(rows[tile][i], stage, places.row + 16 * tile + 8 * i, supers[tile][i]);
        }
    multiply_block<0>(sums, places, stage, rows);
    multiply_block<1>(sums, places, stage, rows);
    multiply_block<2>(sums, places, stage, rows);
    multiply_block<3>(sums, places, stage, rows);
    if constexpr (HAS_MIN) subtract_mins(sums, places, stage, supers);
}

DEVICE void multiply_all(Sums &sums, const Weight &weight, const Activations &x, const Work &work,
                         u32 ring) {
    Places places = places_of(work);
    WeightPieces weight_pieces;
    XPieces x_pieces;
    find_weights(weight_pieces, work);
    find_x(x_pieces, work);
    u32 step = work.first_step, end = step + work.num_steps;
#if CLUSTERED
    // The kernel before may still be writing x, while the weights are there.
    start_next_kernel();
    for (int i = 0; i < STAGES - 1; i++)
        if (step + i < end) copy_weights(weight, weight_pieces, step + i, ring + i * STAGE_BYTES);
    wait_for_inputs();
#endif
    for (int i = 0; i < STAGES - 1; i++) {
        if (step + i < end) {
            if (!CLUSTERED) copy_weights(weight, weight_pieces, step + i, ring + i * STAGE_BYTES);
            copy_x(x, x_pieces, step + i, ring + i * STAGE_BYTES);
        }
        copies_commit();
    }
    u32 ring_end = ring + STAGES * STAGE_BYTES, stage = ring;
    u32 free = ring_end - STAGE_BYTES;  // the stage that the next copies go to
    for (; step < end; step++) {
        copies_wait<STAGES - 2>();
        block_sync();  // this step is there for all, and all are past the one before
        if (step + STAGES - 1 < end) {
            copy_weights(weight, weight_pieces, step + STAGES - 1, free);
            copy_x(x, x_pieces, step + STAGES - 1, free);
        }
        copies_commit();
        multiply_step(sums, places, stage, step);
        free = stage;
        stage = stage + STAGE_BYTES == ring_end ? ring : stage + STAGE_BYTES;
    }
    copies_wait<0>();
    block_sync();
}

DEVICE void keep_sums(const Sums &sums, u32 kept) {
    int lane = thread_index() % 32, row = thread_index() / 32 * ROW_TILES * 16 + lane / 4;
#pragma unroll
    for (int tile = 0; tile < ROW_TILES; tile++)
#pragma unroll
        for (int tokens = 0; tokens < TOKEN_TILES; tokens++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                int token = tokens * 8 + lane % 4 * 2 + i % 2;
                int at = token * PITCH + row + 16 * tile + i / 2 * 8;
                store_shared(kept + 4 * at, sums[tile][tokens][i]);
            }
}

// Adds the parts' sums, this block's where blocks have no clusters, and writes some tokens of them.
DEVICE void store_sums(const Work &work, u32 kept, u32 rank, u32 num_parts, const u16 *bias,
                       void *out, bool is_part, size_t out_stride) {
    u32 tokens = least(BLOCK_T, work.num_tokens - work.first_token);
    u32 first = CLUSTERED ? rank : 0, every = CLUSTERED ? num_parts : 1;
    for (u32 i = thread_index(); first + i / ROWS * every < tokens; i += THREADS) {
        u32 token = first + i / ROWS * every, row = i % ROWS, at = kept + (token * PITCH + row) * 4;
        if (work.first_row + row >= work.num_rows) continue;
        float total = 0.0f;
#if CLUSTERED
        float values[MAX_PARTS];  // all on their way at once
#pragma unroll
        for (int part = 0; part < MAX_PARTS; part++)
            values[part] = part < num_parts ? load_of_rank(at, part) : 0.0f;
#pragma unroll
        for (int part = 0; part < MAX_PARTS; part++) total += values[part];
#else
        total = as_float(load_shared(at));
#endif
        if (bias) total += half_to_float(bias[work.first_row + row]);
        size_t index = (work.first_token + token) * out_stride + work.first_row + row;
        if (OUT_F32 || is_part)
            ((float *)out)[index] = total;
        else
            ((u16 *)out)[index] = float_to_half(total);
    }
}

// Without clusters, num_parts > 1 parts write their sums to out: float32 [parts, tokens, outputs].
KERNEL quant_imma(const char *codes, const char *scales, const char *x_sums, const char *low,
                       const char *high, const char *words, const char *mins, const char *supers,
                       const u16 *bias, void *out, int num_rows, int num_tokens, int num_all_steps,
                       int num_token_tiles, int num_parts, int out_stride) {
    u32 ring = (shared_start() + 255) / 256 * 256;
    int tile = block_index() / num_parts, rank = block_index() % num_parts;
    Work work;
    work.num_rows = num_rows, work.num_tokens = num_tokens, work.num_all_steps = num_all_steps;
    work.first_row = tile / num_token_tiles * ROWS;
    work.first_token = tile % num_token_tiles * BLOCK_T;
    work.first_step = num_all_steps * rank / num_parts;
    work.num_steps = num_all_steps * (rank + 1) / num_parts - work.first_step;
    Sums sums;
#pragma unroll
    for (int i = 0; i < ROW_TILES; i++)
#pragma unroll
        for (int j = 0; j < TOKEN_TILES; j++)
#pragma unroll
            for (int k = 0; k < 4; k++) sums[i][j][k] = 0.0f;
    multiply_all(sums, {low, high, words, mins, supers}, {codes, scales, x_sums}, work, ring);
    keep_sums(sums, ring);  // in the place of the ring
#if CLUSTERED
    cluster_sync();
    store_sums(work, ring, rank, num_parts, bias, out, false, out_stride);
    warp_sync();
    cluster_sync();  // no block ends while others read its sums
#else
    block_sync();
    bool is_part = num_parts > 1;
    void *to = is_part ? (float *)out + (size_t)rank * num_tokens * out_stride : out;
    store_sums(work, ring, rank, num_parts, bias, to, is_part, out_stride);
#endif
}
