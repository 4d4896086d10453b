// Products of rows that are sorted by expert, bf16, on Hopper's tensor cores: persistent, one warpgroup that loads and
// two that multiply. A cluster of two blocks has the same rows and neighbouring columns: each loads half of the rows for
// both.
//
// Compiled with BLOCKS, those of a cluster, and ACTIVATION (curve.cuh).

constexpr int ROWS = 128, DEPTH = 64;    // of a tile, and of the summed dimension at once
constexpr int BOX = 64 * 128;            // bytes of 64 rows of 64 numbers
constexpr int CHUNK = 2 * BOX;           // of a result's 64 rows and 128 columns in bf16
constexpr int MOST_STAGES = 5;
constexpr int AFTER = 14 * CHUNK;        // where the barriers stand
constexpr int TABLES = AFTER + 8 * (2 * MOST_STAGES + 2);
constexpr int MOST_EXPERTS = 128;
constexpr int GROUP = 8;  // tiles of rows that go down a column of tiles before the next column
constexpr int SHARES = BLOCKS > 1 ? 2 : 1;

static_assert(BLOCKS == 1 || BLOCKS == 2, "each block loads half of the rows, or all");

// How two warpgroups share the work. WIDE: each has 64 rows of a tile with 256 columns, which takes the fewest bytes of
// shared memory for a product. Otherwise tiles have 128 columns and the warpgroups take turns, so that the epilogue of
// one tile runs beside the products of the next (CUTLASS calls it "ping-pong").
template <int WIDE> struct Form {
    static constexpr int COLUMNS = WIDE ? 256 : 128, STAGES = WIDE ? 4 : 5;
    static constexpr int LEFT = ROWS * 128, STAGE = LEFT + COLUMNS * 128;  // bytes
    static constexpr int STAGING = WIDE ? CHUNK : 2 * CHUNK;              // of a warpgroup
    static_assert(STAGES * STAGE + 2 * STAGING == AFTER && STAGES <= MOST_STAGES, "");

    static __device__ Address left(int stage) { return shared_base() + stage * STAGE; }
    static __device__ Address right(int stage) { return left(stage) + LEFT; }
    static __device__ Address staging(int warpgroup) { return left(STAGES) + warpgroup * STAGING; }
};

__device__ inline Address full(int stage) { return shared_base() + AFTER + 8 * stage; }
__device__ inline Address empty(int stage) { return full(MOST_STAGES + stage); }
__device__ inline Address turn_of(int warpgroup) { return full(2 * MOST_STAGES + warpgroup); }
__device__ inline int* table(int number) { return reinterpret_cast<int*>(dynamic + TABLES) + number * (MOST_EXPERTS + 1); }

// Which stage the n-th block of the summed dimension is in, and the parity of its phase.
template <int WIDE> struct Turn {
    int stage, parity;
    __device__ explicit Turn(int n) : stage(n % Form<WIDE>::STAGES), parity(n / Form<WIDE>::STAGES % 2) {}
};

