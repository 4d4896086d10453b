// Products of rows that are sorted by expert, bf16, on Hopper's tensor cores, in tiles as tiles.cuh has them. Blocks are
// persistent; warpgroup 0 loads, 1 and 2 multiply.
//
// Compiled with BLOCKS, those of a cluster, and with 4 STAGES.

// Rows

// out (N, outside) = rows (N, inside) by w[e]: (outside, inside), or ACROSS (inside, outside); outside is a multiple of 128.
// Boxes: rows and w 128 by 64, or ACROSS w 64 by 64, out 64 by 64.
template <int ACROSS>
__device__ inline void product(const TensorMap& rows_map, const TensorMap& w_map, const TensorMap& out_map,
                               const int* offsets, int experts, int inside, int outside, unsigned short* out) {
    const int across = (outside + COLUMNS - 1) / COLUMNS;
    begin(offsets, experts, [=](int, int rows) { return Tiles::tall(rows) * across; }, [](int, int) { return 0; });
    const int half = static_cast<int>(threadIdx.x) / 128 - 1;
    Tiles tiles(offsets, experts, across);
    if (half < 0) {
        fewer_registers<40>();
        if (threadIdx.x == 0) {
            Loader<ACROSS> loader(rows_map, w_map, tiles, inside, outside);
            while (loader.load()) {}
        }
    } else {
        more_registers<232>();
        Tile tile;
        for (int n = 0; tiles.next(tile);) {
            float acc[2][64];
            multiply_tile<ACROSS>(acc, n, inside / DEPTH, half, [] {});
            store_half(acc, out_map, out, tile.start, tile.rows, tile.column, outside, half);
        }
    }
    end();
}

extern "C" __global__ void CLUSTER __launch_bounds__(384, 1)
forward(MAP rows_map, MAP w_map, MAP out_map, const int* offsets, long long experts, long long inside, long long outside,
        unsigned short* out) {
    product<0>(rows_map, w_map, out_map, offsets, static_cast<int>(experts), static_cast<int>(inside),
               static_cast<int>(outside), out);
}

extern "C" __global__ void CLUSTER __launch_bounds__(384, 1)
backward(MAP rows_map, MAP w_map, MAP out_map, const int* offsets, long long experts, long long inside, long long outside,
         unsigned short* out) {
    product<1>(rows_map, w_map, out_map, offsets, static_cast<int>(experts), static_cast<int>(inside),
               static_cast<int>(outside), out);
}

// Sums over rows

// How experts' rows are cut into parts of about `target`, those of the last expert of about `last` unless they are many.
struct Cuts {
    int experts, target, last;

    __device__ int parts(int expert, int rows) const {
        if (rows == 0) return 0;
        const bool whole = rows < target + target / 2, ending = expert == experts - 1 && whole;
        return ending ? max(1, (rows + last / 2) / last) : whole ? 1 : (rows + target / 2) / target;
    }
};

// Where the number-th of an expert's parts begins: they differ by a block of the summed dimension at most.
__device__ inline int part_start(int rows, int number, int parts) {
    return min(rows, static_cast<int>((rows + DEPTH - 1ll) / DEPTH * number / parts) * DEPTH);
}

struct Part {
    int expert, start, rows, number, left, right;
};

struct Parts {
    const int *offsets, *before, *several;
    int experts, high, across, unit, step, expert = 0;

    __device__ Parts(const int* offsets, int experts, int high, int across)
        : offsets(offsets), before(table(0)), several(table(1)), experts(experts), high(high), across(across),
          unit(static_cast<int>(blockIdx.x) / BLOCKS), step(static_cast<int>(gridDim.x) / BLOCKS) {}

    __device__ bool next(Part& part) {
        if (unit >= before[experts]) return false;
        while (unit >= before[expert + 1]) ++expert;
        const int within = unit - before[expert], chunk = within / (high * across), tile = within % (high * across);
        const int parts = (before[expert + 1] - before[expert]) / (high * across);
        const int first = start_of(offsets, expert), rows = offsets[expert] - first;
        const int start = part_start(rows, chunk, parts), end = part_start(rows, chunk + 1, parts);
        part = {expert, first + start, end - start, parts == 1 ? -1 : several[expert] + chunk,
                (tile % high * BLOCKS + rank_in_cluster()) * ROWS, tile / high * COLUMNS};
        unit += step;
        return true;
    }
};

