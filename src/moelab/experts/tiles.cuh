// What the products of hopper.cu and activated.cu are made of: stages of shared memory that are loaded, multiplied and
// handed back, and tiles of results. It stands after hopper.cuh.
//
// Compiled with BLOCKS, those of a cluster, and STAGES. Two warpgroups multiply, each 64 rows of a tile of 128 by 256. A
// cluster of two blocks has the same columns and rows below each other: each loads half of the columns for both.

constexpr int ROWS = 128, COLUMNS = 256, DEPTH = 64;  // of a tile, and of the summed dimension at once
constexpr int BOX = 64 * 128;                         // bytes of 64 rows of 64 numbers
constexpr int CHUNK = 2 * BOX;                        // of a result's 64 rows and 128 columns in bf16
constexpr int LEFT = 2 * BOX, STAGE = LEFT + 4 * BOX;
constexpr int STAGING = STAGES * STAGE, BARRIERS = 224 * 1024;  // between them results stand
constexpr int TABLES = BARRIERS + (2 * STAGES + 4) * 8;
constexpr int MOST_EXPERTS = 128;
constexpr int GROUP = 8;  // tiles of rows that go down a column of tiles before the next column

static_assert(BLOCKS == 1 || BLOCKS == 2, "each block loads half of the columns, or all");
static_assert(STAGING + 2 * CHUNK <= BARRIERS, "a chunk of each multiplying warpgroup");

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

// table(0)[e]: units of work before expert e's, and table(1)[e]: what else is counted before it. units(e, rows) and
// others(e, rows) say how many are e's. All threads of the block come here.
template <class Units, class Others>
__device__ inline void count_work(const int* offsets, int experts, Units units, Others others) {
    for (int e = threadIdx.x; e < experts; e += blockDim.x) {
        const int rows = offsets[e] - start_of(offsets, e);
        table(0)[e] = units(e, rows);
        table(1)[e] = others(e, rows);
    }
    __syncthreads();
    if (threadIdx.x < 2) {
        int* counts = table(threadIdx.x);
        int before = 0;
        for (int e = 0; e < experts; ++e) {
            const int own = counts[e];
            counts[e] = before;
            before += own;
        }
        counts[experts] = before;
    }
    __syncthreads();
}

// Starts: barriers, tables, and no block of the cluster before the others.
template <class Units, class Others>
__device__ inline void begin(const int* offsets, int experts, Units units, Others others) {
    create_barriers();
    count_work(offsets, experts, units, others);
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

// Products of rows

struct Tile {
    int expert, number, start, rows, column;  // number: of rows of its expert; without rows where those end before it
};

// Walks the tiles of this block, which are one below the other in a cluster, in the same order in every thread.
struct Tiles {
    const int *offsets, *before;
    int experts, across, unit, step, expert = 0;

    // across: tiles beside each other.
    __device__ Tiles(const int* offsets, int experts, int across)
        : offsets(offsets), before(table(0)), experts(experts), across(across),
          unit(static_cast<int>(blockIdx.x) / BLOCKS), step(static_cast<int>(gridDim.x) / BLOCKS) {}

    static __device__ int tall(int rows) { return (rows + ROWS * BLOCKS - 1) / (ROWS * BLOCKS); }

    __device__ bool next(Tile& tile) {
        if (unit >= before[experts]) return false;
        while (unit >= before[expert + 1]) ++expert;
        const int first = start_of(offsets, expert), end = offsets[expert];
        const int group = (unit - before[expert]) / (GROUP * across), within = (unit - before[expert]) % (GROUP * across);
        const int height = min(GROUP, tall(end - first) - group * GROUP);
        const int row = ((group * GROUP + within % height) * BLOCKS + rank_in_cluster()) * ROWS;
        tile = {expert, row / ROWS, first + row, min(ROWS, end - first - row), within / height * COLUMNS};
        unit += step;
        return true;
    }
};

// Loads what the tiles multiply, block by block of the summed dimension: rows (N, inside) and w[e] (outside, inside), or
// ACROSS (inside, outside). Boxes: rows and w 128 by 64, or ACROSS w 64 by 64. One thread's work.
template <int ACROSS> struct Loader {
    const TensorMap &rows_map, &w_map;
    Tiles tiles;
    int inside, outside, k, n = 0;
    Tile tile;

    __device__ Loader(const TensorMap& rows_map, const TensorMap& w_map, const Tiles& tiles, int inside, int outside)
        : rows_map(rows_map), w_map(w_map), tiles(tiles), inside(inside), outside(outside), k(inside) {
        tensor_prefetch(rows_map);
        tensor_prefetch(w_map);
    }

    // Loads the next block, as soon as there is a stage for it; false if there is none.
    __device__ bool load() {
        if (k == inside) {
            if (!tiles.next(tile)) return false;
            k = 0;
        }
        const Turn turn(n);
        const Address there = full(turn.stage), matrix = right(turn.stage);
        barrier_wait(empty(turn.stage), turn.parity ^ 1);
        barrier_expect(there, STAGE);
        tensor_load(rows_map, left(turn.stage), k, tile.start, there);
        for (int i = 0; i < (ACROSS ? 4 : 2); ++i)
            if (!loads(ACROSS ? i / 2 : i))
                continue;
            else if (ACROSS)
                tensor_load_all(w_map, matrix + i * BOX, tile.column + 64 * i, tile.expert * inside + k, there);
            else
                tensor_load_all(w_map, matrix + i * 2 * BOX, k, tile.expert * outside + tile.column + 128 * i, there);
        k += DEPTH;
        ++n;
        return true;
    }
};

// acc = the warpgroup's half of a tile, whose blocks of the summed dimension are the n-th of all and those after it.
// released(): a block has been handed back.
template <int ACROSS, class Released>
__device__ inline void multiply_tile(float (&acc)[2][64], int& n, int blocks, int half, Released released) {
    for (int k = 0; k < blocks; ++k, ++n) {
        const Turn turn(n);
        barrier_wait(full(turn.stage), turn.parity);
        add_block<0, ACROSS>(acc, n, k, half);
        if (k > 0) released();
    }
    finish_blocks(acc, n - 1);
    released();
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
