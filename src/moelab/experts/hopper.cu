// Products of rows that are sorted by expert, bf16, on Hopper's tensor cores. Blocks are persistent; warpgroup 0 loads, 1
// and 2 multiply, each 64 rows of a tile of 128 by 256, and where there is a curve to follow 3 and 4 finish what 1 and 2
// hand them beside the products of the next tile. A cluster of two blocks has the same rows and neighbouring columns:
// each loads half of the rows for both.
//
// Compiled with BLOCKS, those of a cluster, and ACTIVATION (curve.cuh).

constexpr int ROWS = 128, COLUMNS = 256, DEPTH = 64;  // of a tile, and of the summed dimension at once
constexpr int BOX = 64 * 128;                         // bytes of 64 rows of 64 numbers
constexpr int CHUNK = 2 * BOX;                        // of a result's 64 rows and 128 columns in bf16
constexpr int LEFT = 2 * BOX, STAGE = LEFT + 4 * BOX;
constexpr int PLAIN = 4, CURVED = 3;  // stages: those with a curve have room for a whole tile beside them
constexpr int AFTER = 14 * CHUNK;     // where the barriers stand
constexpr int TABLES = AFTER + 8 * 12;
constexpr int MOST_EXPERTS = 128;
constexpr int GROUP = 8;  // tiles of rows that go down a column of tiles before the next column
constexpr int LOADING = 32, MULTIPLYING = 160, FINISHING = 64;  // registers of a thread, where the blocks have 640
constexpr int SHARES = BLOCKS > 1 ? 2 : 1;

static_assert(BLOCKS == 1 || BLOCKS == 2, "each block loads half of the rows, or all");
static_assert(PLAIN * STAGE + 2 * CHUNK <= AFTER && CURVED * STAGE + 4 * CHUNK <= AFTER, "");

__device__ inline Address full(int stage) { return shared_base() + AFTER + 8 * stage; }
__device__ inline Address empty(int stage) { return full(4 + stage); }
__device__ inline Address filled(int half) { return full(8 + half); }  // the rows of a multiplying warpgroup
__device__ inline Address emptied(int half) { return full(10 + half); }
__device__ inline Address left(int stage) { return shared_base() + stage * STAGE; }
__device__ inline Address right(int stage) { return left(stage) + LEFT; }
template <int STAGES> __device__ inline Address staging(int half) {
    return left(STAGES) + half * (STAGES == PLAIN ? CHUNK : 2 * CHUNK);
}
__device__ inline int* table(int number) { return reinterpret_cast<int*>(dynamic + TABLES) + number * (MOST_EXPERTS + 1); }

// Which stage the n-th block of the summed dimension is in, and the parity of its phase.
template <int STAGES> struct Turn {
    int stage, parity;
    __device__ explicit Turn(int n) : stage(n % STAGES), parity(n / STAGES % 2) {}
};

__device__ inline void create_barriers() {
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < 4; ++stage) {
            barrier_create(full(stage), 1);
            barrier_create(empty(stage), 2 * BLOCKS);
        }
        for (int half = 0; half < 2; ++half) {
            barrier_create(filled(half), 4);
            barrier_create(emptied(half), 4);
        }
        barriers_created();
    }
}

__device__ inline int start_of(const int* offsets, int expert) { return expert ? offsets[expert - 1] : 0; }

// table(0)[e]: units of work before expert e's, of `each` a part of its rows, of which one has up to `longest`;
// table(1)[e]: parts before its own of experts with several. All threads of the block come here.
__device__ inline void count_work(const int* offsets, int experts, int longest, int each) {
    for (int e = threadIdx.x; e < experts; e += blockDim.x) {
        const int parts = (offsets[e] - start_of(offsets, e) + longest - 1) / longest;
        table(0)[e] = parts * each;
        table(1)[e] = parts > 1 ? parts : 0;
    }
    __syncthreads();
    if (threadIdx.x < 2) {
        int* counts = table(threadIdx.x);
        int before = 0;
        for (int e = 0; e < experts; ++e) {
            const int count = counts[e];
            counts[e] = before;
            before += count;
        }
        counts[experts] = before;
    }
    __syncthreads();
}

