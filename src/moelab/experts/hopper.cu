// Products of rows that are sorted by expert, bf16, on Hopper's tensor cores. Blocks are persistent; two of their
// warpgroups multiply, each 64 rows of a tile, and follow the curve where there is one. One thread loads: of a warpgroup
// of its own, or, where two blocks share a multiprocessor and its registers, of the first. A cluster of two blocks has
// the same rows and neighbouring columns: each loads half of the rows for both.
//
// Compiled with BLOCKS, those of a cluster, and ACTIVATION (curve.cuh).

// Rows

struct Tile {
    int expert, start, rows, column;
};

// Rows (N, inside) by w[e]: (outside, inside), or ACROSS (inside, outside); outside is a multiple of 128, and of two tiles'
// columns where blocks are two. Boxes: rows 128 / BLOCKS by 64, w 128 by 64, or ACROSS 64 by 64, out 64 by 64.
struct Product {
    const TensorMap &rows_map, &w_map;
    const int* offsets;
    int experts, inside, outside;
    unsigned short *out, *h;
    const unsigned short *bias, *z;
    const float* weights;
    const int* slot_of_row;
    float* partial;

    // Tiles beside each other, over the blocks of a cluster.
    template <class Kind> __device__ int across() const { return (outside + Kind::COLUMNS - 1) / Kind::COLUMNS / BLOCKS; }
};

// Walks the tiles of this cluster, in the same order in every thread.
template <class Kind> struct Tiles {
    const int *offsets, *before;
    int experts, across, unit, step, expert = 0;

    __device__ explicit Tiles(const Product& p)
        : offsets(p.offsets), before(table(0)), experts(p.experts), across(p.across<Kind>()),
          unit(static_cast<int>(blockIdx.x) / BLOCKS), step(static_cast<int>(gridDim.x) / BLOCKS) {}

    __device__ bool next(Tile& tile) {
        if (unit >= before[experts]) return false;
        while (unit >= before[expert + 1]) ++expert;
        const int first = start_of(offsets, expert), end = offsets[expert], tiles = (end - first + ROWS - 1) / ROWS;
        const int group = (unit - before[expert]) / (GROUP * across), within = (unit - before[expert]) % (GROUP * across);
        const int height = min(GROUP, tiles - group * GROUP);
        const int row = (group * GROUP + within % height) * ROWS;
        tile = {expert, first + row, min(ROWS, end - first - row),
                (within / height * BLOCKS + rank_in_cluster()) * Kind::COLUMNS};
        unit += step;
        return true;
    }
};

// What one thread loads: the blocks of the summed dimension of each tile, in turn.
template <class Kind, int ACROSS> struct Loads {
    const Product& p;
    Tiles<Kind> tiles;
    Tile tile;
    bool more;
    int k = 0, n = 0;

    __device__ explicit Loads(const Product& p) : p(p), tiles(p) { more = tiles.next(tile); }

    // The next one, as soon as its stage has been handed back.
    __device__ void next() {
        constexpr int BOXES = Kind::COLUMNS / 64;
        const Turn<Kind> turn(n);
        const Address there = full(turn.stage), matrix = right<Kind>(turn.stage);
        const int share = ROWS / SHARES * rank_in_cluster();
        barrier_wait(empty(turn.stage), turn.parity ^ 1);
        barrier_expect(there, Kind::STAGE);
        tensor_load_all(p.rows_map, left<Kind>(turn.stage) + share * 128, k, tile.start + share, there);
        for (int i = 0; i < (ACROSS ? BOXES : BOXES / 2); ++i)
            if (ACROSS)
                tensor_load(p.w_map, matrix + i * BOX, tile.column + 64 * i, tile.expert * p.inside + k, there);
            else
                tensor_load(p.w_map, matrix + i * 2 * BOX, k, tile.expert * p.outside + tile.column + 128 * i, there);
        k += DEPTH;
        ++n;
        if (k < p.inside) return;
        k = 0;
        more = tiles.next(tile);
    }
};

