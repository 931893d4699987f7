// silu(gate) * up of a block's sums, of matrices whose rows lie as paired_rows.py has them: of the
// two outputs that a thread has of a tile one is gate and the other up of the same feature. The
// values cross the block through shared memory in f16, token by token, and leave it in plain and in
// interleaved order.

constexpr int FEATURES = BLOCK_N / 2;
constexpr int TOKEN_BYTES = FEATURES * 2 + 16;  // 16 bytes of 8 tokens lie in all banks
static_assert(BLOCK_N % 128 == 0 && 512 % BLOCK_N == 0, "a block has whole sectors");

// Bit for bit what fused.py makes of it; powers too small for a normal number are lost in the sum.
DEVICE float silu_times(float gate, float up) {
    return divide(gate, 1.0f + power_of_2((0.0f - gate) * 1.44269504f)) * up;
}

// Outputs are rounded before the activation, as those of a product of its own are.
DEVICE u32 activated(float gate, float next_gate, float up, float next_up) {
    float2 gates = of_halves(to_halves(gate, next_gate)), ups = of_halves(to_halves(up, next_up));
    return to_halves(silu_times(gates.x, ups.x), silu_times(gates.y, ups.y));
}

DEVICE void add_bias(float (&sums)[TILES][BLOCK_T / 2], const u16 *bias) {
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
        float gate = of_halves(bias[64 * tile]).x, up = of_halves(bias[64 * tile + 8]).x;
#pragma unroll
        for (int i = 0; i < BLOCK_T / 2; i++) sums[tile][i] += i & 2 ? up : gate;
    }
}

// A warp has 8 features of a tile, which are 16 bytes of each token's.
DEVICE void keep_activated(float (&sums)[TILES][BLOCK_T / 2], const Work &work, u32 kept,
                           const u16 *bias) {
    int row = first_local_row();
    if (bias) add_bias(sums, bias + work.first_row + row);
    u32 to = kept + threadIdx.x % 8 * TOKEN_BYTES + row / 16 * 16;
#pragma unroll
    for (int tile = 0; tile < TILES; tile++)
#pragma unroll
        for (int i = 0; i < BLOCK_T / 8; i++) {
            const float *four = sums[tile] + 4 * i;
            store_transposed(to + 8 * i * TOKEN_BYTES + 64 * tile,
                             activated(four[0], four[1], four[2], four[3]));
        }
}

// 64 features of a token are the work of two neighbouring threads, whose 16 bytes are a sector.
DEVICE void store_activated(const Work &work, u32 kept, u16 *out, u16 *interleaved, int num_tokens,
                            int num_features) {
    constexpr int SIXTY_FOURS = FEATURES / 64;
    int tokens = min(BLOCK_T, num_tokens - work.first_token);
    for (int i = threadIdx.x; i < tokens * SIXTY_FOURS * 2; i += THREADS) {
        int half = i % 2, local = i / 2 % SIXTY_FOURS, token = i / 2 / SIXTY_FOURS;
        int slot = work.first_row / 2 + local * 64, run = slot / 64 % 4;
        size_t index = (size_t)(work.first_token + token) * num_features + slot / 256 * 256;
        u32 from = kept + token * TOKEN_BYTES + local * 128, eight[4][2][4];
#pragma unroll
        for (int q = 0; q < 4; q++) {
            u32 own[4];
#pragma unroll
            for (int j = 0; j < 2; j++) load_shared_u128(eight[q][j], from + q * 32 + j * 16);
#pragma unroll
            for (int j = 0; j < 4; j++) own[j] = half ? eight[q][1][j] : eight[q][0][j];
            store_u128(out + index + 64 * q + 16 * run + 8 * half, own);
        }
        // The columns 4 w + half and 4 w + half + 2 of each unit q.
        u16 *to = interleaved + index + run % 2 * 128 + run / 2 * 16 + half * 8;
#pragma unroll
        for (int w = 0; w < 4; w++) {
            u32 mixed[4];
#pragma unroll
            for (int q = 0; q < 4; q++)
                mixed[q] = prmt(eight[q][w / 2][w % 2 * 2], eight[q][w / 2][w % 2 * 2 + 1],
                                half ? 0x7632 : 0x5410);
            store_u128(to + 32 * w, mixed);
        }
    }
}