// Starts: barriers, tables, and no block of the cluster before the others.
__device__ inline void begin(const int* offsets, int experts, int longest, int each) {
    create_barriers();
    count_work(offsets, experts, longest, each);
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

// The k-th block of a tile's summed dimension, n-th of all, added to acc, 64 rows by 128 columns twice; the block before
// is handed back. *_ACROSS: the operand's rows lie along the summed dimension.
template <int STAGES, int LEFT_ACROSS, int RIGHT_ACROSS>
__device__ inline void add_block(float (&acc)[2][64], int n, int k, int half) {
    constexpr int left_step = LEFT_ACROSS ? 2048 : 32, right_step = RIGHT_ACROSS ? 2048 : 32;  // of 16 summed
    const int stage = Turn<STAGES>(n).stage;
    hold(acc[0]);
    hold(acc[1]);
    products_begin();
#pragma unroll
    for (int i = 0; i < DEPTH / 16; ++i) {
        const unsigned long long rows = descriptor(left(stage) + half * BOX + i * left_step, BOX);
        const Address matrix = right(stage) + i * right_step;
        if (STAGES == PLAIN) {
            multiply<LEFT_ACROSS, RIGHT_ACROSS>(acc, rows, descriptor(matrix, BOX), k + i > 0);
        } else {  // 640 threads have too few registers for the instruction
            multiply_half<LEFT_ACROSS, RIGHT_ACROSS>(acc[0], rows, descriptor(matrix, BOX), k + i > 0);
            multiply_half<LEFT_ACROSS, RIGHT_ACROSS>(acc[1], rows, descriptor(matrix + 2 * BOX, BOX), k + i > 0);
        }
    }
    products_issued();
    if (k > 0) {
        products_wait<1>();
        release(Turn<STAGES>(n - 1).stage);
    }
}

// After the last block, the n-th of all.
template <int STAGES> __device__ inline void finish_blocks(float (&acc)[2][64], int n) {
    products_wait<0>();
    hold(acc[0]);
    hold(acc[1]);
    release(Turn<STAGES>(n).stage);
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

__device__ inline float low(unsigned word) { return __uint_as_float(word << 16); }
__device__ inline float high(unsigned word) { return __uint_as_float(word & 0xffff0000u); }

// The warpgroup's half of a tile to its place, whose first row the tile has `rows` of.
__device__ inline void store_half(float (&acc)[2][64], const TensorMap& map, unsigned short* to, int row, int rows,
                                  int column, int stride, int half) {
    const Address chunk = staging<PLAIN>(half);
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

// Rows

struct Tile {
    int expert, start, rows, column;
};

// Walks the tiles of this cluster, in the same order in every thread.
struct Tiles {
    const int *offsets, *before;
    int experts, across, unit, step, expert = 0;

    // across: tiles beside each other, over the blocks of a cluster.
    __device__ Tiles(const int* offsets, int experts, int across)
        : offsets(offsets), before(table(0)), experts(experts), across(across),
          unit(static_cast<int>(blockIdx.x) / BLOCKS), step(static_cast<int>(gridDim.x) / BLOCKS) {}

    __device__ bool next(Tile& tile) {
        if (unit >= before[experts]) return false;
        while (unit >= before[expert + 1]) ++expert;
        const int first = start_of(offsets, expert), end = offsets[expert], tiles = (end - first + ROWS - 1) / ROWS;
        const int group = (unit - before[expert]) / (GROUP * across), within = (unit - before[expert]) % (GROUP * across);
        const int height = min(GROUP, tiles - group * GROUP);
        const int row = (group * GROUP + within % height) * ROWS;
        tile = {expert, first + row, min(ROWS, end - first - row), (within / height * BLOCKS + rank_in_cluster()) * COLUMNS};
        unit += step;
        return true;
    }
};

// Rows (N, inside) by w[e]: (outside, inside), or ACROSS (inside, outside); outside is a multiple of 128, and of 512 where
// blocks are two. Boxes: rows 128 / BLOCKS by 64, w 128 by 64, or ACROSS 64 by 64, out 64 by 64.
struct Product {
    const TensorMap &rows_map, &w_map;
    const int* offsets;
    int experts, inside, outside;
    unsigned short *out, *h;
    const unsigned short *bias, *z;
    const float* weights;
    const int* slot_of_row;
    float* partial;

    __device__ int across() const { return (outside + COLUMNS - 1) / COLUMNS / BLOCKS; }
};

template <int STAGES, int ACROSS> __device__ inline void load_tiles(const Product& p, Tiles tiles) {
    Tile tile;
    tensor_prefetch(p.rows_map);
    tensor_prefetch(p.w_map);
    const int share = ROWS / SHARES * rank_in_cluster();
    for (int n = 0; tiles.next(tile);)
        for (int k = 0; k < p.inside; k += DEPTH, ++n) {
            const Turn<STAGES> turn(n);
            barrier_wait(empty(turn.stage), turn.parity ^ 1);
            barrier_expect(full(turn.stage), STAGE);
            tensor_load_all(p.rows_map, left(turn.stage) + share * 128, k, tile.start + share, full(turn.stage));
            if (ACROSS) {
                for (int i = 0; i < 4; ++i)
                    tensor_load(p.w_map, right(turn.stage) + i * BOX, tile.column + 64 * i, tile.expert * p.inside + k,
                                full(turn.stage));
            } else {
                for (int i = 0; i < 2; ++i)
                    tensor_load(p.w_map, right(turn.stage) + i * 2 * BOX, k,
                                tile.expert * p.outside + tile.column + 128 * i, full(turn.stage));
            }
        }
}

// The warpgroup's half of a tile; n counts blocks of the summed dimension from the first tile on.
template <int STAGES, int ACROSS> __device__ inline void multiply_tile(float (&acc)[2][64], const Product& p, int& n, int half) {
    for (int k = 0; k < p.inside / DEPTH; ++k, ++n) {
        const Turn<STAGES> turn(n);
        barrier_wait(full(turn.stage), turn.parity);
        add_block<STAGES, 0, ACROSS>(acc, n, k, half);
    }
    finish_blocks<STAGES>(acc, n - 1);
}

// out (N, outside) = the products.
template <int ACROSS> __device__ inline void plain_product(const Product& p, const TensorMap& out_map) {
    begin(p.offsets, p.experts, ROWS, p.across());
    const int warpgroup = static_cast<int>(threadIdx.x) / 128;
    Tiles tiles(p.offsets, p.experts, p.across());
    if (warpgroup == 0) {
        fewer_registers<40>();
        if (threadIdx.x == 0) load_tiles<PLAIN, ACROSS>(p, tiles);
    } else {
        more_registers<232>();
        Tile tile;
        for (int n = 0; tiles.next(tile);) {
            float acc[2][64];
            multiply_tile<PLAIN, ACROSS>(acc, p, n, warpgroup - 1);
            store_half(acc, out_map, p.out, tile.start, tile.rows, tile.column, p.outside, warpgroup - 1);
        }
    }
    end();
}

extern "C" __global__ void CLUSTER __launch_bounds__(384, 1)
down(MAP rows_map, MAP w_map, MAP out_map, const int* offsets, long long experts, long long inside, long long outside,
     unsigned short* out) {
    plain_product<0>({rows_map, w_map, offsets, static_cast<int>(experts), static_cast<int>(inside),
                      static_cast<int>(outside), out}, out_map);
}

extern "C" __global__ void CLUSTER __launch_bounds__(384, 1)
back(MAP rows_map, MAP w_map, MAP out_map, const int* offsets, long long experts, long long inside, long long outside,
     unsigned short* out) {
    plain_product<1>({rows_map, w_map, offsets, static_cast<int>(experts), static_cast<int>(inside),
                      static_cast<int>(outside), out}, out_map);
}

// A multiplying warpgroup's half of the number-th tile to the warpgroup that finishes it, with the bias.
__device__ inline void hand_over(float (&acc)[2][64], const Product& p, const Tile& tile, int number, int half) {
    const int first = tile.column + 2 * (threadIdx.x % 4);
#pragma unroll
    for (int i = 0; i < 2; ++i)
        if (p.bias && tile.column + 128 * i < p.outside) {
            const unsigned* pairs = reinterpret_cast<const unsigned*>(
                p.bias + static_cast<long long>(tile.expert) * p.outside + first + 128 * i);
#pragma unroll
            for (int j = 0; j < 16; ++j) {
                const unsigned pair = pairs[4 * j];
#pragma unroll
                for (int down = 0; down < 2; ++down) {
                    acc[i][4 * j + 2 * down] += low(pair);
                    acc[i][4 * j + 2 * down + 1] += high(pair);
                }
            }
        }
    barrier_wait(emptied(half), number % 2 ^ 1);
#pragma unroll
    for (int i = 0; i < 2; ++i) stage_chunk(staging<CURVED>(half) + i * CHUNK, acc[i]);
    __syncwarp();
    if (threadIdx.x % 32 == 0) barrier_arrive(filled(half), rank_in_cluster());
}

// The words of two numbers each, with the curve. z is the product, h = act(z); or, SLOPE, the product is g = dL/dh of an
// unweighted row, whose place dL/dz takes, and h is weighted; Σ g · act(z) is added to sum.
template <int SLOPE> __device__ inline void follow(unsigned& product, unsigned z, unsigned& h, float weight, float& sum) {
    if (SLOPE) {
        const Curve a = curve(low(z)), b = curve(high(z));
        const float one = low(product), other = high(product);
        sum += one * a.height + other * b.height;
        product = two_bfloats(weight * one * a.slope, weight * other * b.slope);
        h = two_bfloats(weight * a.height, weight * b.height);
    } else {
        h = two_bfloats(curve(low(product)).height, curve(high(product)).height);
    }
}

// What a multiplying warpgroup handed over of the number-th tile: out = z and h = act(z), or SLOPE out = dL/dz,
// h = weight · act(z), partial[row, tile of columns] = Σ g · act(z). Eight threads have lines of 16 bytes beside each other.
template <int SLOPE> __device__ inline void finish(const Product& p, const Tile& tile, int number, int half) {
    const int lane = threadIdx.x % 32, first = threadIdx.x % 128 / 32 * 4 + lane / 8, line = lane % 8;
    const int rows = tile.rows - 64 * half, start = tile.start + 64 * half, columns = p.outside - tile.column;
    const long long spot = static_cast<long long>(start + first) * p.outside + tile.column + 8 * line;
    const Address staged = staging<CURVED>(half) + first * 128 + ((line ^ first % 8) << 4);
    float weight = 0;
    uint4 z[4];
    if (SLOPE && first < rows) {
        weight = p.weights[p.slot_of_row[start + first]];
#pragma unroll
        for (int j = 0; j < 4; ++j)
            if (64 * j < columns) z[j] = *reinterpret_cast<const uint4*>(p.z + spot + 64 * j);
    }
    barrier_wait(filled(half), number % 2);
#pragma unroll 1
    for (int i = 0; i < 4; ++i) {
        const long long at = spot + 16ll * i * p.outside;
        const int row = 16 * i + first;
        const bool live = row < rows, more = SLOPE && i < 3 && row + 16 < rows;
        const float next_weight = more ? p.weights[p.slot_of_row[start + row + 16]] : 0;
        float sum = 0;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            uint4 g = load_line(staged + j * BOX + 16 * i * 128), h;
            follow<SLOPE>(g.x, z[j].x, h.x, weight, sum);
            follow<SLOPE>(g.y, z[j].y, h.y, weight, sum);
            follow<SLOPE>(g.z, z[j].z, h.z, weight, sum);
            follow<SLOPE>(g.w, z[j].w, h.w, weight, sum);
            if (64 * j < columns) {
                if (live) {
                    store_line(p.out + at + 64 * j, g);
                    store_line(p.h + at + 64 * j, h);
                }
                if (more) z[j] = *reinterpret_cast<const uint4*>(p.z + at + 16ll * p.outside + 64 * j);
            }
        }
        if (SLOPE) {
            weight = next_weight;
            sum += __shfl_xor_sync(ALL, sum, 1);
            sum += __shfl_xor_sync(ALL, sum, 2);
            sum += __shfl_xor_sync(ALL, sum, 4);
            if (line == 0 && live)
                p.partial[static_cast<long long>(start + row) * (p.across() * BLOCKS) + tile.column / COLUMNS] = sum;
        }
    }
    __syncwarp();
    if (lane == 0) barrier_arrive(emptied(half), rank_in_cluster());
}

template <int SLOPE> __device__ inline void curved_product(const Product& p) {
    begin(p.offsets, p.experts, ROWS, p.across());
    const int warpgroup = static_cast<int>(threadIdx.x) / 128;
    Tiles tiles(p.offsets, p.experts, p.across());
    Tile tile;
    if (warpgroup == 0) {
        fewer_registers<LOADING>();
        if (threadIdx.x == 0) load_tiles<CURVED, SLOPE>(p, tiles);
    } else if (warpgroup < 3) {
        more_registers<MULTIPLYING>();
        for (int n = 0, number = 0; tiles.next(tile); ++number) {
            float acc[2][64];
            multiply_tile<CURVED, SLOPE>(acc, p, n, warpgroup - 1);
            hand_over(acc, p, tile, number, warpgroup - 1);
        }
    } else {
        fewer_registers<FINISHING>();
        for (int number = 0; tiles.next(tile); ++number) finish<SLOPE>(p, tile, number, warpgroup - 3);
    }
    end();
}

extern "C" __global__ void CLUSTER __launch_bounds__(640, 1)
up(MAP rows_map, MAP w_map, const int* offsets, long long experts, long long inside, long long outside,
   unsigned short* out, unsigned short* h, const unsigned short* bias) {
    curved_product<0>({rows_map, w_map, offsets, static_cast<int>(experts), static_cast<int>(inside),
                       static_cast<int>(outside), out, h, bias});
}

extern "C" __global__ void CLUSTER __launch_bounds__(640, 1)
slope(MAP rows_map, MAP w_map, const int* offsets, long long experts, long long inside, long long outside,
      unsigned short* out, unsigned short* h, const unsigned short* z, const float* weights, const int* slot_of_row,
      float* partial) {
    curved_product<1>({rows_map, w_map, offsets, static_cast<int>(experts), static_cast<int>(inside),
                       static_cast<int>(outside), out, h, nullptr, z, weights, slot_of_row, partial});
}

// Sums over rows

struct Part {
    int expert, start, rows, number, left, right;
};

struct Parts {
    const int *offsets, *before, *several;
    int experts, high, across, longest, unit, step, expert = 0;

    __device__ Parts(const int* offsets, int experts, int high, int across, int longest)
        : offsets(offsets), before(table(0)), several(table(1)), experts(experts), high(high), across(across),
          longest(longest), unit(static_cast<int>(blockIdx.x) / BLOCKS), step(static_cast<int>(gridDim.x) / BLOCKS) {}

    __device__ bool next(Part& part) {
        if (unit >= before[experts]) return false;
        while (unit >= before[expert + 1]) ++expert;
        const int within = unit - before[expert], chunk = within / (high * across), tile = within % (high * across);
        const int first = start_of(offsets, expert) + chunk * longest;
        const bool alone = several[expert + 1] == several[expert];
        part = {expert, first, min(longest, offsets[expert] - first), alone ? -1 : several[expert] + chunk,
                tile % high * ROWS, (tile / high * BLOCKS + rank_in_cluster()) * COLUMNS};
        unit += step;
        return true;
    }
};

// dw[e] (outside, inside) = Σ over an expert's rows of d_y ⊗ x: d_y (N, outside), x (N, inside).
//
// Up to `longest` rows are summed at once. The only part of an expert goes to dw; of several each goes to
// parts (part, outside, inside) in fp32, which `sum_parts` adds. Rows after a part's are another's, and may be NaN:
// they are cleared in shared memory. Boxes: 64 by 64. outside and inside are multiples of 128, inside of 512 where
// blocks are two.
extern "C" __global__ void CLUSTER __launch_bounds__(384, 1)
weight_gradient(MAP y_map, MAP x_map, MAP dw_map, const int* offsets, long long experts_, long long outside_,
                long long inside_, long long longest_, unsigned short* dw, float* parts) {
    const int experts = static_cast<int>(experts_), outside = static_cast<int>(outside_);
    const int inside = static_cast<int>(inside_), longest = static_cast<int>(longest_);
    const int high = outside / ROWS, across = (inside + COLUMNS - 1) / COLUMNS / BLOCKS;
    begin(offsets, experts, longest, high * across);
    const int half = static_cast<int>(threadIdx.x) / 128 - 1;
    Parts work(offsets, experts, high, across, longest);
    Part part;
    if (half < 0) {
        fewer_registers<40>();
        if (threadIdx.x == 0) {
            tensor_prefetch(y_map);
            tensor_prefetch(x_map);
            for (int n = 0; work.next(part);)
                for (int k = 0; k < part.rows; k += DEPTH, ++n) {
                    const Turn<PLAIN> turn(n);
                    barrier_wait(empty(turn.stage), turn.parity ^ 1);
                    barrier_expect(full(turn.stage), STAGE);
                    for (int i = 0; i < 2; ++i)
                        if (BLOCKS == 1 || i == rank_in_cluster())
                            tensor_load_all(y_map, left(turn.stage) + i * BOX, part.left + 64 * i, part.start + k,
                                            full(turn.stage));
                    for (int i = 0; i < 4; ++i)
                        tensor_load(x_map, right(turn.stage) + i * BOX, part.right + 64 * i, part.start + k,
                                    full(turn.stage));
                }
        }
    } else {
        more_registers<232>();
        for (int n = 0; work.next(part);) {
            float acc[2][64];
            for (int k = 0; k * DEPTH < part.rows; ++k, ++n) {
                const Turn<PLAIN> turn(n);
                barrier_wait(full(turn.stage), turn.parity);
                if (const int rows = part.rows - k * DEPTH; rows < DEPTH) {
                    for (int i = threadIdx.x - 128; i < (DEPTH - rows) * 48; i += 256)
                        clear_line(left(turn.stage) + i % 6 * BOX + (rows + i / 48) * 128 + i / 6 % 8 * 16);
                    before_async();
                    consumers_barrier();
                }
                add_block<PLAIN, 1, 1>(acc, n, k, half);
            }
            finish_blocks<PLAIN>(acc, n - 1);
            if (part.number < 0) {
                store_half(acc, dw_map, dw, part.expert * outside + part.left, ROWS, part.right, inside, half);
            } else {
                const int lane = threadIdx.x % 32, row = part.left + 64 * half + threadIdx.x % 128 / 32 * 16 + lane / 4;
                float* to = parts + (part.number * static_cast<long long>(outside) + row) * inside + part.right + 2 * (lane % 4);
#pragma unroll
                for (int i = 0; i < 2; ++i)
                    if (part.right + 128 * i < inside)
#pragma unroll
                        for (int down = 0; down < 2; ++down)
#pragma unroll
                            for (int j = 0; j < 16; ++j)
                                *reinterpret_cast<float2*>(to + 8ll * down * inside + 128 * i + 8 * j) =
                                    make_float2(acc[i][4 * j + 2 * down], acc[i][4 * j + 2 * down + 1]);
            }
        }
    }
    end();
}

// What `weight_gradient` left in parts, summed in their order into dw; zeros for an expert without rows. Grid: (any, E).
extern "C" __global__ void __launch_bounds__(256)
sum_parts(const float* parts, const int* offsets, unsigned short* dw, long long size, long long longest) {
    const int expert = blockIdx.y, limit = static_cast<int>(longest);
    int first = 0, count = 0;
    for (int e = 0; e <= expert; ++e) {
        count = (offsets[e] - start_of(offsets, e) + limit - 1) / limit;
        if (e < expert && count > 1) first += count;
    }
    if (count == 1) return;
    const float4* from = reinterpret_cast<const float4*>(parts + first * size);
    uint2* to = reinterpret_cast<uint2*>(dw + expert * size);
    for (long long i = static_cast<long long>(blockIdx.x) * 256 + threadIdx.x; i < size / 4; i += gridDim.x * 256ll) {
        float4 sum = {0, 0, 0, 0};
        for (int part = 0; part < count; ++part) {
            const float4 next = from[part * (size / 4) + i];
            sum = {sum.x + next.x, sum.y + next.y, sum.z + next.z, sum.w + next.w};
        }
        to[i] = {two_bfloats(sum.x, sum.y), two_bfloats(sum.z, sum.w)};
    }
}