// out (N, outside) = the products.
template <int ACROSS> __device__ inline void plain_product(const Product& p, const TensorMap& out_map) {
    begin<1>(p.offsets, p.experts, ROWS, p.across<Plain>());
    const int half = static_cast<int>(threadIdx.x) / 128 - 1;
    if (half < 0) {
        fewer_registers<40>();
        if (threadIdx.x == 0)
            for (Loads<Plain, ACROSS> loads(p); loads.more;) loads.next();
    } else {
        more_registers<232>();
        Tiles<Plain> tiles(p);
        Tile tile;
        for (int n = 0; tiles.next(tile);) {
            float acc[2][64];
            for (int k = 0; k < p.inside / DEPTH; ++k, ++n) {
                const Turn<Plain> turn(n);
                barrier_wait(full(turn.stage), turn.parity);
                add_block<Plain, 0, ACROSS>(acc, n, k, half);
            }
            finish_blocks<Plain>(acc, n - 1);
            store_half(acc, out_map, p.out, tile.start, tile.rows, tile.column, p.outside, half);
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

// acc (64, 128) += a bias.
__device__ inline void add_bias(float (&acc)[64], const unsigned short* bias) {
    const unsigned* pairs = reinterpret_cast<const unsigned*>(bias + 2 * (threadIdx.x % 4));
#pragma unroll
    for (int j = 0; j < 16; ++j) {
        const unsigned pair = pairs[4 * j];
#pragma unroll
        for (int down = 0; down < 2; ++down) {
            acc[4 * j + 2 * down] += low(pair);
            acc[4 * j + 2 * down + 1] += high(pair);
        }
    }
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

// A warp's 16 rows of a tile, which eight threads move a row of at once, in lines of 16 bytes.
struct Strip {
    int row, line, rows, start;  // this thread's first row, and those that are there
    long long spot;              // of its first line in (N, outside)

    __device__ Strip(const Tile& tile, int half, int outside) {
        const int top = 64 * half + static_cast<int>(threadIdx.x) % 128 / 32 * 16;
        row = static_cast<int>(threadIdx.x) % 32 / 8, line = static_cast<int>(threadIdx.x) % 8;
        rows = tile.rows - top, start = tile.start + top;
        spot = static_cast<long long>(start + row) * outside + tile.column + 8 * line;
    }
};

// out = z and h = act(z), or SLOPE out = dL/dz, h = weight · act(z), partial[row, tile of columns] = Σ g · act(z). z has
// the first 64 columns of the strip.
template <int SLOPE>
__device__ inline void finish(const float (&acc)[64], uint4 (&z)[4], const Product& p, const Tile& tile, const Strip& strip) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const Address staged = staging<Curved>() + static_cast<int>(threadIdx.x) / 32 * (CHUNK / 8);
    float weight[4] = {}, sum[4] = {};
    if (SLOPE)
#pragma unroll
        for (int i = 0; i < 4; ++i)
            if (strip.row + 4 * i < strip.rows) weight[i] = p.weights[p.slot_of_row[strip.start + strip.row + 4 * i]];
#pragma unroll
    for (int c = 0; c < 2; ++c) {
        __syncwarp();
#pragma unroll
        for (int i = 0; i < 8; i += 2) {
            const float* d = acc + 32 * c + 4 * i;
            store_matrices(staged + lane % 16 * 128 + ((i + lane / 16 ^ lane % 8) << 4), two_bfloats(d[0], d[1]),
                           two_bfloats(d[2], d[3]), two_bfloats(d[4], d[5]), two_bfloats(d[6], d[7]));
        }
        __syncwarp();
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int row = strip.row + 4 * i;
            const long long at = strip.spot + 4ll * i * p.outside + 64 * c;
            uint4 g = load_line(staged + row * 128 + ((strip.line ^ row % 8) << 4)), h;
            follow<SLOPE>(g.x, z[i].x, h.x, weight[i], sum[i]);
            follow<SLOPE>(g.y, z[i].y, h.y, weight[i], sum[i]);
            follow<SLOPE>(g.z, z[i].z, h.z, weight[i], sum[i]);
            follow<SLOPE>(g.w, z[i].w, h.w, weight[i], sum[i]);
            if (row < strip.rows) {
                store_line(p.out + at, g);
                store_line(p.h + at, h);
                if (SLOPE && c == 0) z[i] = *reinterpret_cast<const uint4*>(p.z + at + 64);
            }
        }
    }
    if (SLOPE)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        sum[i] += __shfl_xor_sync(ALL, sum[i], 1);
        sum[i] += __shfl_xor_sync(ALL, sum[i], 2);
        sum[i] += __shfl_xor_sync(ALL, sum[i], 4);
        const int row = strip.row + 4 * i;
        if (strip.line == 0 && row < strip.rows)
            p.partial[static_cast<long long>(strip.start + row) * (p.outside / Curved::COLUMNS) +
                      tile.column / Curved::COLUMNS] = sum[i];
    }
}

template <int SLOPE> __device__ inline void curved_product(const Product& p) {
    constexpr int AHEAD = Curved::STAGES - 1;  // blocks; the last stage is handed back while the next one is multiplied
    begin<1>(p.offsets, p.experts, ROWS, p.across<Curved>());
    const int half = static_cast<int>(threadIdx.x) / 128;
    tensor_prefetch(p.rows_map);
    tensor_prefetch(p.w_map);
    Loads<Curved, SLOPE> loads(p);
    if (threadIdx.x == 0)
        for (int i = 0; i < AHEAD && loads.more; ++i) loads.next();
    Tiles<Curved> tiles(p);
    Tile tile;
    for (int n = 0; tiles.next(tile);) {
        const Strip strip(tile, half, p.outside);
        uint4 z[4];
        if (SLOPE)
#pragma unroll
            for (int i = 0; i < 4; ++i)  // before the products, which hide how long it takes
                if (strip.row + 4 * i < strip.rows)
                    z[i] = *reinterpret_cast<const uint4*>(p.z + strip.spot + 4ll * i * p.outside);
        float acc[1][64];
        for (int k = 0; k < p.inside / DEPTH; ++k, ++n) {
            const Turn<Curved> turn(n);
            barrier_wait(full(turn.stage), turn.parity);
            add_block<Curved, 0, SLOPE>(acc, n, k, half);
            if (threadIdx.x == 0 && loads.more) loads.next();
            __syncwarp();
        }
        finish_blocks<Curved>(acc, n - 1);
        if (p.bias) add_bias(acc[0], p.bias + static_cast<long long>(tile.expert) * p.outside + tile.column);
        finish<SLOPE>(acc[0], z, p, tile, strip);
    }
    end();
}

extern "C" __global__ void CLUSTER __launch_bounds__(256, 2)
up(MAP rows_map, MAP w_map, const int* offsets, long long experts, long long inside, long long outside,
   unsigned short* out, unsigned short* h, const unsigned short* bias) {
    curved_product<0>({rows_map, w_map, offsets, static_cast<int>(experts), static_cast<int>(inside),
                       static_cast<int>(outside), out, h, bias});
}

extern "C" __global__ void CLUSTER __launch_bounds__(256, 2)
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
                tile % high * ROWS, (tile / high * BLOCKS + rank_in_cluster()) * Plain::COLUMNS};
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
    const int high = outside / ROWS, across = (inside + Plain::COLUMNS - 1) / Plain::COLUMNS / BLOCKS;
    begin<2>(offsets, experts, longest, high * across);
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
                    const Turn<Plain> turn(n);
                    const Address there = full(turn.stage);
                    barrier_wait(empty(turn.stage), turn.parity ^ 1);
                    barrier_expect(there, Plain::STAGE);
                    for (int i = 0; i < 2; ++i)
                        if (BLOCKS == 1 || i == rank_in_cluster())
                            tensor_load_all(y_map, left<Plain>(turn.stage) + i * BOX, part.left + 64 * i, part.start + k, there);
                    for (int i = 0; i < 4; ++i)
                        tensor_load(x_map, right<Plain>(turn.stage) + i * BOX, part.right + 64 * i, part.start + k, there);
                }
        }
    } else {
        more_registers<232>();
        for (int n = 0; work.next(part);) {
            float acc[2][64];
            for (int k = 0; k * DEPTH < part.rows; ++k, ++n) {
                const Turn<Plain> turn(n);
                barrier_wait(full(turn.stage), turn.parity);
                if (const int rows = part.rows - k * DEPTH; rows < DEPTH) {
                    for (int i = threadIdx.x - 128; i < (DEPTH - rows) * 48; i += 256)
                        clear_line(left<Plain>(turn.stage) + i % 6 * BOX + (rows + i / 48) * 128 + i / 6 % 8 * 16);
                    before_async();
                    consumers_barrier();
                }
                add_block<Plain, 1, 1>(acc, n, k, half);
            }
            finish_blocks<Plain>(acc, n - 1);
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
