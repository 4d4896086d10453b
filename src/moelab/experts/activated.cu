// The two products of rows beside which the hidden layer is activated, bf16, on Hopper's tensor cores, in tiles as tiles.cuh
// has them.
//
// Blocks are persistent. Warpgroups 0 and 1 multiply, and a thread of the second loads; warpgroup 2 activates: the others
// hand it their half of a tile through shared memory, rounded, and go on with the next tile. So what an activation costs, in
// instructions and in memory, runs beside the tensor cores. A warp has a row at a time, a lane the same 8 columns of each.
//
// Compiled with BLOCKS, those of a cluster, with 3 STAGES, and with ACTIVATION (curve.cuh), any but SWIGLU.

constexpr int RESULT = 2 * CHUNK;                // bytes of a multiplying warpgroup's half of a tile
constexpr int SUMS = STAGING + 2 * RESULT;       // of columns, of each warp that activates
constexpr int WARPS = 4, AT_ONCE = 4;            // that activate, and rows that each has at once
static_assert(SUMS + WARPS * COLUMNS * 4 <= BARRIERS, "");

__device__ inline Address result(int half) { return shared_base() + STAGING + half * RESULT; }
__device__ inline Address handed_over(int half) { return empty(STAGES + half); }
__device__ inline Address taken(int half) { return empty(STAGES + 2 + half); }

using Number = unsigned short;  // bf16
using Values = float[8];        // of a line of 16 bytes

__device__ inline void widen(const uint4& line, Values& value) {
    const unsigned word[4] = {line.x, line.y, line.z, line.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        value[2 * i] = __uint_as_float(word[i] << 16);
        value[2 * i + 1] = __uint_as_float(word[i] & 0xffff0000u);
    }
}

__device__ inline uint4 narrow(const Values& value) {
    return make_uint4(two_bfloats(value[0], value[1]), two_bfloats(value[2], value[3]), two_bfloats(value[4], value[5]),
                      two_bfloats(value[6], value[7]));
}

// What a product is made of, and what is made beside it: `up` z and h; `slope` d_z, h, partial and sums out of z and weights.
struct Given {
    const int* offsets;
    int experts, inside, outside;
    const Number* bias;  // (E, outside), or 0
    Number *z, *h, *d_z;
    const float* weights;
    const int* slot_of_row;
    float *partial, *sums;
};