template <int WIDE> __device__ inline void create_barriers() {
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < Form<WIDE>::STAGES; ++stage) {
            barrier_create(full(stage), 1);
            barrier_create(empty(stage), WIDE ? 2 * BLOCKS : BLOCKS);
        }
        for (int warpgroup = 0; warpgroup < 2; ++warpgroup) barrier_create(turn_of(warpgroup), 1);
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
template <int WIDE> __device__ inline void begin(const int* offsets, int experts, int longest, int each) {
    create_barriers<WIDE>();
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

// One block of the summed dimension by the warpgroup. acc: of 64 rows by 128 columns each, one below the other, or WIDE
// beside each other. *_ACROSS: the operand's rows lie along the summed dimension.
template <int WIDE, int LEFT_ACROSS, int RIGHT_ACROSS>
__device__ inline void multiply_stage(float (&acc)[2][64], int stage, int add, int warpgroup) {
    constexpr int left_step = LEFT_ACROSS ? 2048 : 32, right_step = RIGHT_ACROSS ? 2048 : 32;  // of 16 summed
    const Address left = Form<WIDE>::left(stage), right = Form<WIDE>::right(stage);
#pragma unroll
    for (int k = 0; k < DEPTH / 16; ++k) {
        const unsigned long long matrix = descriptor(right + k * right_step, BOX);
        if (WIDE) {
            multiply_wide<LEFT_ACROSS, RIGHT_ACROSS>(
                acc, descriptor(left + warpgroup * BOX + k * left_step, BOX), matrix, add || k > 0);
        } else {
#pragma unroll
            for (int half = 0; half < 2; ++half)
                multiply<LEFT_ACROSS, RIGHT_ACROSS>(
                    acc[half], descriptor(left + half * BOX + k * left_step, BOX), matrix, add || k > 0);
        }
    }
}

// Hands a stage back to the blocks that load it.
__device__ inline void release(int stage) {
    if (threadIdx.x % 128 < BLOCKS) barrier_arrive(empty(stage), threadIdx.x % 128);
}

// The k-th block of a tile's summed dimension, n-th of all, added to acc; the one before is handed back.
template <int WIDE, int LEFT_ACROSS, int RIGHT_ACROSS>
__device__ inline void add_block(float (&acc)[2][64], int n, int k, int warpgroup) {
    hold(acc[0]);
    hold(acc[1]);
    products_begin();
    multiply_stage<WIDE, LEFT_ACROSS, RIGHT_ACROSS>(acc, Turn<WIDE>(n).stage, k > 0, warpgroup);
    products_issued();
    if (k > 0) {
        products_wait<1>();
        release(Turn<WIDE>(n - 1).stage);
    }
}

// After the last block, the n-th of all.
template <int WIDE> __device__ inline void finish_blocks(float (&acc)[2][64], int n) {
    products_wait<0>();
    hold(acc[0]);
    hold(acc[1]);
    release(Turn<WIDE>(n).stage);
}

// Waits until the other warpgroup has all stages of the tile before this one. Who came to a stage two phases early would
// take the phase before the last for the last.
__device__ inline void take_turn(int warpgroup, int number) {
    if (number > 0) barrier_wait(turn_of(1 - warpgroup), (number - 1) / 2 % 2);
}

__device__ inline void give_turn(int warpgroup) {
    if (threadIdx.x % 128 == 0) barrier_arrive(turn_of(warpgroup), rank_in_cluster());
}

// A thread's values of a chunk: of rows 16 · warp + lane / 4, and 8 below, in columns 8·i + 2·(lane % 4) and the next.
typedef unsigned Words[2][16];

// Into shared memory, as the tensor memory accelerator has it.
__device__ inline void stage_chunk(Address chunk, const Words& words) {
    const int lane = threadIdx.x % 32, row = threadIdx.x % 128 / 32 * 16 + lane % 16;
#pragma unroll
    for (int i = 0; i < 16; i += 2) {
        const int line = i + lane / 16;
        store_matrices(chunk + line / 8 * BOX + row * 128 + ((line % 8 ^ lane % 8) << 4),
                       words[0][i], words[1][i], words[0][i + 1], words[1][i + 1]);
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

// Before chunks are staged: what is there has been read, by threads and by stores.
__device__ inline void clear_staging(int warpgroup) {
    if (threadIdx.x % 128 == 0) stores_read();
    warpgroup_barrier(warpgroup);
}

__device__ inline void staged(int warpgroup) {
    before_async();
    warpgroup_barrier(warpgroup);
}

__device__ inline void rounded(const float (&acc)[64], Words& words) {
#pragma unroll
    for (int i = 0; i < 16; ++i)
#pragma unroll
        for (int down = 0; down < 2; ++down) words[down][i] = two_bfloats(acc[4 * i + 2 * down], acc[4 * i + 2 * down + 1]);
}

__device__ inline float low(unsigned word) { return __uint_as_float(word << 16); }
__device__ inline float high(unsigned word) { return __uint_as_float(word & 0xffff0000u); }

// A WIDE tile to its place, whose first row the tile has `rows` of.
__device__ inline void store_wide(float (&acc)[2][64], const TensorMap& map, unsigned short* to, int row, int rows,
                                  int column, int stride, int warpgroup) {
    const Address staging = Form<1>::staging(warpgroup);
    rows -= 64 * warpgroup;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        if (rows <= 0 || column + 128 * half >= stride) continue;
        Words words;
        rounded(acc[half], words);
        clear_staging(warpgroup);
        stage_chunk(staging, words);
        staged(warpgroup);
        store_chunk(staging, {map, to, row + 64 * warpgroup, column + 128 * half, stride}, rows);
    }
}

// Rows

struct Tile {
    int expert, start, rows, column;
};

// Walks the tiles of this cluster, in the same order in every thread.
struct Tiles {
    const int *offsets, *before;
    int experts, across, columns, unit, step, expert = 0;

    // across: tiles of `columns` beside each other, over the blocks of a cluster.
    __device__ Tiles(const int* offsets, int experts, int across, int columns)
        : offsets(offsets), before(table(0)), experts(experts), across(across), columns(columns),
          unit(static_cast<int>(blockIdx.x) / BLOCKS), step(static_cast<int>(gridDim.x) / BLOCKS) {}

    __device__ bool next(Tile& tile) {
        if (unit >= before[experts]) return false;
        while (unit >= before[expert + 1]) ++expert;
        const int first = start_of(offsets, expert), end = offsets[expert], tiles = (end - first + ROWS - 1) / ROWS;
        const int group = (unit - before[expert]) / (GROUP * across), within = (unit - before[expert]) % (GROUP * across);
        const int height = min(GROUP, tiles - group * GROUP);
        const int row = (group * GROUP + within % height) * ROWS;
        tile = {expert, first + row, min(ROWS, end - first - row), (within / height * BLOCKS + rank_in_cluster()) * columns};
        unit += step;
        return true;
    }
};

// Rows (N, inside) by w[e]: (outside, inside), or ACROSS (inside, outside). Boxes: rows 128 / BLOCKS by 64, w 128 by 64,
// or ACROSS 64 by 64, results 64 by 64.
struct Product {
    const TensorMap &rows_map, &w_map, &out_map, &h_map;
    const int* offsets;
    int experts, inside, outside;
    unsigned short *out, *h;
    const unsigned *z, *bias;  // in pairs
    const float* weights;
    const int* slot_of_row;
    float* partial;
};

template <int WIDE, int ACROSS> __device__ inline void load_tiles(const Product& p, Tiles tiles) {
    using F = Form<WIDE>;
    Tile tile;
    tensor_prefetch(p.rows_map);
    tensor_prefetch(p.w_map);
    const int share = ROWS / SHARES * rank_in_cluster();
    for (int n = 0; tiles.next(tile);)
        for (int k = 0; k < p.inside; k += DEPTH, ++n) {
            const Turn<WIDE> turn(n);
            barrier_wait(empty(turn.stage), turn.parity ^ 1);
            barrier_expect(full(turn.stage), F::STAGE);
            tensor_load_all(p.rows_map, F::left(turn.stage) + share * 128, k, tile.start + share, full(turn.stage));
            if (ACROSS) {
                for (int i = 0; i < F::COLUMNS / 64; ++i)
                    tensor_load(p.w_map, F::right(turn.stage) + i * BOX, tile.column + 64 * i, tile.expert * p.inside + k,
                                full(turn.stage));
            } else {
                for (int i = 0; i < F::COLUMNS / 128; ++i)
                    tensor_load(p.w_map, F::right(turn.stage) + i * 2 * BOX, k,
                                tile.expert * p.outside + tile.column + 128 * i, full(turn.stage));
            }
        }
}

// out (N, outside) = the products. outside is a multiple of 128, and of 512 where blocks are two.
template <int ACROSS> __device__ inline void plain_product(const Product& p) {
    const int across = (p.outside + 255) / 256 / BLOCKS, warpgroup = static_cast<int>(threadIdx.x) / 128 - 1;
    begin<1>(p.offsets, p.experts, ROWS, across);
    Tiles tiles(p.offsets, p.experts, across, 256);
    if (warpgroup < 0) {
        fewer_registers<40>();
        if (threadIdx.x == 0) load_tiles<1, ACROSS>(p, tiles);
    } else {
        more_registers<232>();
        Tile tile;
        for (int n = 0; tiles.next(tile);) {
            float acc[2][64];
            for (int k = 0; k < p.inside / DEPTH; ++k, ++n) {
                const Turn<1> turn(n);
                barrier_wait(full(turn.stage), turn.parity);
                add_block<1, 0, ACROSS>(acc, n, k, warpgroup);
            }
            finish_blocks<1>(acc, n - 1);
            store_wide(acc, p.out_map, p.out, tile.start, tile.rows, tile.column, p.outside, warpgroup);
        }
    }
    end();
}

extern "C" __global__ void CLUSTER __launch_bounds__(384, 1)
down(MAP rows_map, MAP w_map, MAP out_map, const int* offsets, long long experts, long long inside, long long outside,
     unsigned short* out) {
    plain_product<0>({rows_map, w_map, out_map, out_map, offsets, static_cast<int>(experts), static_cast<int>(inside),
                      static_cast<int>(outside), out});
}

extern "C" __global__ void CLUSTER __launch_bounds__(384, 1)
back(MAP rows_map, MAP w_map, MAP out_map, const int* offsets, long long experts, long long inside, long long outside,
     unsigned short* out) {
    plain_product<1>({rows_map, w_map, out_map, out_map, offsets, static_cast<int>(experts), static_cast<int>(inside),
                      static_cast<int>(outside), out});
}

// What an epilogue reads, fetched while the products run.
struct Fetched {
    unsigned bias[16];
    unsigned z[2][2][16];  // by half, down, i
    float weight[2][2];
};

template <int SLOPE> __device__ inline void fetch(const Product& p, const Tile& tile, Fetched& fetched) {
    const int lane = threadIdx.x % 32, pair = lane % 4, first_row = threadIdx.x % 128 / 32 * 16 + lane / 4;
    if (!SLOPE) {
#pragma unroll
        for (int i = 0; i < 16; ++i)
            fetched.bias[i] =
                p.bias ? p.bias[(tile.expert * static_cast<long long>(p.outside) + tile.column) / 2 + pair + 4 * i] : 0;
    }
    if (SLOPE) {
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int down = 0; down < 2; ++down) {
                const int row = tile.start + min(64 * half + first_row + 8 * down, tile.rows - 1);
                const unsigned* z = p.z + (row * static_cast<long long>(p.outside) + tile.column) / 2 + pair;
#pragma unroll
                for (int i = 0; i < 16; ++i) fetched.z[half][down][i] = z[4 * i];
                fetched.weight[half][down] = p.weights[p.slot_of_row[row]];
            }
    }
}

// With the curve: out = z and h = act(z) of z = product + bias; or, SLOPE, the product being dL/dh of an unweighted row,
// out = weight · dL/dh · act'(z), h = weight · act(z), partial[row, tile of columns] = Σ dL/dh · act(z).
template <int SLOPE>
__device__ inline void finish(float (&acc)[2][64], const Tile& tile, const Product& p, const Fetched& fetched, int warpgroup) {
    const int lane = threadIdx.x % 32, first_row = threadIdx.x % 128 / 32 * 16 + lane / 4;
    const Address staging = Form<0>::staging(warpgroup);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int rows = tile.rows - 64 * half, row = tile.start + 64 * half;
        if (rows <= 0) break;
        Words first, second;
#pragma unroll
        for (int down = 0; down < 2; ++down) {
            float sum = 0;
#pragma unroll
            for (int i = 0; i < 16; ++i) {
                const float one = acc[half][4 * i + 2 * down], other = acc[half][4 * i + 2 * down + 1];
                if (SLOPE) {
                    const unsigned z = fetched.z[half][down][i];
                    const float weight = fetched.weight[half][down];
                    const Curve a = curve(low(z)), b = curve(high(z));
                    sum += one * a.height + other * b.height;
                    first[down][i] = two_bfloats(weight * one * a.slope, weight * other * b.slope);
                    second[down][i] = two_bfloats(weight * a.height, weight * b.height);
                } else {
                    const unsigned z = two_bfloats(one + low(fetched.bias[i]), other + high(fetched.bias[i]));
                    first[down][i] = z;
                    // The activation is of what is stored: the backward pass sees no other.
                    second[down][i] = two_bfloats(curve(low(z)).height, curve(high(z)).height);
                }
            }
            if (SLOPE) {
                sum += __shfl_xor_sync(ALL, sum, 1);
                sum += __shfl_xor_sync(ALL, sum, 2);
                if (lane % 4 == 0 && first_row + 8 * down < rows)
                    p.partial[static_cast<long long>(row + first_row + 8 * down) * (p.outside / 128) + tile.column / 128] = sum;
            }
        }
        clear_staging(warpgroup);
        stage_chunk(staging, first);
        stage_chunk(staging + CHUNK, second);
        staged(warpgroup);
        store_chunk(staging, {p.out_map, p.out, row, tile.column, p.outside}, rows);
        store_chunk(staging + CHUNK, {p.h_map, p.h, row, tile.column, p.outside}, rows);
    }
}

