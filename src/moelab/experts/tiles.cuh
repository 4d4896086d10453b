// What the products of hopper.cu are made of: stages of shared memory that are loaded, multiplied and handed back, and
// tiles of results. It stands after hopper.cuh.

constexpr int ROWS = 128, COLUMNS = 256, DEPTH = 64;  // of a tile, and of the summed dimension at once
constexpr int BOX = 64 * 128;                         // bytes of 64 rows of 64 numbers
constexpr int CHUNK = 2 * BOX;                        // of a result's 64 rows and 128 columns in bf16
constexpr int LEFT = 2 * BOX, STAGE = LEFT + 4 * BOX, STAGES = 4;
constexpr int STAGING = STAGES * STAGE;       // a chunk of each multiplying warpgroup
constexpr int BARRIERS = STAGING + 2 * CHUNK;
constexpr int TABLES = BARRIERS + 2 * STAGES * 8;
constexpr int MOST_EXPERTS = 128;
constexpr int GROUP = 8;  // tiles of rows that go down a column of tiles before the next column

static_assert(BLOCKS == 1 || BLOCKS == 2, "each block loads half of the columns, or all");

// Whether this block loads this half of a tile's columns, which its cluster shares.
__device__ inline bool loads(int half) { return BLOCKS == 1 || half == rank_in_cluster(); }

__device__ inline Address full(int stage) { return shared_base() + BARRIERS + 8 * stage; }
__device__ inline Address empty(int stage) { return full(STAGES + stage); }
__device__ inline Address left(int stage) { return shared_base() + stage * STAGE; }
__device__ inline Address right(int stage) { return left(stage) + LEFT; }
__device__ inline int* table(int number) { return reinterpret_cast<int*>(dynamic + TABLES) + number * (MOST_EXPERTS + 1); }

// Which stage the n-th block of the summed dimension is in, and the parity of its phase.
struct Turn {
    int stage, parity;
    __device__ explicit Turn(int n) : stage(n % STAGES), parity(n / STAGES % 2) {}
};

__device__ inline void create_barriers() {
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < STAGES; ++stage) {
            barrier_create(full(stage), 1);
            barrier_create(empty(stage), 2 * BLOCKS);
        }
        barriers_created();
    }
}

__device__ inline int start_of(const int* offsets, int expert) { return expert ? offsets[expert - 1] : 0; }

// table(0)[e]: units of work before expert e's, `each` a part of its rows, and table(1)[e]: parts before its own of experts
// with several. count(e, rows): parts. All threads of the block come here.
template <class Count> __device__ inline void count_work(const int* offsets, int experts, int each, Count count) {
    for (int e = threadIdx.x; e < experts; e += blockDim.x) {
        const int parts = count(e, offsets[e] - start_of(offsets, e));
        table(0)[e] = parts * each;
        table(1)[e] = parts > 1 ? parts : 0;
    }
    __syncthreads();
    if (threadIdx.x < 2) {
        int* counts = table(threadIdx.x);
        int before = 0;
        for (int e = 0; e < experts; ++e) {
            const int parts = counts[e];
            counts[e] = before;
            before += parts;
        }
        counts[experts] = before;
    }
    __syncthreads();
}

// Starts: barriers, tables, and no block of the cluster before the others.
template <class Count> __device__ inline void begin(const int* offsets, int experts, int each, Count count) {
    create_barriers();
    count_work(offsets, experts, each, count);
    cluster_arrive();
    cluster_wait();
}

// No block ends while another still writes to it, or a store reads from it.
__device__ inline void end() {
    stores_read();
    cluster_arrive();
    cluster_wait();
}

// Hands a stage back to the blocks that load it.
__device__ inline void release(int stage) {
    if (threadIdx.x % 128 < BLOCKS) barrier_arrive(empty(stage), threadIdx.x % 128);
}

// The k-th block of a tile's summed dimension, n-th of all, added to acc, 64 rows by 256 columns; the block before is
// handed back. *_ACROSS: the operand's rows lie along the summed dimension.
template <int LEFT_ACROSS, int RIGHT_ACROSS>
__device__ inline void add_block(float (&acc)[2][64], int n, int k, int half) {
    constexpr int left_step = LEFT_ACROSS ? 2048 : 32, right_step = RIGHT_ACROSS ? 2048 : 32;  // of 16 summed
    const int stage = Turn(n).stage;
    hold(acc[0]);
    hold(acc[1]);
    products_begin();
#pragma unroll
    for (int i = 0; i < DEPTH / 16; ++i)
        multiply<LEFT_ACROSS, RIGHT_ACROSS>(acc, descriptor(left(stage) + half * BOX + i * left_step, BOX),
                                            descriptor(right(stage) + i * right_step, BOX), k + i > 0);
    products_issued();
    if (k > 0) {
        products_wait<1>();
        release(Turn(n - 1).stage);
    }
}

// After the last block, the n-th of all.
__device__ inline void finish_blocks(float (&acc)[2][64], int n) {
    products_wait<0>();
    hold(acc[0]);
    hold(acc[1]);
    release(Turn(n).stage);
}

// Half of a warpgroup's columns, rounded, into shared memory, as the tensor memory accelerator has it.
__device__ inline void stage_chunk(Address chunk, const float (&acc)[64]) {
    const int lane = threadIdx.x % 32, row = threadIdx.x % 128 / 32 * 16 + lane % 16;
#pragma unroll
    for (int i = 0; i < 16; i += 2) {
        const int line = i + lane / 16;
        const float* d = acc + 4 * i;
        store_matrices(chunk + line / 8 * BOX + row * 128 + ((line % 8 ^ lane % 8) << 4), two_bfloats(d[0], d[1]),
                       two_bfloats(d[2], d[3]), two_bfloats(d[4], d[5]), two_bfloats(d[6], d[7]));
    }
}

// A result (…, stride) and where a chunk of it begins.
struct Place {
    const TensorMap& map;
    unsigned short* to;
    int row, column, stride;
};

// A staged chunk to its place; only the first `rows`. The warpgroup's threads together.
__device__ inline void store_chunk(Address chunk, const Place& place, int rows) {
    if (rows >= 64) {
        if (threadIdx.x % 128 == 0) {
            tensor_store(place.map, chunk, place.column, place.row);
            tensor_store(place.map, chunk + BOX, place.column + 64, place.row);
            stores_issued();
        }
        return;
    }
    const int line = threadIdx.x % 16;
    for (int row = threadIdx.x % 128 / 16; row < rows; row += 8)
        store_line(place.to + static_cast<long long>(place.row + row) * place.stride + place.column + 8 * line,
                   load_line(chunk + line / 8 * BOX + row * 128 + ((line % 8 ^ row & 7) << 4)));
}

// The warpgroup's half of a tile to its place, whose first row the tile has `rows` of.
__device__ inline void store_half(float (&acc)[2][64], const TensorMap& map, unsigned short* to, int row, int rows,
                                  int column, int stride, int half) {
    const Address chunk = shared_base() + STAGING + half * CHUNK;
    rows -= 64 * half;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        if (rows <= 0 || column + 128 * i >= stride) continue;
        if (threadIdx.x % 128 == 0) stores_read();
        warpgroup_barrier();
        stage_chunk(chunk, acc[i]);
        before_async();
        warpgroup_barrier();
        store_chunk(chunk, {map, to, row + 64 * half, column + 128 * i, stride}, rows);
    }
}