// What a warp knows of the rows of a tile that it activates: row 4·i + warp of the tile is its i-th.
template <int SLOPE> struct Rows {
    const Given& given;
    const Tile& tile;
    const int warp, lane, column;
    const bool inside;
    Values bias = {}, sum = {};
    float weight = 0.0f;  // of the lane-th row

    __device__ Rows(const Given& given, const Tile& tile)
        : given(given), tile(tile), warp(threadIdx.x % 128 / 32), lane(threadIdx.x % 32), column(tile.column + 8 * lane),
          inside(column < given.outside) {
        if (given.bias && inside)
            widen(*reinterpret_cast<const uint4*>(given.bias + tile.expert * static_cast<long long>(given.outside) + column), bias);
        if (SLOPE && WARPS * lane + warp < tile.rows)
            weight = given.weights[given.slot_of_row[tile.start + WARPS * lane + warp]];
    }

    __device__ long long place(int row) const { return (tile.start + row) * static_cast<long long>(given.outside) + column; }

    // z of COUNT rows from the i-th on.
    template <int COUNT> __device__ void fetch(int i, uint4 (&z)[COUNT]) const {
#pragma unroll
        for (int j = 0; j < COUNT; ++j)
            if (inside) z[j] = load_once(given.z + place(WARPS * (i + j) + warp));
    }

    // COUNT rows from the i-th on.
    template <int COUNT> __device__ void activate(int i, const uint4 (&z)[COUNT]) {
        float product[COUNT] = {};
        uint4 line[COUNT];
#pragma unroll
        for (int j = 0; j < COUNT; ++j) {
            const int row = WARPS * (i + j) + warp;
            line[j] = load_line(result(row / 64) + lane / 8 * BOX + row % 64 * 128 + ((lane % 8 ^ row % 8) << 4));
        }
#pragma unroll
        for (int j = 0; j < COUNT; ++j) {
            const long long at = place(WARPS * (i + j) + warp);
            const float of_row = SLOPE ? __shfl_sync(ALL, weight, i + j) : 1.0f;
            if (!inside) continue;
            Values x, y;
            widen(line[j], x);
            if (SLOPE) {
                widen(z[j], y);
#pragma unroll
                for (int k = 0; k < 8; ++k) {
                    const Curve at_z = curve(y[k] + bias[k]);
                    product[j] += x[k] * at_z.height;
                    x[k] *= of_row * at_z.slope;
                    y[k] = of_row * at_z.height;
                    sum[k] += x[k];
                }
                store_line(given.d_z + at, narrow(x));
            } else {
#pragma unroll
                for (int k = 0; k < 8; ++k) y[k] = curve(x[k] + bias[k]).height;
                store_line(given.z + at, line[j]);
            }
            store_line(given.h + at, narrow(y));
        }
        if (SLOPE) store_products(i, product);
    }

    // Each row's sum over the lanes, to partial (N, tiles across).
    __device__ void store_products(int i, float (&product)[AT_ONCE]) const {
        const bool high = lane & 16, middle = lane & 8;
        float pair[2];
#pragma unroll
        for (int j = 0; j < 2; ++j)  // of row j + 2 in the upper half of the warp
            pair[j] = (high ? product[j + 2] : product[j]) + __shfl_xor_sync(ALL, high ? product[j] : product[j + 2], 16);
        float own = (middle ? pair[1] : pair[0]) + __shfl_xor_sync(ALL, middle ? pair[0] : pair[1], 8);
        for (int step = 4; step > 0; step /= 2) own += __shfl_xor_sync(ALL, own, step);
        if (lane % 8 == 0) store_product(i + 2 * high + middle, own);
    }
    __device__ void store_products(int i, float (&product)[1]) const {
        for (int step = 16; step > 0; step /= 2) product[0] += __shfl_xor_sync(ALL, product[0], step);
        if (lane == 0) store_product(i, product[0]);
    }
    __device__ void store_product(int i, float product) const {
        const int across = (given.outside + COLUMNS - 1) / COLUMNS;
        given.partial[(tile.start + WARPS * i + warp) * static_cast<long long>(across) + tile.column / COLUMNS] = product;
    }

    // All of a tile's rows, as its halves are handed over; `number`: of the block's tiles.
    __device__ void activate_all(int number) {
        const int most = max(0, (tile.rows - warp + WARPS - 1) / WARPS);  // rows of this warp
        uint4 z[AT_ONCE], one[1];
        if (SLOPE && most >= AT_ONCE) fetch(0, z);
        for (int half = 0; half < 2; ++half) {
            const int end = min(most, 16 * (half + 1));
            barrier_wait(handed_over(half), number % 2);
            int i = 16 * half;
            for (; i + AT_ONCE <= end; i += AT_ONCE) {
                uint4 now[AT_ONCE];
                for (int j = 0; j < AT_ONCE; ++j) now[j] = z[j];
                if (SLOPE && i + 2 * AT_ONCE <= most) fetch(i + AT_ONCE, z);
                activate(i, now);
            }
            for (; i < end; ++i) {
                if (SLOPE) fetch(i, one);
                activate(i, one);
            }
            __syncwarp();
            if (lane == 0) barrier_arrive(taken(half));
        }
    }

    // Sums of the columns over the tile's rows, in the order of the warps, to a row of sums (parts, outside).
    __device__ void store_sums(float* of_warps, long long part) const {
#pragma unroll
        for (int k = 0; k < 8; ++k) of_warps[warp * COLUMNS + 8 * lane + k] = sum[k];
        warpgroup_barrier();
        for (int at = threadIdx.x % 128; at < COLUMNS; at += 128) {
            float total = 0.0f;
#pragma unroll
            for (int w = 0; w < WARPS; ++w) total += of_warps[w * COLUMNS + at];
            if (tile.column + at < given.outside) given.sums[part * given.outside + tile.column + at] = total;
        }
        warpgroup_barrier();
    }
};