// outside is a multiple of 128, and of 256 where blocks are two.
template <int SLOPE> __device__ inline void curved_product(const Product& p) {
    const int across = p.outside / 128 / BLOCKS, warpgroup = static_cast<int>(threadIdx.x) / 128 - 1;
    begin<0>(p.offsets, p.experts, ROWS, across);
    Tiles tiles(p.offsets, p.experts, across, 128);
    if (warpgroup < 0) {
        fewer_registers<40>();
        if (threadIdx.x == 0) load_tiles<0, SLOPE>(p, tiles);
    } else {
        more_registers<232>();
        const int blocks = p.inside / DEPTH;
        Tile tile;
        for (int number = 0; tiles.next(tile); ++number) {
            if (number % 2 != warpgroup) continue;
            Fetched fetched;
            fetch<SLOPE>(p, tile, fetched);
            float acc[2][64];
            take_turn(warpgroup, number);
            for (int k = 0, n = number * blocks; k < blocks; ++k, ++n) {
                const Turn<0> turn(n);
                barrier_wait(full(turn.stage), turn.parity);
                if (k == blocks - 1) give_turn(warpgroup);
                add_block<0, 0, SLOPE>(acc, n, k, warpgroup);
            }
            finish_blocks<0>(acc, number * blocks + blocks - 1);
            finish<SLOPE>(acc, tile, p, fetched, warpgroup);
        }
    }
    end();
}

