// Products of rows that are sorted by expert, bf16, on Hopper's tensor cores: persistent, one warpgroup that loads and
// two that multiply in turns, so that the epilogue of one tile runs beside the products of the next ("ping-pong" of
// CUTLASS). The blocks of a cluster have the same rows and neighbouring columns: each loads its share of the rows for
// all of them.
//
// Compiled with BLOCKS, those of a cluster, and ACTIVATION (curve.cuh).

constexpr int ROWS = 128, COLUMNS = 128, DEPTH = 64;  // of a tile, and of the summed dimension at once
constexpr int STAGES = 5;
constexpr int BOX = 64 * 128, OPERAND = 2 * BOX, STAGE = 2 * OPERAND;  // bytes; a box has 64 rows of 128
constexpr int TILE = ROWS * COLUMNS * 2, HALF = TILE / 2;             // bytes of a tile in bf16, of 64 of its columns
constexpr int AFTER = STAGES * STAGE + 2 * TILE;                      // where the barriers stand
constexpr int TABLES = AFTER + 8 * (2 * STAGES + 4);
constexpr int MOST_EXPERTS = 128;
constexpr int GROUP = 8;  // tiles of rows that go down a column of tiles before the next column
constexpr int SHARES = BLOCKS > 1 ? 2 : 1;

static_assert(BLOCKS == 1 || BLOCKS == 2, "each block loads half of the rows, or all");