template <int SLOPE> __device__ inline void activate_tiles(const Given& given, Tiles tiles) {
    Tile tile;
    for (int number = 0; tiles.next(tile); ++number) {
        Rows<SLOPE> rows(given, tile);
        rows.activate_all(number);
        if (SLOPE && given.sums && tile.rows > 0)
            rows.store_sums(reinterpret_cast<float*>(dynamic + SUMS), table(1)[tile.expert] + tile.number);
    }
}

template <int SLOPE>
__device__ inline void activated(const TensorMap& rows_map, const TensorMap& w_map, const TensorMap& z_map, const Given& given) {
    const int across = (given.outside + COLUMNS - 1) / COLUMNS, role = static_cast<int>(threadIdx.x) / 128;
    if (threadIdx.x == 0)
        for (int half = 0; half < 2; ++half) {
            barrier_create(handed_over(half), 4);
            barrier_create(taken(half), WARPS);
        }
    begin(given.offsets, given.experts, [=](int, int rows) { return Tiles::tall(rows) * across; },
          [](int, int rows) { return (rows + ROWS - 1) / ROWS; });
    Tiles tiles(given.offsets, given.experts, across);
    if (role < 2) {
        Loader<SLOPE> loader(rows_map, w_map, tiles, given.inside, given.outside);
        const auto load = [&] {
            if (threadIdx.x == 128)
                loader.load([&](const Tile& tile) {
                    for (int i = 0; SLOPE && i < 8; ++i)  // wanted a tile later
                        tensor_fetch(z_map, tile.column + i / 2 * 64, tile.start + i % 2 * 64);
                });
            __syncwarp();
        };
        for (int stage = 0; stage < STAGES; ++stage) load();
        Tile tile;
        for (int n = 0, number = 0; tiles.next(tile); ++number) {
            float acc[2][64];
            multiply_tile<SLOPE>(acc, n, given.inside / DEPTH, role, load);
            barrier_wait(taken(role), number % 2 ^ 1);
            stage_chunk(result(role), acc[0]);
            stage_chunk(result(role) + CHUNK, acc[1]);
            __syncwarp();
            if (threadIdx.x % 32 == 0) barrier_arrive(handed_over(role));
        }
    } else {
        activate_tiles<SLOPE>(given, tiles);
    }
    end();
}

// z (N, outside) = rows (N, inside) · w[e]ᵀ, w[e] (outside, inside); h (N, outside) = act(z + bias). inside is a multiple of
// 64, outside of 128. Boxes: 128 by 64.
extern "C" __global__ void CLUSTER __launch_bounds__(384, 1)
up(MAP rows_map, MAP w_map, const int* offsets, long long experts, long long inside, long long outside, const Number* bias,
   Number* z, Number* h) {
    activated<0>(rows_map, w_map, rows_map, {offsets, static_cast<int>(experts), static_cast<int>(inside),
                 static_cast<int>(outside), bias, z, h, nullptr, nullptr, nullptr, nullptr, nullptr});
}

// d_h (N, outside) = d_rows (N, inside) · w[e], w[e] (inside, outside), is of rows without their weights (T, K), and is not
// stored. d_z (N, outside) = weight · d_h · act'(z + bias), h = weight · act(z + bias), and of ⟨d_h, act(z + bias)⟩ the part of
// each tile across, partial (N, tiles); and where sums is not 0, those of the rows of d_z of each 128 of an expert's rows,
// (parts, outside). inside is a multiple of 64, outside of 128. Boxes: rows 128 by 64, w and z 64 by 64.
extern "C" __global__ void CLUSTER __launch_bounds__(384, 1)
slope(MAP rows_map, MAP w_map, MAP z_map, const int* offsets, long long experts, long long inside, long long outside,
      const Number* bias, const Number* z, Number* d_z, Number* h, const float* weights, const int* slot_of_row,
      float* partial, float* sums) {
    activated<1>(rows_map, w_map, z_map, {offsets, static_cast<int>(experts), static_cast<int>(inside),
                 static_cast<int>(outside), bias, const_cast<Number*>(z), h, d_z, weights, slot_of_row, partial, sums});
}
