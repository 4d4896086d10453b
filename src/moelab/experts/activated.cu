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

using Values = float[LINE];

// What a product is made of, and what is made beside it: `up` z and h; `slope` d_z, h, partial and sums out of z and weights.
struct Given {
    const int* offsets;
    int experts, inside, outside;
    const Element* bias;  // (E, outside), or 0
    Element *z, *h, *d_z;
    const float* weights;
    const int* slot_of_row;
    float *partial, *sums;
};

// What a thread knows of a tile before it is handed over. Of its rows a warp has every WARPS-th, a lane 8 columns of each.
template <int SLOPE> struct Rows {
    Tile tile;
    int column;
    bool inside;
    uint4 bias;
    int slot;            // of the lane-th row of the warp's
    float weight;        // its weight
    uint4 z[AT_ONCE];    // of the first rows

    // How many the warp has.
    __device__ int rows() const { return max(0, (tile.rows - static_cast<int>(threadIdx.x) % 128 / 32 + WARPS - 1) / WARPS); }

    __device__ long long place(const Given& given, int i) const {
        return (tile.start + WARPS * i + threadIdx.x % 128 / 32) * static_cast<long long>(given.outside) + column;
    }

    __device__ void begin(const Given& given, const Tile& next) {
        tile = next;
        column = tile.column + 8 * (threadIdx.x % 32);
        inside = column < given.outside;
        bias = make_uint4(0, 0, 0, 0);
        if (given.bias && inside)
            bias = load_once(given.bias + tile.expert * static_cast<long long>(given.outside) + column);
        if (!SLOPE) return;
        const int row = WARPS * (threadIdx.x % 32) + threadIdx.x % 128 / 32;
        slot = row < tile.rows ? given.slot_of_row[tile.start + row] : -1;
        if (rows() >= AT_ONCE) fetch(given, 0, z);
    }

    // Later, since it waits for the slot.
    __device__ void find_weight(const Given& given) {
        if (SLOPE) weight = slot < 0 ? 0.0f : given.weights[slot];
    }

    // z of AT_ONCE rows from the i-th on.
    __device__ void fetch(const Given& given, int i, uint4 (&lines)[AT_ONCE]) const {
        const Element* from = given.z + place(given, i);
#pragma unroll
        for (int j = 0; j < AT_ONCE; ++j, from += WARPS * static_cast<long long>(given.outside))
            if (inside) lines[j] = load_once(from);
    }
};

template <int SLOPE> struct Activation {
    const Given& given;
    const Rows<SLOPE>& rows;
    Values bias, sum = {};

    __device__ Activation(const Given& given, const Rows<SLOPE>& rows) : given(given), rows(rows) { widen(rows.bias, bias); }

    // COUNT of the warp's rows from the i-th on, all of which are there.
    template <int COUNT> __device__ void activate(int i, const uint4 (&z)[COUNT]) {
        const int warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
        const long long at = rows.place(given, i), step = WARPS * static_cast<long long>(given.outside);
        Element *to = (SLOPE ? given.d_z : given.z) + at, *to_h = given.h + at;
        uint4 line[COUNT];
        float product[COUNT] = {};
#pragma unroll
        for (int j = 0; j < COUNT; ++j) {
            const int row = WARPS * (i + j) + warp;
            line[j] = load_line(result(row / 64) + lane / 8 * BOX + row % 64 * 128 + ((lane % 8 ^ row % 8) << 4));
        }
#pragma unroll
        for (int j = 0; j < COUNT; ++j, to += step, to_h += step) {
            const float weight = SLOPE ? __shfl_sync(ALL, rows.weight, i + j) : 1.0f;
            if (!rows.inside) continue;
            Values x, y;
            widen(line[j], x);
            if (SLOPE) {
                widen(z[j], y);
#pragma unroll
                for (int k = 0; k < 8; ++k) {
                    const Curve at_z = curve(y[k] + bias[k]);
                    product[j] += x[k] * at_z.height;
                    x[k] *= weight * at_z.slope;
                    y[k] = weight * at_z.height;
                    sum[k] += x[k];
                }
                copy(to, narrow(x));
            } else {
#pragma unroll
                for (int k = 0; k < 8; ++k) y[k] = curve(x[k] + bias[k]).height;
                store_line(to, line[j]);
            }
            copy(to_h, narrow(y));
        }
        if (SLOPE) store_products(i, product);
    }

    // Each row's sum over the lanes, to partial (N, tiles across).
    __device__ void store_products(int i, const float (&product)[AT_ONCE]) const {
        const bool high = threadIdx.x & 16, middle = threadIdx.x & 8;
        float pair[2];
#pragma unroll
        for (int j = 0; j < 2; ++j)  // of row j + 2 in the upper half of the warp
            pair[j] = (high ? product[j + 2] : product[j]) + __shfl_xor_sync(ALL, high ? product[j] : product[j + 2], 16);
        float own = (middle ? pair[1] : pair[0]) + __shfl_xor_sync(ALL, middle ? pair[0] : pair[1], 8);
        for (int step = 4; step > 0; step /= 2) own += __shfl_xor_sync(ALL, own, step);
        if (threadIdx.x % 8 == 0) store_product(i + 2 * high + middle, own);
    }
    __device__ void store_products(int i, const float (&product)[1]) const {
        float own = product[0];
        for (int step = 16; step > 0; step /= 2) own += __shfl_xor_sync(ALL, own, step);
        if (threadIdx.x % 32 == 0) store_product(i, own);
    }
    __device__ void store_product(int i, float product) const {
        const int across = (given.outside + COLUMNS - 1) / COLUMNS;
        const long long row = rows.tile.start + WARPS * i + threadIdx.x % 128 / 32;
        given.partial[row * across + rows.tile.column / COLUMNS] = product;
    }

    // Sums of the columns over the tile's rows, in the order of the warps, to a row of sums (parts, outside).
    __device__ void store_sums() const {
        float* of_warps = reinterpret_cast<float*>(dynamic + SUMS);
        const long long part = table(1)[rows.tile.expert] + rows.tile.number;
#pragma unroll
        for (int k = 0; k < 8; ++k) of_warps[threadIdx.x % 128 * 8 + k] = sum[k];
        warpgroup_barrier();
        for (int at = threadIdx.x % 128; at < COLUMNS; at += 128) {
            float total = 0.0f;
#pragma unroll
            for (int w = 0; w < WARPS; ++w) total += of_warps[w * COLUMNS + at];
            if (rows.tile.column + at < given.outside) given.sums[part * given.outside + rows.tile.column + at] = total;
        }
        warpgroup_barrier();
    }
};

