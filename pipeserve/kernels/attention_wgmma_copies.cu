// The warp that copies: it takes the tiles of its block in turn, says in a note what each is, and
// fills rings in shared memory with queries and, page by page, with keys and values. Those who
// multiply wait for a slot to be full and release it when they have read it.

struct Maps {
    TensorMap queries, keys, values;
};

// A slot of a ring of COUNT, and whether the ring has been passed an odd number of times.
template <int COUNT>
struct Cursor {
    u32 slot = 0, parity = 0;
    DEVICE void advance() {
        if (++slot == COUNT) slot = 0, parity ^= 1;
    }
};

// Slots in shared memory, each with a barrier that it is full and one that it is empty.
template <int COUNT, int SLOT_BYTES>
struct Ring {
    u32 slots, full, empty;
    DEVICE Ring(u32 slots, u32 barriers)
        : slots(slots), full(barriers), empty(barriers + 8 * COUNT) {}
    DEVICE u32 slot_of(const Cursor<COUNT> &at) const { return slots + at.slot * SLOT_BYTES; }
    DEVICE u32 full_of(const Cursor<COUNT> &at) const { return full + 8 * at.slot; }
    DEVICE void wait_full(const Cursor<COUNT> &at) const { barrier_wait(full_of(at), at.parity); }
    DEVICE void wait_empty(const Cursor<COUNT> &at) const {
        barrier_wait(empty + 8 * at.slot, at.parity ^ 1);
    }
    DEVICE void release(const Cursor<COUNT> &at) const { barrier_arrive_of_warp(empty + 8 * at.slot); }
    DEVICE void init() const {
        for (int i = 0; i < COUNT; i++) {
            barrier_init(full + 8 * i, 1);
            barrier_init(empty + 8 * i, CONSUMERS * 4);
        }
    }
};

// Behind the rings: a note per tile of queries, and what chunks there are.
constexpr int KEYS_AT = Q_SLOTS * QUERY_BYTES;
constexpr int VALUES_AT = KEYS_AT + STAGES * STAGE_BYTES;
constexpr int BARRIERS_AT = VALUES_AT + STAGES * STAGE_BYTES;
constexpr int NOTES_AT = BARRIERS_AT + 16 * (Q_SLOTS + 2 * STAGES);
constexpr int CHUNKS_AT = NOTES_AT + 32 * Q_SLOTS;

struct Rings {
    Ring<Q_SLOTS, QUERY_BYTES> queries;
    Ring<STAGES, STAGE_BYTES> keys, values;
    explicit DEVICE Rings(u32 start)
        : queries(start, start + BARRIERS_AT),
          keys(start + KEYS_AT, start + BARRIERS_AT + 16 * Q_SLOTS),
          values(start + VALUES_AT, start + BARRIERS_AT + 16 * (Q_SLOTS + STAGES)) {}
};

// What the multiplying warps are told of a tile of queries. num_levels 0: there is no more.
struct Note {
    int num_levels, first_position, num_queries, token, kv_head;
};

struct Places {
    const int *table, *starts;
    int table_stride, word_shift, num_blocks, num_kv_heads;
};

// Block of 16 positions from `position`; one past the cache, which reads as zeros, from `end` on.
DEVICE int block_of(const Places &places, const int *row, int position, int end) {
    if (position >= end) return places.num_blocks;
    return load_index(row + ((position / PAGE) << places.word_shift));
}

// Lane i knows the block of the i-th 16 positions.
DEVICE void copy_level(const Ring<STAGES, STAGE_BYTES> &ring, const Cursor<STAGES> &at,
                       const TensorMap &map, int kv_head, int level, int block_lane) {
    int blocks[PAGES];
#pragma unroll
    for (int i = 0; i < PAGES; i++) blocks[i] = warp_from(block_lane, i);
    ring.wait_empty(at);
    if (is_elected()) {
        u32 to = ring.slot_of(at), full = ring.full_of(at);
        barrier_expect(full, STAGE_BYTES);
#pragma unroll
        for (int i = 0; i < PAGES; i++)
#pragma unroll
            for (int half = 0; half < HALVES; half++)
                copy_positions(to + half * TILE * 128 + i * 2048, map, half * 64, kv_head,
                               (level * TILE + i * 16) % PAGE, blocks[i], full);
    }
    warp_sync();
}

// Notes down a tile and starts the copies of its queries, of none where there are no levels.
DEVICE void copy_queries_of(const Note &note, const TensorMap &map,
                            const Ring<Q_SLOTS, QUERY_BYTES> &ring, const Cursor<Q_SLOTS> &at,
                            Note *notes) {
    ring.wait_empty(at);
    if (is_elected()) {
        u32 to = ring.slot_of(at), full = ring.full_of(at);
        notes[at.slot] = note;
        barrier_expect(full, note.num_levels == 0 ? 0 : QUERY_COPIED_BYTES);
        if (note.num_levels > 0)
#pragma unroll
            for (int half = 0; half < HALVES; half++)
                copy_queries(to + half * ROWS * 128, map, half * 64, note.kv_head * GROUP,
                             note.token, full);
    }
    warp_sync();
}

DEVICE Note note_of(const Tile &tile, int kv_head, const Chunks &chunks, const Places &places) {
    Note note;
    note.num_queries = min(chunks.num_tokens[tile.seq] - tile.query, QUERIES);
    note.first_position = chunks.first_positions[tile.seq] + tile.query;
    note.num_levels = (note.first_position + note.num_queries + TILE - 1) / TILE;
    note.token = load_index(places.starts + (tile.seq << places.word_shift)) + tile.query;
    note.kv_head = kv_head;
    return note;
}

DEVICE void produce(const Maps &maps, const Chunks &chunks, const Places &places,
                    const Rings &rings, Note *notes) {
    int lane = thread_index() % 32;
    Cursor<Q_SLOTS> query_at;
    Cursor<STAGES> at;
    for (int round = 0;; round++) {
        // Who was first in one round is last in the next.
        int turn = round % 2 ? num_blocks_of_grid() - 1 - block_index() : block_index();
        int rank = round * num_blocks_of_grid() + turn;
        Tile tile = {0, 0};
        Note note = {0, 0, 0, 0, 0};
        bool is_found = find_tile(chunks, rank / places.num_kv_heads, lane, tile);
        if (is_found) note = note_of(tile, rank % places.num_kv_heads, chunks, places);
        copy_queries_of(note, maps.queries, rings.queries, query_at, notes);
        if (!is_found) return;
        query_at.advance();
        const int *row =
            places.table + (((size_t)tile.seq * places.table_stride) << places.word_shift);
        int level = note.num_levels - 1, end = note.first_position + note.num_queries;
        int block = block_of(places, row, level * TILE + lane * 16, end);
        for (; level >= 0; level--) {
            int next = level == 0 ? 0 : block_of(places, row, (level - 1) * TILE + lane * 16, end);
            copy_level(rings.keys, at, maps.keys, note.kv_head, level, block);
            copy_level(rings.values, at, maps.values, note.kv_head, level, block);
            at.advance();
            block = next;
        }
    }
}
