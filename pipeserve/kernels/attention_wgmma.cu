// Causal attention of prefill chunks over the cache's pages, on Hopper's tensor cores. A block
// stays on its multiprocessor and takes tile after tile of queries; the query heads that share a kv
// head are rows of one tile. One warp finds the tiles and has the copy engine fetch queries and,
// page by page, keys and values; CONSUMERS groups of warps multiply 64 rows each. A group's softmax
// runs while its last product does, and while another group's do: they take turns.
// Flash attention's online softmax (arXiv 2205.14135) and its order on Hopper (arXiv 2407.08608).

// PTX

constexpr int ROWS = CONSUMERS * 64;
constexpr int QUERIES = ROWS / GROUP;  // of a tile; its last rows may belong to none
constexpr int HALVES = (HEAD_DIM + 63) / 64;  // of 64 dims, whose rows of 128 bytes are swizzled
constexpr int BLOCK_H = HALVES * 64;
constexpr int PAGES = TILE / 16;
constexpr int SCORES = TILE / 2;  // of a thread
constexpr int THREADS = (CONSUMERS + 1) * 128;
constexpr int QUERY_BYTES = ROWS * BLOCK_H * 2;
constexpr int QUERY_COPIED_BYTES = QUERIES * GROUP * BLOCK_H * 2;
constexpr int STAGE_BYTES = TILE * BLOCK_H * 2;  // of keys or of values
constexpr int TURN_BARRIER = 1, CLEARED_BARRIER = TURN_BARRIER + CONSUMERS;

// TILES

// COPIES

// Of rows of 128 bytes, swizzled: eight of them are 1024 bytes.
constexpr u64 SWIZZLED = 64ull << 32 | 1ull << 62;
DEVICE u64 descriptor(u32 address) { return (u64)(address >> 4 & 0x3FFF) | SWIZZLED; }
// The same read along the columns, which are in blocks of 64.
DEVICE u64 transposed_descriptor(u32 address) {
    return descriptor(address) | (u64)(TILE * 128 >> 4) << 16;
}

// Of the two rows of a thread, 8 apart: the highest score, the sum of its own columns'
// probabilities, and what earlier sums are multiplied by.
struct Rows {
    float highest[2], sum[2], rescale[2];
};

// Scores become probabilities. A row sees the columns up to last_seen, counted from the thread's
// own first one, where IS_MASKED.
template <bool IS_MASKED>
DEVICE void softmax(float (&scores)[SCORES], Rows &rows, const int (&last_seen)[2],
                    float scale_log2) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
        float highest[2] = {rows.highest[i], rows.highest[i]};
#pragma unroll
        for (int j = 0; j < TILE / 8; j++)
#pragma unroll
            for (int k = 0; k < 2; k++) {
                float &score = scores[4 * j + 2 * i + k];
                if (IS_MASKED && 8 * j + k > last_seen[i]) score = -infinity();
                highest[k] = fmaxf(highest[k], score);
            }
        float top = fmaxf(highest[0], highest[1]);
        top = fmaxf(top, from_lane_across(top, 1));
        top = fmaxf(top, from_lane_across(top, 2));
        float base = top * scale_log2;
        // A row that has seen nothing yet: -inf minus -inf would be NaN.
        if (IS_MASKED && top == -infinity()) base = 0.0f;
        rows.rescale[i] = exp2_of(fmaf(rows.highest[i], scale_log2, -base));
        rows.highest[i] = top;
        float sums[2] = {0.0f, 0.0f};
#pragma unroll
        for (int j = 0; j < TILE / 8; j++)
#pragma unroll
            for (int k = 0; k < 2; k++) {
                float &score = scores[4 * j + 2 * i + k];
                score = exp2_of(fmaf(score, scale_log2, -base));
                sums[k] += score;
            }
        rows.sum[i] = fmaf(rows.sum[i], rows.rescale[i], sums[0] + sums[1]);
    }
}

DEVICE void pack(u32 (&probabilities)[TILE / 16][4], const float (&scores)[SCORES]) {
#pragma unroll
    for (int step = 0; step < TILE / 16; step++)
#pragma unroll
        for (int i = 0; i < 4; i++)
            probabilities[step][i] =
                pair_of(scores[8 * step + 2 * i], scores[8 * step + 2 * i + 1]);
}

// Where a group is in the rings.
struct Place {
    Cursor<Q_SLOTS> queries;
    Cursor<STAGES> keys, values;
};