template <int SLOPE> __device__ inline void activate_tiles(const Given& given, Tiles tiles) {
    Tile tile;
    Rows<SLOPE> coming;
    bool more = tiles.next(tile);
    if (more) {
        coming.begin(given, tile);
        coming.find_weight(given);
    }
    for (int number = 0; more; ++number) {
        const Rows<SLOPE> rows = coming;
        uint4 z[AT_ONCE], one[1];
        for (int j = 0; j < AT_ONCE; ++j) z[j] = rows.z[j];
        more = tiles.next(tile);
        if (more) coming.begin(given, tile);
        Activation<SLOPE> activation(given, rows);
        const int most = rows.rows();
        for (int half = 0; half < 2; ++half) {
            const int end = min(most, 16 * (half + 1));
            barrier_wait(handed_over(half), number % 2);
            int i = 16 * half;
            for (; i + AT_ONCE <= end; i += AT_ONCE) {
                uint4 now[AT_ONCE];
                for (int j = 0; j < AT_ONCE; ++j) now[j] = z[j];
                if (SLOPE && i + 2 * AT_ONCE <= most) rows.fetch(given, i + AT_ONCE, z);
                activation.activate(i, now);
            }
            for (; i < end; ++i) {
                if (SLOPE && rows.inside) one[0] = load_once(given.z + rows.place(given, i));
                activation.activate(i, one);
            }
            __syncwarp();
            if (threadIdx.x % 32 == 0) barrier_arrive(taken(half));
            if (half == 0 && more) coming.find_weight(given);
        }
        if (SLOPE && given.sums && rows.tile.rows > 0) activation.store_sums();
    }
}

template <int SLOPE>
__device__ inline void activated(const TensorMap& rows_map, const TensorMap& w_map, const Given& given) {
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
                loader.load();
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
up(MAP rows_map, MAP w_map, const int* offsets, long long experts, long long inside, long long outside, const Element* bias,
   Element* z, Element* h) {
    activated<0>(rows_map, w_map, {offsets, static_cast<int>(experts), static_cast<int>(inside),
                 static_cast<int>(outside), bias, z, h, nullptr, nullptr, nullptr, nullptr, nullptr});
}

// d_h (N, outside) = d_rows (N, inside) · w[e], w[e] (inside, outside), is of rows without their weights (T, K), and is not
// stored. d_z (N, outside) = weight · d_h · act'(z + bias), h = weight · act(z + bias), and of ⟨d_h, act(z + bias)⟩ the part of
// each tile across, partial (N, tiles); and where sums is not 0, those of the rows of d_z of each 128 of an expert's rows,
// (parts, outside). inside is a multiple of 64, outside of 128. Boxes: rows 128 by 64, w 64 by 64.
extern "C" __global__ void CLUSTER __launch_bounds__(384, 1)
slope(MAP rows_map, MAP w_map, const int* offsets, long long experts, long long inside, long long outside,
      const Element* bias, const Element* z, Element* d_z, Element* h, const float* weights, const int* slot_of_row,
      float* partial, float* sums) {
    activated<1>(rows_map, w_map, {offsets, static_cast<int>(experts), static_cast<int>(inside),
                 static_cast<int>(outside), bias, const_cast<Element*>(z), h, d_z, weights, slot_of_row, partial, sums});
}