__device__ inline Address full(int stage) { return shared_base() + AFTER + 8 * stage; }
__device__ inline Address empty(int stage) { return full(STAGES + stage); }
__device__ inline Address input(int warpgroup) { return full(2 * STAGES + warpgroup); }
__device__ inline Address turn_of(int warpgroup) { return input(2 + warpgroup); }
__device__ inline Address rows_of(int stage) { return shared_base() + stage * STAGE; }
__device__ inline Address matrix_of(int stage) { return rows_of(stage) + OPERAND; }
__device__ inline Address staging(int warpgroup) { return shared_base() + STAGES * STAGE + warpgroup * TILE; }
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
            barrier_create(empty(stage), BLOCKS);
        }
        for (int warpgroup = 0; warpgroup < 2; ++warpgroup) {
            barrier_create(input(warpgroup), 1);
            barrier_create(turn_of(warpgroup), 1);
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

// No block ends while another still writes to it.
__device__ inline void end() {
    cluster_arrive();
    cluster_wait();
}

// One block of the summed dimension by the warpgroup: acc (128 rows in two halves, 128 columns).
template <int ROWS_ACROSS, int MATRIX_ACROSS> __device__ inline void multiply_stage(float (&acc)[2][64], int stage, int add) {
    constexpr int row_step = ROWS_ACROSS ? 2048 : 32, matrix_step = MATRIX_ACROSS ? 2048 : 32;  // of 16 summed
#pragma unroll
    for (int k = 0; k < DEPTH / 16; ++k)
#pragma unroll
        for (int half = 0; half < 2; ++half)
            multiply<ROWS_ACROSS, MATRIX_ACROSS>(
                acc[half], descriptor(rows_of(stage) + half * BOX + k * row_step, BOX),
                descriptor(matrix_of(stage) + k * matrix_step, BOX), add || k > 0);
}

// Waits until the other warpgroup has all stages of the tile before this one. Who came to a stage two phases early would
// take the phase before the last for the last.
__device__ inline void take_turn(int warpgroup, int number) {
    if (number > 0) barrier_wait(turn_of(1 - warpgroup), (number - 1) / 2 % 2);
}

__device__ inline void give_turn(int warpgroup) {
    if (threadIdx.x % 128 == 0) barrier_arrive(turn_of(warpgroup), rank_in_cluster());
}

// Hands a stage back to the blocks that load it.
__device__ inline void release(int stage) {
    if (threadIdx.x % 128 < BLOCKS) barrier_arrive(empty(stage), threadIdx.x % 128);
}

// Where the thread's values of columns 8·i + 2·(lane % 4) and the next stand in a staged tile.
__device__ inline Address place_of(Address tile, int row, int i) {
    return tile + i / 8 * HALF + row * 128 + ((i % 8 ^ row & 7) << 4) + threadIdx.x % 4 * 4;
}

// A staged tile to `to`, whose rows are `stride` elements long; only the first `rows`. Warpgroup's threads together.
__device__ inline void store_tile(Address tile, unsigned short* to, long long stride, int rows) {
    const int line = threadIdx.x % 16;
#pragma unroll
    for (int j = 0; j < 16; ++j) {
        const int row = threadIdx.x % 128 / 16 + 8 * j;
        if (row < rows)
            store_line(to + row * stride + 8 * line,
                       load_line(tile + line / 8 * HALF + row * 128 + ((line % 8 ^ row & 7) << 4)));
    }
}

__device__ inline float low(unsigned word) { return __uint_as_float(word << 16); }
__device__ inline float high(unsigned word) { return __uint_as_float(word & 0xffff0000u); }

// Rows

struct Tile {
    int expert, start, rows, column;
};

// Walks the tiles of this cluster, in the same order in every thread.
struct Tiles {
    const int *offsets, *before;
    int experts, across, unit, step, expert = 0;

    __device__ Tiles(const int* offsets, int experts, int columns)
        : offsets(offsets), before(table(0)), experts(experts), across(columns / BLOCKS),
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

enum Epilogue { PLAIN, ACT, SLOPE };

struct Outputs {
    unsigned short *out, *h;
    const unsigned short* bias;
    const float* weights;
    const int* slot_of_row;
    float* partial;
    int outside;
};

template <int EPILOGUE>
__device__ inline void finish(float (&acc)[2][64], const Tile& tile, const Outputs& to, int warpgroup) {
    const int lane = threadIdx.x % 32, first_row = threadIdx.x % 128 / 32 * 16 + lane / 4;
    const long long spot = static_cast<long long>(tile.start) * to.outside + tile.column;
    const Address staged = staging(warpgroup);
    unsigned second[2][2][16];  // what is stored after the first tile
    if (EPILOGUE != SLOPE && to.bias) {
        const unsigned* bias = reinterpret_cast<const unsigned*>(
            to.bias + static_cast<long long>(tile.expert) * to.outside + tile.column + 2 * (lane % 4));
#pragma unroll
        for (int i = 0; i < 16; ++i) {
            const unsigned pair = bias[4 * i];
#pragma unroll
            for (int half = 0; half < 2; ++half)
#pragma unroll
                for (int down = 0; down < 2; ++down) {
                    acc[half][4 * i + 2 * down] += low(pair);
                    acc[half][4 * i + 2 * down + 1] += high(pair);
                }
        }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int down = 0; down < 2; ++down) {
            const int row = 64 * half + first_row + 8 * down;
            float weight = 0, sum = 0;
            if (EPILOGUE == SLOPE && row < tile.rows) weight = to.weights[to.slot_of_row[tile.start + row]];
#pragma unroll
            for (int i = 0; i < 16; ++i) {
                const float one = acc[half][4 * i + 2 * down], other = acc[half][4 * i + 2 * down + 1];
                const Address at = place_of(staged, row, i);
                if (EPILOGUE == SLOPE) {
                    const unsigned z = load_word(at);
                    const Curve a = curve(low(z)), b = curve(high(z));
                    sum += one * a.height + other * b.height;
                    store_word(at, two_bfloats(weight * one * a.slope, weight * other * b.slope));
                    second[half][down][i] = two_bfloats(weight * a.height, weight * b.height);
                } else {
                    const unsigned z = two_bfloats(one, other);
                    store_word(at, z);
                    // The activation is of what is stored: the backward pass sees no other.
                    if (EPILOGUE == ACT)
                        second[half][down][i] = two_bfloats(curve(low(z)).height, curve(high(z)).height);
                }
            }
            if (EPILOGUE == SLOPE) {
                sum += __shfl_xor_sync(ALL, sum, 1);
                sum += __shfl_xor_sync(ALL, sum, 2);
                if (lane % 4 == 0 && row < tile.rows)
                    to.partial[static_cast<long long>(tile.start + row) * (to.outside / COLUMNS) + tile.column / COLUMNS] = sum;
            }
        }
    warpgroup_barrier(warpgroup);
    store_tile(staged, to.out + spot, to.outside, tile.rows);
    warpgroup_barrier(warpgroup);
    if (EPILOGUE != PLAIN) {
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int down = 0; down < 2; ++down)
#pragma unroll
                for (int i = 0; i < 16; ++i)
                    store_word(place_of(staged, 64 * half + first_row + 8 * down, i), second[half][down][i]);
        warpgroup_barrier(warpgroup);
        store_tile(staged, to.h + spot, to.outside, tile.rows);
        warpgroup_barrier(warpgroup);
    }
}

// Rows (N, inside) by w[e]: (outside, inside), or ACROSS (inside, outside) → out (N, outside).
//
// PLAIN: out = product + bias. ACT: the same is z, and h = act(z). SLOPE: the product is dL/dh of an unweighted row, z
// comes by z_map; out = weight · dL/dh · act'(z), h = weight · act(z), partial[row, tile of columns] = Σ dL/dh · act(z).
// inside is a multiple of DEPTH, outside of BLOCKS · COLUMNS. Boxes: rows 128 / BLOCKS by 64, z 128 by 64, w 128 by 64,
// or ACROSS 64 by 64.
template <int EPILOGUE, int ACROSS>
__device__ inline void product(const TensorMap& rows_map, const TensorMap& w_map, const TensorMap& z_map,
                               const int* offsets, int experts, int inside, const Outputs& to) {
    begin(offsets, experts, ROWS, to.outside / (BLOCKS * COLUMNS));
    const int blocks = inside / DEPTH, warpgroup = static_cast<int>(threadIdx.x) / 128 - 1;
    Tiles tiles(offsets, experts, to.outside / COLUMNS);
    Tile tile;
    if (warpgroup < 0) {
        fewer_registers<40>();
        if (threadIdx.x == 0) {
            tensor_prefetch(rows_map);
            tensor_prefetch(w_map);
            const int share = ROWS / SHARES * rank_in_cluster();
            for (int n = 0; tiles.next(tile);)
                for (int k = 0; k < inside; k += DEPTH, ++n) {
                    const Turn turn(n);
                    barrier_wait(empty(turn.stage), turn.parity ^ 1);
                    barrier_expect(full(turn.stage), STAGE);
                    tensor_load_all(rows_map, rows_of(turn.stage) + share * 128, k, tile.start + share, full(turn.stage));
                    if (ACROSS) {
                        for (int right = 0; right < 2; ++right)
                            tensor_load(w_map, matrix_of(turn.stage) + right * BOX, tile.column + 64 * right,
                                        tile.expert * inside + k, full(turn.stage));
                    } else {
                        tensor_load(w_map, matrix_of(turn.stage), k, tile.expert * to.outside + tile.column, full(turn.stage));
                    }
                }
        }
    } else {
        more_registers<232>();
        for (int number = 0; tiles.next(tile); ++number) {
            if (number % 2 != warpgroup) continue;
            if (EPILOGUE == SLOPE) {  // z into the staged tile, which all threads have read
                before_async();
                warpgroup_barrier(warpgroup);
                if (threadIdx.x % 128 == 0) {
                    barrier_expect(input(warpgroup), TILE);
                    for (int right = 0; right < 2; ++right)
                        tensor_load(z_map, staging(warpgroup) + right * HALF, tile.column + 64 * right, tile.start,
                                    input(warpgroup));
                }
            }
            float acc[2][64];
            take_turn(warpgroup, number);
            for (int k = 0, n = number * blocks; k < blocks; ++k, ++n) {
                const Turn turn(n);
                barrier_wait(full(turn.stage), turn.parity);
                if (k == blocks - 1) give_turn(warpgroup);
                hold(acc[0]);
                hold(acc[1]);
                products_begin();
                multiply_stage<0, ACROSS>(acc, turn.stage, k > 0);
                products_issued();
                if (k > 0) {
                    products_wait<1>();
                    release(Turn(n - 1).stage);
                }
            }
            products_wait<0>();
            hold(acc[0]);
            hold(acc[1]);
            release(Turn(number * blocks + blocks - 1).stage);
            if (EPILOGUE == SLOPE) barrier_wait(input(warpgroup), number / 2 % 2);
            finish<EPILOGUE>(acc, tile, to, warpgroup);
        }
    }
    end();
}

#define PRODUCT(NAME, EPILOGUE, ACROSS)                                                                              \
    extern "C" __global__ void CLUSTER __launch_bounds__(384, 1)                                                     \
    NAME(MAP rows_map, MAP w_map, MAP z_map, const int* offsets, long long experts, long long inside,               \
         long long outside, unsigned short* out, unsigned short* h, const unsigned short* bias,                     \
         const float* weights, const int* slot_of_row, float* partial) {                                            \
        product<EPILOGUE, ACROSS>(                                                                                   \
            rows_map, w_map, z_map, offsets, static_cast<int>(experts), static_cast<int>(inside),                   \
            {out, h, bias, weights, slot_of_row, partial, static_cast<int>(outside)});                              \
    }

PRODUCT(up, ACT, 0)
PRODUCT(down, PLAIN, 0)
PRODUCT(slope, SLOPE, 1)
PRODUCT(back, PLAIN, 1)

// Sums over rows

struct Part {
    int expert, start, rows, number, left, right;
};

struct Parts {
    const int *offsets, *before, *several;
    int experts, high, across, longest, unit, step, expert = 0;

    __device__ Parts(const int* offsets, int experts, int outside, int inside, int longest)
        : offsets(offsets), before(table(0)), several(table(1)), experts(experts), high(outside / ROWS),
          across(inside / (BLOCKS * COLUMNS)), longest(longest), unit(static_cast<int>(blockIdx.x) / BLOCKS),
          step(static_cast<int>(gridDim.x) / BLOCKS) {}

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
// they are cleared in shared memory. Boxes: 64 by 64. outside is a multiple of 128, inside of BLOCKS · 128.
extern "C" __global__ void CLUSTER __launch_bounds__(384, 1)
weight_gradient(MAP y_map, MAP x_map, const int* offsets, long long experts_, long long outside_, long long inside_,
                long long longest_, unsigned short* dw, float* parts) {
    const int experts = static_cast<int>(experts_), outside = static_cast<int>(outside_);
    const int inside = static_cast<int>(inside_), longest = static_cast<int>(longest_);
    begin(offsets, experts, longest, outside / ROWS * (inside / (BLOCKS * COLUMNS)));
    const int warpgroup = static_cast<int>(threadIdx.x) / 128 - 1;
    Parts work(offsets, experts, outside, inside, longest);
    Part part;
    if (warpgroup < 0) {
        fewer_registers<40>();
        if (threadIdx.x == 0) {
            tensor_prefetch(y_map);
            tensor_prefetch(x_map);
            for (int n = 0; work.next(part);)
                for (int k = 0; k < part.rows; k += DEPTH, ++n) {
                    const Turn turn(n);
                    barrier_wait(empty(turn.stage), turn.parity ^ 1);
                    barrier_expect(full(turn.stage), STAGE);
                    for (int half = 0; half < 2; ++half) {
                        if (BLOCKS == 1 || half == rank_in_cluster())
                            tensor_load_all(y_map, rows_of(turn.stage) + half * BOX, part.left + 64 * half,
                                            part.start + k, full(turn.stage));
                        tensor_load(x_map, matrix_of(turn.stage) + half * BOX, part.right + 64 * half, part.start + k,
                                    full(turn.stage));
                    }
                }
        }
    } else {
        more_registers<232>();
        for (int number = 0, n = 0; work.next(part); ++number) {
            const int blocks = (part.rows + DEPTH - 1) / DEPTH;
            if (number % 2 != warpgroup) {
                n += blocks;
                continue;
            }
            float acc[2][64];
            take_turn(warpgroup, number);
            for (int k = 0; k < blocks; ++k, ++n) {
                const Turn turn(n);
                barrier_wait(full(turn.stage), turn.parity);
                if (k == blocks - 1) give_turn(warpgroup);
                if (const int rows = part.rows - k * DEPTH; rows < DEPTH) {
                    for (int i = threadIdx.x % 128; i < (DEPTH - rows) * 32; i += 128)
                        clear_line(rows_of(turn.stage) + i % 4 * BOX + (rows + i / 32) * 128 + i / 4 % 8 * 16);
                    before_async();
                    warpgroup_barrier(warpgroup);
                }
                hold(acc[0]);
                hold(acc[1]);
                products_begin();
                multiply_stage<1, 1>(acc, turn.stage, k > 0);
                products_issued();
                if (k > 0) {
                    products_wait<1>();
                    release(Turn(n - 1).stage);
                }
            }
            products_wait<0>();
            hold(acc[0]);
            hold(acc[1]);
            release(Turn(n - 1).stage);
            const long long size = static_cast<long long>(outside) * inside, spot = static_cast<long long>(part.left) * inside + part.right;
            if (part.number < 0) {
                const Tile tile = {0, part.left, ROWS, part.right};
                finish<PLAIN>(acc, tile, {dw + part.expert * size, nullptr, nullptr, nullptr, nullptr, nullptr, inside}, warpgroup);
            } else {
                const int lane = threadIdx.x % 32, row = threadIdx.x % 128 / 32 * 16 + lane / 4;
                float* to = parts + part.number * size + spot + static_cast<long long>(row) * inside + 2 * (lane % 4);
#pragma unroll
                for (int half = 0; half < 2; ++half)
#pragma unroll
                    for (int down = 0; down < 2; ++down)
#pragma unroll
                        for (int i = 0; i < 16; ++i)
                            *reinterpret_cast<float2*>(to + (64 * half + 8 * down) * static_cast<long long>(inside) + 8 * i) =
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