extern "C" __global__ void CLUSTER __launch_bounds__(384, 1)
up(MAP rows_map, MAP w_map, MAP out_map, MAP h_map, const int* offsets, long long experts, long long inside,
   long long outside, unsigned short* out, unsigned short* h, const unsigned* bias) {
    curved_product<0>({rows_map, w_map, out_map, h_map, offsets, static_cast<int>(experts), static_cast<int>(inside),
                       static_cast<int>(outside), out, h, nullptr, bias});
}

extern "C" __global__ void CLUSTER __launch_bounds__(384, 1)
slope(MAP rows_map, MAP w_map, MAP out_map, MAP h_map, const int* offsets, long long experts, long long inside,
      long long outside, unsigned short* out, unsigned short* h, const unsigned* z, const float* weights,
      const int* slot_of_row, float* partial) {
    curved_product<1>({rows_map, w_map, out_map, h_map, offsets, static_cast<int>(experts), static_cast<int>(inside),
                       static_cast<int>(outside), out, h, z, nullptr, weights, slot_of_row, partial});
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
                tile % high * ROWS, (tile / high * BLOCKS + rank_in_cluster()) * 256};
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
    using F = Form<1>;
    const int experts = static_cast<int>(experts_), outside = static_cast<int>(outside_);
    const int inside = static_cast<int>(inside_), longest = static_cast<int>(longest_);
    const int high = outside / ROWS, across = (inside + 255) / 256 / BLOCKS;
    begin<1>(offsets, experts, longest, high * across);
    const int warpgroup = static_cast<int>(threadIdx.x) / 128 - 1;
    Parts work(offsets, experts, high, across, longest);
    Part part;
    if (warpgroup < 0) {
        fewer_registers<40>();
        if (threadIdx.x == 0) {
            tensor_prefetch(y_map);
            tensor_prefetch(x_map);
            for (int n = 0; work.next(part);)
                for (int k = 0; k < part.rows; k += DEPTH, ++n) {
                    const Turn<1> turn(n);
                    barrier_wait(empty(turn.stage), turn.parity ^ 1);
                    barrier_expect(full(turn.stage), F::STAGE);
                    for (int i = 0; i < 2; ++i)
                        if (BLOCKS == 1 || i == rank_in_cluster())
                            tensor_load_all(y_map, F::left(turn.stage) + i * BOX, part.left + 64 * i, part.start + k,
                                            full(turn.stage));
                    for (int i = 0; i < 4; ++i)
                        tensor_load(x_map, F::right(turn.stage) + i * BOX, part.right + 64 * i, part.start + k,
                                    full(turn.stage));
                }
        }
    } else {
        more_registers<232>();
        for (int n = 0; work.next(part);) {
            float acc[2][64];
            for (int k = 0; k * DEPTH < part.rows; ++k, ++n) {
                const Turn<1> turn(n);
                barrier_wait(full(turn.stage), turn.parity);
                if (const int rows = part.rows - k * DEPTH; rows < DEPTH) {
                    for (int i = threadIdx.x - 128; i < (DEPTH - rows) * 48; i += 256)
                        clear_line(F::left(turn.stage) + i % 6 * BOX + (rows + i / 48) * 128 + i / 6 % 8 * 16);
                    before_async();
                    consumers_barrier();
                }
                add_block<1, 1, 1>(acc, n, k, warpgroup);
            }
            finish_blocks<1>(acc, n - 1);
            if (part.number < 0) {
                store_wide(acc, dw_map, dw, part.expert * outside + part.left, ROWS, part.right, inside, warpgroup);
            } else {
                const int lane = threadIdx.x % 32, row = part.left + 64 * warpgroup + threadIdx.x % 128 / 32 * 16 + lane / 4;
                float* to = parts + (part.number * static_cast<long long>(outside) + row) * inside + part.right + 2 * (lane % 4);
#pragma unroll
                for (int half = 0; half < 2; ++half)
                    if (part.right + 128 * half < inside)
#pragma unroll
                        for (int down = 0; down < 2; ++down)
#pragma unroll
                            for (int i = 0; i < 16; ++i)
                                *reinterpret_cast<float2*>(to + 8ll * down * inside + 128 * half + 8 * i) =
                                    make_float2(acc[half][4 * i + 2 * down], acc[half][4 * i + 2 * down + 1]);
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