// dw[e] (outside, inside) fp32 = Σ over an expert's rows of d_y ⊗ x: d_y (N, outside), x (N, inside).
//
// The only part of an expert goes to dw; of several each goes to parts (part, outside, inside), which `sum_parts` adds.
// Rows after a part's are another's, and may be NaN: they are cleared in shared memory. Boxes: 64 by 64. outside and inside
// are multiples of 128, outside of 256 where blocks are two.
extern "C" __global__ void CLUSTER __launch_bounds__(384, 1)
weight_gradient(MAP y_map, MAP x_map, const int* offsets, long long experts, long long outside_,
                long long inside_, long long target, long long last, float* dw, float* parts) {
    const int outside = static_cast<int>(outside_), inside = static_cast<int>(inside_);
    const int high = outside / ROWS / BLOCKS, across = (inside + COLUMNS - 1) / COLUMNS;
    const Cuts cuts = {static_cast<int>(experts), static_cast<int>(target), static_cast<int>(last)};
    begin(offsets, cuts.experts, [=](int e, int rows) { return cuts.parts(e, rows) * high * across; },
          [=](int e, int rows) { return cuts.parts(e, rows) > 1 ? cuts.parts(e, rows) : 0; });
    const int half = static_cast<int>(threadIdx.x) / 128 - 1;
    Parts work(offsets, cuts.experts, high, across);
    Part part;
    if (half < 0) {
        fewer_registers<40>();
        if (threadIdx.x == 0) {
            tensor_prefetch(y_map);
            tensor_prefetch(x_map);
            for (int n = 0; work.next(part);)
                for (int k = 0; k < part.rows; k += DEPTH, ++n) {
                    const Turn turn(n);
                    const Address there = full(turn.stage);
                    barrier_wait(empty(turn.stage), turn.parity ^ 1);
                    barrier_expect(there, STAGE);
                    for (int i = 0; i < 2; ++i)
                        tensor_load(y_map, left(turn.stage) + i * BOX, part.left + 64 * i, part.start + k, there);
                    for (int i = 0; i < 4; ++i)
                        if (loads(i / 2))
                            tensor_load_all(x_map, right(turn.stage) + i * BOX, part.right + 64 * i, part.start + k, there);
                }
        }
    } else {
        more_registers<232>();
        for (int n = 0; work.next(part);) {
            float acc[2][64];
            for (int k = 0; k * DEPTH < part.rows; ++k, ++n) {
                const Turn turn(n);
                barrier_wait(full(turn.stage), turn.parity);
                if (const int rows = part.rows - k * DEPTH; rows < DEPTH) {
                    for (int i = threadIdx.x - 128; i < (DEPTH - rows) * 48; i += 256)
                        clear_line(left(turn.stage) + i % 6 * BOX + (rows + i / 48) * 128 + i / 6 % 8 * 16);
                    before_async();
                    consumers_barrier();
                }
                add_block<1, 1>(acc, n, k, half);
            }
            finish_blocks(acc, n - 1);
            const int lane = threadIdx.x % 32, row = part.left + 64 * half + threadIdx.x % 128 / 32 * 16 + lane / 4;
            const long long matrix = part.number < 0 ? part.expert : part.number;
            float* to = (part.number < 0 ? dw : parts) + (matrix * outside + row) * inside + part.right + 2 * (lane % 4);
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
    end();
}

// What `weight_gradient` left in parts, summed in their order into dw; zeros for an expert without rows. Grid: (any, E).
extern "C" __global__ void __launch_bounds__(256)
sum_parts(const float* parts, const int* offsets, float* dw, long long size, long long target, long long last) {
    const int expert = blockIdx.y;
    const Cuts cuts = {static_cast<int>(gridDim.y), static_cast<int>(target), static_cast<int>(last)};
    const auto parts_of = [&](int e) { return cuts.parts(e, offsets[e] - start_of(offsets, e)); };
    const int count = parts_of(expert);
    if (count == 1) return;  // nearly all blocks
    int first = 0;
    for (int e = 0; e < expert; ++e) {
        const int before = parts_of(e);
        if (before > 1) first += before;
    }
    const float4* from = reinterpret_cast<const float4*>(parts + first * size);
    float4* to = reinterpret_cast<float4*>(dw + expert * size);
    for (long long i = static_cast<long long>(blockIdx.x) * 256 + threadIdx.x; i < size / 4; i += gridDim.x * 256ll) {
        float4 sum = {0, 0, 0, 0};
        for (int part = 0; part < count; ++part) {
            const float4 next = from[part * (size / 4) + i];
            sum = {sum.x + next.x, sum.y + next.y, sum.z + next.z, sum.w + next.w};
        }
        to[i] = sum;
    }
}
