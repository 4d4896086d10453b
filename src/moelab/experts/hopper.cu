// Products of rows that are sorted by expert, bf16, on Hopper's tensor cores. Blocks are persistent; warpgroup 0 loads, 1
// and 2 multiply, each 64 rows of a tile of 128 by 256, and where there is a curve to follow 3 and 4 finish what 1 and 2
// hand them beside the products of the next tile. Tokens are gathered by the loads. A cluster of two blocks has the same
// rows and neighbouring columns: each loads half of the rows for both, where they are not gathered.
//
// Compiled with BLOCKS, those of a cluster, and ACTIVATION (curve.cuh).

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
    const TensorMap& w_map;
    const int* offsets;
    int experts, inside, outside;
    unsigned short *out, *h;
    const unsigned short *bias, *z;
    const float* weights;
    const int* slot_of_row;
    float* partial;

    __device__ int across() const { return (outside + COLUMNS - 1) / COLUMNS / BLOCKS; }
};

// A block of w, from row or column k of the summed dimension on.
template <int ACROSS> __device__ inline void load_matrix(const Product& p, const Tile& tile, int k, int stage) {
    for (int i = 0; i < (ACROSS ? 4 : 2); ++i)
        if (ACROSS)
            tensor_load(p.w_map, right(stage) + i * BOX, tile.column + 64 * i, tile.expert * p.inside + k, full(stage));
        else
            tensor_load(p.w_map, right(stage) + i * 2 * BOX, k, tile.expert * p.outside + tile.column + 128 * i, full(stage));
}

// One thread.
template <int ACROSS> __device__ inline void load_tiles(const Product& p, const TensorMap& rows_map, Tiles tiles) {
    Tile tile;
    tensor_prefetch(rows_map);
    tensor_prefetch(p.w_map);
    const int share = ROWS / SHARES * rank_in_cluster();
    for (int n = 0; tiles.next(tile);)
        for (int k = 0; k < p.inside; k += DEPTH, ++n) {
            const Turn<PLAIN> turn(n);
            barrier_wait(empty(turn.stage), turn.parity ^ 1);
            barrier_expect(full(turn.stage), STAGE);
            tensor_load_all(rows_map, left(turn.stage) + share * 128, k, tile.start + share, full(turn.stage));
            load_matrix<ACROSS>(p, tile, k, turn.stage);
        }
}

// All threads of the warpgroup: eight have the lines of a row, each those of rows 16 apart.
template <int ACROSS> __device__ inline void gather_tiles(const Product& p, const Gathered& rows, Tiles tiles) {
    const int thread = threadIdx.x, line = thread % 8, first = thread / 8;
    Tile tile;
    for (int n = 0; tiles.next(tile);) {
        int token[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) token[i] = rows.token(tile.start + first + 16 * i);
#pragma unroll 1
        for (int k = 0; k < p.inside; k += DEPTH, ++n) {
            const Turn<CURVED> turn(n);
            barrier_wait(empty(turn.stage), turn.parity ^ 1);
            if (thread == 0) {
                barrier_expect(full(turn.stage), STAGE - LEFT);
                load_matrix<ACROSS>(p, tile, k, turn.stage);
            }
            const Address to = left(turn.stage) + first * 128 + ((line ^ first % 8) << 4);
#pragma unroll
            for (int i = 0; i < 8; ++i) copy_line(to + 16 * i * 128, rows.at(token[i], k + 8 * line));
            copies_arrive(full(turn.stage));
        }
    }
}

// The warpgroup's half of a tile; n counts blocks of the summed dimension from the first tile on.
template <int STAGES, int ACROSS> __device__ inline void multiply_tile(float (&acc)[2][64], const Product& p, int& n, int half) {
    for (int k = 0; k < p.inside / DEPTH; ++k, ++n) {
        const Turn<STAGES> turn(n);
        barrier_wait(full(turn.stage), turn.parity);
        if (STAGES == CURVED) before_async();  // what was copied, before the tensor cores read it
        add_block<STAGES, 0, ACROSS>(acc, n, k, half);
    }
    finish_blocks<STAGES>(acc, n - 1);
}