DEVICE void multiply_keys(float (&scores)[SCORES], const Rings &rings, const Place &place,
                          int group) {
    u64 a = descriptor(rings.queries.slot_of(place.queries) + group * 64 * 128);
    u64 b = descriptor(rings.keys.slot_of(place.keys));
    first_score_product(scores, a, b);
#pragma unroll
    for (int step = 1; step < BLOCK_H / 16; step++)
        score_product(scores, a + (step / 4 * ROWS * 128 + step % 4 * 32 >> 4),
                      b + (step / 4 * TILE * 128 + step % 4 * 32 >> 4));
}

DEVICE void multiply_values(float (&sums)[BLOCK_H / 2], const u32 (&probabilities)[TILE / 16][4],
                            const Rings &rings, const Place &place) {
    u64 b = transposed_descriptor(rings.values.slot_of(place.values));
#pragma unroll
    for (int step = 0; step < TILE / 16; step++)
        value_product(sums, probabilities[step], b + step * (16 * 128 >> 4));
}

// Positions from `end` on in the page that it lies in: of no chunk, they may hold anything.
DEVICE void clear_after(u32 values, int end_in_tile, int group) {
    int thread = thread_index() % 128, num_rows = 16 - end_in_tile % 16;
    for (int i = thread; i < num_rows * 8 * HALVES; i += 128) {
        int half = i / (num_rows * 8), piece = i % (num_rows * 8);
        clear_16_bytes(values + half * TILE * 128 + end_in_tile * 128 + piece * 16);
    }
    fence_for_engines();
    named_barrier_sync(CLEARED_BARRIER + group, 128);
}

// Lane i of four has columns 2 i and 2 i + 1 of each of four blocks of 8: it gets block i whole.
DEVICE void exchange(u32 (&pairs)[4], int quad) {
    bool is_odd = quad & 1, is_high = quad & 2;
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
        u32 got = from_lane_across(is_odd ? pairs[i] : pairs[i + 1], 1);
        pairs[i] = is_odd ? got : pairs[i];
        pairs[i + 1] = is_odd ? pairs[i + 1] : got;
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        u32 got = from_lane_across(is_high ? pairs[i] : pairs[i + 2], 2);
        pairs[i] = is_high ? got : pairs[i];
        pairs[i + 2] = is_high ? pairs[i + 2] : got;
    }
}

DEVICE void store(const float (&sums)[BLOCK_H / 2], Rows &rows, const Note &note, int first_row,
                  u16 *out, int out_stride_token, int out_stride_head) {
    int quad = thread_index() % 4;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        float sum = rows.sum[i];
        sum += from_lane_across(sum, 1);
        sum += from_lane_across(sum, 2);
        float factor = 1.0f / sum;
        int row = first_row + 8 * i, query = row / GROUP;
        u16 *to = out + (size_t)(note.token + query) * out_stride_token +
                  (note.kv_head * GROUP + row % GROUP) * out_stride_head;
#pragma unroll
        for (int block = 0; block < BLOCK_H / 32; block++) {
            u32 pairs[4];
#pragma unroll
            for (int j = 0; j < 4; j++) {
                int at = 16 * block + 4 * j + 2 * i;
                pairs[j] = pair_of(sums[at] * factor, sums[at + 1] * factor);
            }
            exchange(pairs, quad);
            int dim = 32 * block + 8 * quad;
            if (query < note.num_queries && dim < HEAD_DIM)
                store_16_bytes(to + dim, pairs);
        }
    }
}

// The next level's scores while the last one's probabilities are multiplied.
template <bool IS_MASKED>
DEVICE void take_level(float (&scores)[SCORES], u32 (&probabilities)[TILE / 16][4],
                       float (&sums)[BLOCK_H / 2], Rows &rows, Place &place, const Rings &rings,
                       const int (&last_seen)[2], int group, float scale_log2) {
    rings.keys.wait_full(place.keys);
    named_barrier_sync(TURN_BARRIER + group, 256);
    products_begin();
    multiply_keys(scores, rings, place, group);
    products_commit();
    rings.values.wait_full(place.values);
    products_begin();
    multiply_values(sums, probabilities, rings, place);
    products_commit();
    named_barrier_arrive(TURN_BARRIER + (group + 1) % CONSUMERS, 256);
    products_wait<1>();
    settle(scores);
    rings.keys.release(place.keys);
    place.keys.advance();
    softmax<IS_MASKED>(scores, rows, last_seen, scale_log2);
    settle(scores);
    // Passed long ago: the assembler would wait for the sums before it takes the exponentials.
    rings.queries.wait_full(place.queries);
    products_wait<0>();
    settle(sums);
    rings.values.release(place.values);
    place.values.advance();
    pack(probabilities, scores);
#pragma unroll
    for (int i = 0; i < BLOCK_H / 2; i++) sums[i] *= rows.rescale[i / 2 % 2];
}

