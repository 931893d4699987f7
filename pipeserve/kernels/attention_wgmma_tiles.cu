// Which tile of queries is whose turn: tiles that see many cache positions come first, so that all
// blocks end at about the same time. Nothing is kept between launches. A level is a run of TILE
// positions; a tile of QUERIES queries is as high as the last level that it sees. Called by all
// lanes of a warp.

struct Chunks {
    const int *first_positions, *num_tokens;
    int num_seqs;
};

struct Tile {
    int seq, query;  // of the chunk: the tile's first
};

// Tiles of a chunk that see a level.
DEVICE int tiles_seeing(int level, int first_position, int num_tokens) {
    int beyond = level * TILE - first_position;  // queries that do not
    if (num_tokens <= beyond) return 0;
    return (num_tokens + QUERIES - 1) / QUERIES - max(beyond, 0) / QUERIES;
}

DEVICE int all_tiles_seeing(int level, const Chunks &chunks, int lane) {
    int count = 0;
    for (int seq = lane; seq < chunks.num_seqs; seq += 32)
        count += tiles_seeing(level, chunks.first_positions[seq], chunks.num_tokens[seq]);
    return warp_sum(count);
}

// Of the tile that has `rank` before it; false where there are not so many.
DEVICE bool find_tile(const Chunks &chunks, int rank, int lane, Tile &tile) {
    int high = 0;
    for (int seq = lane; seq < chunks.num_seqs; seq += 32) {
        int num_tokens = chunks.num_tokens[seq];
        if (num_tokens > 0)
            high = max(high, (chunks.first_positions[seq] + num_tokens - 1) / TILE);
    }
    high = warp_max(high);
    if (all_tiles_seeing(0, chunks, lane) <= rank) return false;
    int level = 0;
    while (level < high) {
        int middle = (level + high + 1) / 2;
        if (all_tiles_seeing(middle, chunks, lane) > rank)
            level = middle;
        else
            high = middle - 1;
    }
    rank -= all_tiles_seeing(level + 1, chunks, lane);
    for (int first = 0;; first += 32) {
        int seq = first + lane, higher = 0, here = 0;
        if (seq < chunks.num_seqs) {
            int first_position = chunks.first_positions[seq], num_tokens = chunks.num_tokens[seq];
            higher = tiles_seeing(level + 1, first_position, num_tokens);
            here = tiles_seeing(level, first_position, num_tokens) - higher;
        }
        int up_to = warp_prefix_sum(here, lane);
        int owner = warp_first(up_to > rank);
        if (owner < 32) {
            tile.seq = first + owner;
            int num_tokens = chunks.num_tokens[tile.seq];
            int behind = warp_from(higher, owner) + rank - warp_from(up_to - here, owner);
            tile.query = ((num_tokens + QUERIES - 1) / QUERIES - 1 - behind) * QUERIES;
            return true;
        }
        rank -= warp_from(up_to, 31);
    }
}