// out (N, outside) = the products.
template <int ACROSS>
__device__ inline void plain_product(const Product& p, const TensorMap& rows_map, const TensorMap& out_map) {
    begin(p.offsets, p.experts, ROWS, p.across(), 0);
    const int warpgroup = static_cast<int>(threadIdx.x) / 128;
    Tiles tiles(p.offsets, p.experts, p.across());
    if (warpgroup == 0) {
        fewer_registers<40>();
        if (threadIdx.x == 0) load_tiles<ACROSS>(p, rows_map, tiles);
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
    plain_product<0>({w_map, offsets, static_cast<int>(experts), static_cast<int>(inside), static_cast<int>(outside), out},
                     rows_map, out_map);
}

extern "C" __global__ void CLUSTER __launch_bounds__(384, 1)
back(MAP rows_map, MAP w_map, MAP out_map, const int* offsets, long long experts, long long inside, long long outside,
     unsigned short* out) {
    plain_product<1>({w_map, offsets, static_cast<int>(experts), static_cast<int>(inside), static_cast<int>(outside), out},
                     rows_map, out_map);
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
            if (64 * j >= columns) break;
            uint4 g = load_line(staged + j * BOX + 16 * i * 128), h;
            follow<SLOPE>(g.x, z[j].x, h.x, weight, sum);
            follow<SLOPE>(g.y, z[j].y, h.y, weight, sum);
            follow<SLOPE>(g.z, z[j].z, h.z, weight, sum);
            follow<SLOPE>(g.w, z[j].w, h.w, weight, sum);
            if (live) {
                store_line(p.out + at + 64 * j, g);
                store_line(p.h + at + 64 * j, h);
            }
            if (more) z[j] = *reinterpret_cast<const uint4*>(p.z + at + 16ll * p.outside + 64 * j);
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

template <int SLOPE> __device__ inline void curved_product(const Product& p, const Gathered& rows) {
    begin(p.offsets, p.experts, ROWS, p.across(), 128);
    const int warpgroup = static_cast<int>(threadIdx.x) / 128;
    Tiles tiles(p.offsets, p.experts, p.across());
    Tile tile;
    if (warpgroup == 0) {
        fewer_registers<LOADING>();
        gather_tiles<SLOPE>(p, rows, tiles);
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
up(MAP w_map, const unsigned short* x, const int* slot_of_row, long long rows, long long top_k, const int* offsets,
   long long experts, long long inside, long long outside, unsigned short* out, unsigned short* h,
   const unsigned short* bias) {
    curved_product<0>(
        {w_map, offsets, static_cast<int>(experts), static_cast<int>(inside), static_cast<int>(outside), out, h, bias},
        {x, slot_of_row, static_cast<int>(rows), static_cast<int>(top_k), static_cast<int>(inside)});
}

extern "C" __global__ void CLUSTER __launch_bounds__(640, 1)
slope(MAP w_map, const unsigned short* x, const int* slot_of_row, long long rows, long long top_k, const int* offsets,
      long long experts, long long inside, long long outside, unsigned short* out, unsigned short* h,
      const unsigned short* z, const float* weights, float* partial) {
    curved_product<1>({w_map, offsets, static_cast<int>(experts), static_cast<int>(inside), static_cast<int>(outside),
                       out, h, nullptr, z, weights, slot_of_row, partial},
                      {x, slot_of_row, static_cast<int>(rows), static_cast<int>(top_k), static_cast<int>(inside)});
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

// Copies a block of 64 gathered rows, WIDTH columns of them from `column` on, into boxes beside each other.
template <int WIDTH>
__device__ inline void gather_block(const Gathered& rows, int start, int column, Address to, int n) {
    constexpr int LINES = WIDTH / 8, STEP = 128 / LINES;
    const int thread = threadIdx.x, line = thread % LINES, first = thread / LINES;
    const int bytes = column + 8 * line < rows.width ? 16 : 0;  // what is past the last column is 0
    int token[64 / STEP];
#pragma unroll
    for (int i = 0; i < 64 / STEP; ++i) token[i] = rows.token(start + first + STEP * i);
    const Turn<PLAIN> turn(n);
    barrier_wait(empty(turn.stage), turn.parity ^ 1);
#pragma unroll
    for (int i = 0; i < 64 / STEP; ++i) {
        const int row = first + STEP * i;
        copy_line(to + line / 8 * BOX + row * 128 + ((line % 8 ^ row % 8) << 4), rows.at(token[i], bytes ? column + 8 * line : 0),
                  bytes);
    }
    copies_arrive(full(turn.stage));
}

// dw[e] (outside, inside) = Σ over an expert's rows of d_y ⊗ x: d_y (N, outside), x (N, inside); one of them is gathered.
//
// Up to `longest` rows are summed at once. The only part of an expert goes to dw; of several each goes to
// parts (part, outside, inside) in fp32, which `sum_parts` adds. Rows after a part's are another's, and may be NaN:
// they are cleared in shared memory. Boxes: 64 by 64. outside and inside are multiples of 128, inside of 512 where
// blocks are two.
template <int LEFT_GATHERED>
__device__ inline void weight_gradient(const TensorMap& rows_map, const Gathered& rows, const TensorMap& dw_map,
                                       const int* offsets, int experts, int outside, int inside, int longest,
                                       unsigned short* dw, float* parts) {
    const int high = outside / ROWS, across = (inside + COLUMNS - 1) / COLUMNS / BLOCKS;
    begin(offsets, experts, longest, high * across, 128);
    const int half = static_cast<int>(threadIdx.x) / 128 - 1;
    Parts work(offsets, experts, high, across, longest);
    Part part;
    if (half < 0) {
        fewer_registers<72>();
        for (int n = 0; work.next(part);)
            for (int k = 0; k < part.rows; k += DEPTH, ++n) {
                const Turn<PLAIN> turn(n);
                if (threadIdx.x == 0) {
                    barrier_wait(empty(turn.stage), turn.parity ^ 1);
                    barrier_expect(full(turn.stage), LEFT_GATHERED ? STAGE - LEFT : LEFT);
                    for (int i = 0; i < (LEFT_GATHERED ? 4 : 2); ++i)
                        if (LEFT_GATHERED)
                            tensor_load(rows_map, right(turn.stage) + i * BOX, part.right + 64 * i, part.start + k,
                                        full(turn.stage));
                        else if (BLOCKS == 1 || i == rank_in_cluster())
                            tensor_load_all(rows_map, left(turn.stage) + i * BOX, part.left + 64 * i, part.start + k,
                                            full(turn.stage));
                }
                if (LEFT_GATHERED)
                    gather_block<128>(rows, part.start + k, part.left, left(turn.stage), n);
                else
                    gather_block<256>(rows, part.start + k, part.right, right(turn.stage), n);
            }
    } else {
        more_registers<216>();
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
                before_async();  // what was copied, before the tensor cores read it
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

extern "C" __global__ void CLUSTER __launch_bounds__(384, 1)
gradient_in(MAP y_map, MAP dw_map, const unsigned short* x, const int* slot_of_row, long long rows, long long top_k,
            const int* offsets, long long experts, long long outside, long long inside, long long longest,
            unsigned short* dw, float* parts) {
    weight_gradient<0>(
        y_map, {x, slot_of_row, static_cast<int>(rows), static_cast<int>(top_k), static_cast<int>(inside)}, dw_map, offsets,
        static_cast<int>(experts), static_cast<int>(outside), static_cast<int>(inside), static_cast<int>(longest), dw, parts);
}

extern "C" __global__ void CLUSTER __launch_bounds__(384, 1)
gradient_out(MAP x_map, MAP dw_map, const unsigned short* d_y, const int* slot_of_row, long long rows, long long top_k,
             const int* offsets, long long experts, long long outside, long long inside, long long longest,
             unsigned short* dw, float* parts) {
    weight_gradient<1>(
        x_map, {d_y, slot_of_row, static_cast<int>(rows), static_cast<int>(top_k), static_cast<int>(outside)}, dw_map,
        offsets, static_cast<int>(experts), static_cast<int>(outside), static_cast<int>(inside), static_cast<int>(longest),
        dw, parts);
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