DEVICE void attend(const Note &note, const Rings &rings, Place &place, int group,
                   int first_row, u16 *out, float scale_log2, int out_stride_token,
                   int out_stride_head) {
    float sums[BLOCK_H / 2], scores[SCORES];
    u32 probabilities[TILE / 16][4];
    Rows rows;
#pragma unroll
    for (int i = 0; i < BLOCK_H / 2; i++) sums[i] = 0.0f;
    settle(sums);
    int last_seen[2], end = note.first_position + note.num_queries;
    int level = note.num_levels - 1;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        rows.highest[i] = -infinity();
        rows.sum[i] = 0.0f;
        last_seen[i] = note.first_position + (first_row + 8 * i) / GROUP - level * TILE -
                       thread_index() % 4 * 2;
    }
    rings.keys.wait_full(place.keys);
    products_begin();
    multiply_keys(scores, rings, place, group);
    products_commit();
    products_wait<0>();
    settle(scores);
    rings.keys.release(place.keys);
    place.keys.advance();
    softmax<true>(scores, rows, last_seen, scale_log2);
    pack(probabilities, scores);
    if (end % 16) {
        rings.values.wait_full(place.values);
        clear_after(rings.values.slot_of(place.values), end - level * TILE, group);
    }
    // Levels that all queries of the tile see whole need no masks.
    int num_whole = (note.first_position + 1) / TILE;
    for (level--; level >= num_whole; level--) {
        last_seen[0] += TILE, last_seen[1] += TILE;
        take_level<true>(scores, probabilities, sums, rows, place, rings, last_seen, group,
                         scale_log2);
    }
    for (; level >= 0; level--)
        take_level<false>(scores, probabilities, sums, rows, place, rings, last_seen,
                          group, scale_log2);
    rings.queries.release(place.queries);
    rings.values.wait_full(place.values);
    products_begin();
    multiply_values(sums, probabilities, rings, place);
    products_commit();
    products_wait<0>();
    settle(sums);
    rings.values.release(place.values);
    place.values.advance();
    store(sums, rows, note, first_row, out, out_stride_token, out_stride_head);
}

DEVICE void consume(const Rings &rings, const Note *notes, int warp, u16 *out, float scale_log2,
                    int out_stride_token, int out_stride_head) {
    int group = warp / 4;
    int first_row = group * 64 + warp % 4 * 16 + thread_index() % 32 / 4;
    Place place;
    // The first group begins.
    if (group == CONSUMERS - 1) named_barrier_arrive(TURN_BARRIER, 256);
    for (;;) {
        rings.queries.wait_full(place.queries);
        Note note = notes[place.queries.slot];
        note.num_levels = warp_from(note.num_levels, 0);  // known to be one for the warp
        note.first_position = warp_from(note.first_position, 0);
        note.num_queries = warp_from(note.num_queries, 0);
        if (note.num_levels == 0) return;
        attend(note, rings, place, group, first_row, out, scale_log2, out_stride_token,
               out_stride_head);
        place.queries.advance();
    }
}

// Indices are read as words of 32 bits, of which word_shift 1 leaves out every second: those of 64
// bits are small.
KERNEL attention_wgmma(PARAMETER Maps maps, const int *table, const int *starts,
                       const int *first_positions, const int *num_tokens, u16 *out,
                       float scale_log2, int num_seqs, int num_kv_heads, int num_blocks,
                       int table_stride, int word_shift, int out_stride_token,
                       int out_stride_head) {
    start_next_kernel();
    char *start = shared_start();
    start += (1024 - (shared_address(start) & 1023)) % 1024;
    Rings rings(shared_address(start));
    Note *notes = (Note *)(start + NOTES_AT);
    int *kept = (int *)(start + CHUNKS_AT);
    int warp = warp_from(thread_index() / 32, 0);  // known to be one for the warp
    if (thread_index() == 0) {
        prefetch_map(maps.queries);
        prefetch_map(maps.keys);
        prefetch_map(maps.values);
        rings.queries.init(), rings.keys.init(), rings.values.init();
        fence_barriers();
    }
    wait_for_inputs();
    for (int seq = thread_index(); seq < num_seqs; seq += THREADS) {
        kept[seq] = load_index(first_positions + (seq << word_shift));
        kept[MOST_SEQS + seq] = load_index(num_tokens + (seq << word_shift));
    }
    block_sync();
    if (warp >= CONSUMERS * 4) {
        give_registers();
        if (warp == CONSUMERS * 4) {
            Chunks chunks = {kept, kept + MOST_SEQS, num_seqs};
            Places places = {table, starts, table_stride, word_shift, num_blocks, num_kv_heads};
            produce(maps, chunks, places, rings, notes);
        }
    } else {
        take_registers();
        consume(rings, notes, warp, out, scale_log2, out_stride_token, out_stride_head);
    }
}
