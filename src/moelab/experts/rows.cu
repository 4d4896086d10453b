// Moves rows between tokens and experts, and activates the hidden layer; each with its backward.
//
// Rows (N, …) are routed slots sorted by expert, as `route` numbers them. Rows from *kept on, to which dropped slots
// are sorted, are neither read nor written. A warp handles a token, or a row, in accesses of 16 bytes; of one element
// where a row is not a multiple of 16 bytes or a pointer is not aligned (`wide` 0). Offsets are 64 bits wide. Sums run
// in fp32 and in a fixed order: slots in the order of k, lanes by a tree, rows by their numbers.
//
// Compiled with one of FLOAT32, FLOAT16 and BFLOAT16 (lines.cuh), and with ACTIVATION (curve.cuh). A grid is of
// blocks of 32 × WARPS threads. Pointers that may be 0 say so.

using Index = long long;

constexpr int WARPS = 8;

__device__ inline float sum_of_lanes(float value) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(ALL, value, step);
    return value;
}

__device__ inline Index warp_of_grid() { return static_cast<Index>(blockIdx.x) * WARPS + threadIdx.y; }

// Runs body<V>(arguments) with 16 bytes an access, or with one element.
#define BY_WIDTH(wide, body, ...) \
    if (wide) body<LINE>(__VA_ARGS__); \
    else body<1>(__VA_ARGS__)

// Dispatch

// What is read and written; bias, indices and dots with DOTS alone.
struct Dispatched {
    const Element* x;
    const int *row_of_slot, *kept;
    Element* rows;
    const Element* bias;
    const Index* indices;
    float* dots;
    Index top_k, width;
};

template <int V, bool DOTS> __device__ void dispatch_token(const Dispatched& d, Index token) {
    constexpr int AHEAD = 4;  // loads in flight
    const int rows_kept = *d.kept;
    for (Index at = threadIdx.x * V; at - threadIdx.x * V < d.width; at += AHEAD * 32 * V) {
        Chunk<V> chunk[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; ++i)
            if (at + i * 32 * V < d.width) chunk[i] = load<V>(d.x + token * d.width + at + i * 32 * V);
        for (Index slot = token * d.top_k; slot < (token + 1) * d.top_k; ++slot) {
            const Index row = d.row_of_slot[slot];
            if (row >= rows_kept) continue;
            const Element* bias = DOTS ? d.bias + d.indices[slot] * d.width + at : nullptr;
            float sum = 0.0f;
#pragma unroll
            for (int i = 0; i < AHEAD; ++i) {
                if (at + i * 32 * V >= d.width) break;
                copy(d.rows + row * d.width + at + i * 32 * V, chunk[i]);
                if (DOTS) {
                    float value[V], added[V];
                    widen(chunk[i], value);
                    widen(load<V>(bias + i * 32 * V), added);
#pragma unroll
                    for (int j = 0; j < V; ++j) sum += value[j] * added[j];
                }
            }
            if (DOTS) {
                sum = sum_of_lanes(sum);
                if (threadIdx.x == 0) d.dots[slot] = at == 0 ? sum : d.dots[slot] + sum;
            }
        }
    }
}

// x (T, D) → rows (N, D): x[t] at the row of each slot of t. A token is read once.
extern "C" __global__ void __launch_bounds__(32 * WARPS)
dispatch(const Element* x, const int* row_of_slot, const int* kept, Element* rows, Index tokens, Index top_k,
         Index width, Index wide) {
    const Index token = warp_of_grid();
    if (token >= tokens) return;
    const Dispatched given = {x, row_of_slot, kept, rows, nullptr, nullptr, nullptr, top_k, width};
    if (wide) dispatch_token<LINE, false>(given, token);
    else dispatch_token<1, false>(given, token);
}

// The same, and dots (T, K) = ⟨x[t], bias[indices[t, k]]⟩, of bias (E, D); those of dropped slots are not written.
extern "C" __global__ void __launch_bounds__(32 * WARPS)
dispatch_dots(const Element* x, const int* row_of_slot, const int* kept, Element* rows, const Element* bias,
              const Index* indices, float* dots, Index tokens, Index top_k, Index width, Index wide) {
    const Index token = warp_of_grid();
    if (token >= tokens) return;
    const Dispatched given = {x, row_of_slot, kept, rows, bias, indices, dots, top_k, width};
    if (wide) dispatch_token<LINE, true>(given, token);
    else dispatch_token<1, true>(given, token);
}

// Combine

template <int V> __device__ void combine_token(
    const Element* __restrict__ rows, const int* __restrict__ row_of_slot, const int* __restrict__ kept,
    const float* __restrict__ weights, const Index* __restrict__ indices, const Element* __restrict__ bias,
    Element* __restrict__ out, Index token, Index top_k, Index width) {
    constexpr int AHEAD = 2;  // slots whose loads are in flight
    const int rows_kept = *kept;
    for (Index at = threadIdx.x * V; at < width; at += 32 * V) {
        float sum[V] = {};
        for (Index first = token * top_k; first < (token + 1) * top_k; first += AHEAD) {
            Chunk<V> chunk[AHEAD];
            bool there[AHEAD];
#pragma unroll
            for (int i = 0; i < AHEAD; ++i) {
                const Index row = first + i < (token + 1) * top_k ? row_of_slot[first + i] : rows_kept;
                there[i] = row < rows_kept;
                if (there[i]) chunk[i] = load<V>(rows + row * width + at);
            }
#pragma unroll
            for (int i = 0; i < AHEAD; ++i) {
                if (!there[i]) continue;
                float value[V];
                widen(chunk[i], value);
                if (bias) add<V>(value, bias + indices[first + i] * width + at);
                const float weight = weights ? weights[first + i] : 1.0f;
#pragma unroll
                for (int j = 0; j < V; ++j) sum[j] += weight * value[j];
            }
        }
        store(out + token * width + at, narrow(sum));
    }
}

// rows (N, D), weights (T, K) fp32 or 0, bias (E, D) or 0 → out[t] = Σ_k weights[t, k] · (rows[row of (t, k)] +
// bias[indices[t, k]]). Without weights and bias it is the backward of `dispatch`.
extern "C" __global__ void __launch_bounds__(32 * WARPS)
combine(const Element* rows, const int* row_of_slot, const int* kept, const float* weights, const Index* indices,
        const Element* bias, Element* out, Index tokens, Index top_k, Index width, Index wide) {
    const Index token = warp_of_grid();
    if (token >= tokens) return;
    BY_WIDTH(wide, combine_token, rows, row_of_slot, kept, weights, indices, bias, out, token, top_k, width);
}

template <int V> __device__ void combine_token_backward(
    const Element* __restrict__ d_out, const Element* __restrict__ rows, const int* __restrict__ row_of_slot,
    const int* __restrict__ kept, const float* __restrict__ weights, const Index* __restrict__ indices,
    const Element* __restrict__ bias, Element* __restrict__ d_rows, float* __restrict__ d_weights, Index token,
    Index top_k, Index width) {
    constexpr int AHEAD = 4;
    for (Index slot = token * top_k; slot < (token + 1) * top_k; ++slot) {
        const Index row = row_of_slot[slot];
        const bool there = row < *kept;
        float sum = 0;
        if (there) {
            const float weight = weights[slot];
            const Element* added = bias ? bias + indices[slot] * width : nullptr;
            for (Index at = threadIdx.x * V; at < width; at += AHEAD * 32 * V) {
                Chunk<V> d[AHEAD], chunk[AHEAD];
#pragma unroll
                for (int i = 0; i < AHEAD; ++i) {
                    const Index here = at + i * 32 * V;
                    if (here >= width) break;
                    d[i] = load<V>(d_out + token * width + here);
                    chunk[i] = load<V>(rows + row * width + here);
                }
#pragma unroll
                for (int i = 0; i < AHEAD; ++i) {
                    const Index here = at + i * 32 * V;
                    if (here >= width) break;
                    float gradient[V], value[V];
                    widen(d[i], gradient);
                    widen(chunk[i], value);
                    if (added) add<V>(value, added + here);
#pragma unroll
                    for (int j = 0; j < V; ++j) {
                        sum += gradient[j] * value[j];
                        gradient[j] *= weight;
                    }
                    store(d_rows + row * width + here, narrow(gradient));
                }
            }
        }
        sum = sum_of_lanes(sum);
        if (threadIdx.x == 0) d_weights[slot] = there ? sum : 0.0f;
    }
}

// d_out (T, D) → d_rows (N, D) = weight · d_out[t], d_weights (T, K) = ⟨d_out[t], row + bias⟩, 0 for a dropped slot.
extern "C" __global__ void __launch_bounds__(32 * WARPS)
combine_backward(const Element* d_out, const Element* rows, const int* row_of_slot, const int* kept,
                 const float* weights, const Index* indices, const Element* bias, Element* d_rows, float* d_weights,
                 Index tokens, Index top_k, Index width, Index wide) {
    const Index token = warp_of_grid();
    if (token >= tokens) return;
    BY_WIDTH(wide, combine_token_backward, d_out, rows, row_of_slot, kept, weights, indices, bias, d_rows, d_weights,
             token, top_k, width);
}

// Parts of experts

constexpr int TALL = 256;  // rows of a part

// What a block has of rows (N, width): a part of an expert's, and of its columns a strip of 32 accesses. Strips of a part are
// neighbours in the grid, so that rows are read whole, and the last part is the first: a kernel before this one has left the
// last rows in the cache. Without rows where there are fewer parts than blocks. All lanes of a warp together.
struct Part {
    int number, strip, expert = 0;
    Index start = 0, end = 0;

    __device__ Part(const int* offsets, Index experts_, Index width, bool wide) {
        const int experts = static_cast<int>(experts_), lane = threadIdx.x, columns = 32 * (wide ? LINE : 1);
        const int across = static_cast<int>((width + columns - 1) / columns);
        strip = static_cast<int>(blockIdx.x) % across * columns;
        number = (static_cast<int>(gridDim.x) - 1 - static_cast<int>(blockIdx.x)) / across;
        int left = number;
        for (int base = 0; base < experts; base += 32) {
            const int e = base + lane, first = e > 0 && e < experts ? offsets[e - 1] : 0;
            const int own = e < experts ? (offsets[e] - first + TALL - 1) / TALL : 0;
            int up_to = own;
#pragma unroll
            for (int step = 1; step < 32; step *= 2) {
                const int below = __shfl_up_sync(ALL, up_to, step);
                if (lane >= step) up_to += below;
            }
            const unsigned past = __ballot_sync(ALL, left < up_to);
            if (past) {
                const int there = __popc((past & -past) - 1);
                const int begin = __shfl_sync(ALL, first, there);
                expert = base + there;
                start = begin + static_cast<Index>(left - __shfl_sync(ALL, up_to - own, there)) * TALL;
                end = min(start + TALL, static_cast<Index>(offsets[expert]));
                return;
            }
            left -= __shfl_sync(ALL, up_to, 31);
        }
    }
};

// The sums of the warps' lanes' V columns to a row of sums (parts, width). All threads of the block together.
template <int V>
__device__ void store_sums(const float (&sum)[V], float* __restrict__ sums, Index row, Index strip, Index width) {
    __shared__ float of_warp[WARPS][32 * V];
    __syncthreads();
#pragma unroll
    for (int j = 0; j < V; ++j) of_warp[threadIdx.y][threadIdx.x * V + j] = sum[j];
    __syncthreads();
    const int column = threadIdx.y * 32 + threadIdx.x;
    if (column >= 32 * V || strip + column >= width) return;
    float total = 0.0f;
    for (int i = 0; i < WARPS; ++i) total += of_warp[i][column];
    sums[row * width + strip + column] = total;
}

// Activation

constexpr bool GATED = ACTIVATION == SWIGLU;
constexpr int PARTS = GATED ? 2 : 1;  // of z: with swiglu the gate's F, then the value's

template <int V> __device__ void activate_row(
    const Element* __restrict__ z, const Element* __restrict__ bias, Element* __restrict__ h, Index row, Index expert,
    Index hidden) {
    constexpr int AHEAD = 4 / PARTS;
    z += row * PARTS * hidden;
    if (bias) bias += expert * PARTS * hidden;
    h += row * hidden;
    for (Index at = threadIdx.x * V; at < hidden; at += AHEAD * 32 * V) {
        Chunk<V> chunk[AHEAD][PARTS];
#pragma unroll
        for (int i = 0; i < AHEAD; ++i)
#pragma unroll
            for (int part = 0; part < PARTS; ++part)
                if (at + i * 32 * V < hidden) chunk[i][part] = load<V>(z + part * hidden + at + i * 32 * V);
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            const Index here = at + i * 32 * V;
            if (here >= hidden) break;
            float value[PARTS][V];
#pragma unroll
            for (int part = 0; part < PARTS; ++part) {
                widen(chunk[i][part], value[part]);
                if (bias) add<V>(value[part], bias + part * hidden + here);
            }
#pragma unroll
            for (int j = 0; j < V; ++j)
                value[0][j] = curve(value[0][j]).height * (GATED ? value[PARTS - 1][j] : 1.0f);
            store(h + here, narrow(value[0]));
        }
    }
}

// z (N, F; 2F for swiglu), bias (E, F; 2F) or 0 → h (N, F) = act(z + bias).
extern "C" __global__ void __launch_bounds__(32 * WARPS)
activate(const Element* z, const Element* bias, const Index* indices, const int* slot_of_row, const int* kept,
         Element* h, Index hidden, Index wide) {
    const Index row = *kept - 1 - warp_of_grid();  // the last ones first, which the product before has left in the cache
    if (row < 0) return;
    const Index expert = bias ? indices[slot_of_row[row]] : 0;
    BY_WIDTH(wide, activate_row, z, bias, h, row, expert, hidden);
}

// What the backward of the activation reads and writes, of rows (N, …). With WEIGHTED d_h is of rows without their weights.
struct Slopes {
    const Element *z, *bias;
    const int* slot_of_row;
    const Element* d_h;
    Element* d_z;
    float* sums;
    const float* weights;
    Element* h;
    float* partial;
    Index hidden;
};

// 32 lanes' columns of a part of an expert's rows, each warp every eighth of them.
template <int V, bool WEIGHTED> __device__ void slopes_of_part(const Slopes& s, const Part& part) {
    constexpr int AHEAD = 4 / PARTS;  // rows whose loads are in flight
    static_assert(TALL == 32 * WARPS, "a warp's rows have a lane each, which holds their weight");
    const int at = part.strip + static_cast<int>(threadIdx.x) * V;
    const Index top = part.start + threadIdx.y, step = WARPS * s.hidden;
    const int rows = (static_cast<int>(part.end - top) + WARPS - 1) / WARPS;  // of this warp; 0 or less: none
    const bool inside = at < s.hidden;
    const int across = (static_cast<int>(s.hidden) + 32 * V - 1) / (32 * V);
    float bias[PARTS][V] = {}, sum[PARTS][V] = {};
    if (s.bias && inside)
#pragma unroll
        for (int i = 0; i < PARTS; ++i) add<V>(bias[i], s.bias + (part.expert * PARTS + i) * s.hidden + at);
    float weights = 0.0f;  // read here, since for each row by itself one waits for its slot, and all loads after it
    if (WEIGHTED && static_cast<int>(threadIdx.x) < rows) weights = s.weights[s.slot_of_row[top + threadIdx.x * WARPS]];
    Index before = top * s.hidden;  // numbers before the row
    for (int number = 0; number < rows; number += AHEAD, before += AHEAD * step) {
        Chunk<V> z[AHEAD][PARTS], d[AHEAD];
#pragma unroll
        for (int n = 0; n < AHEAD; ++n) {
            if (!inside || number + n >= rows) continue;
            d[n] = load<V>(s.d_h + before + n * step + at);
#pragma unroll
            for (int i = 0; i < PARTS; ++i) z[n][i] = load<V>(s.z + PARTS * (before + n * step) + i * s.hidden + at);
        }
#pragma unroll
        for (int n = 0; n < AHEAD; ++n) {
            if (number + n >= rows) break;
            const float weight = WEIGHTED ? __shfl_sync(ALL, weights, number + n) : 1.0f;
            float product = 0.0f;
            if (inside) {
                float value[PARTS][V], gradient[V];
                widen(d[n], gradient);
#pragma unroll
                for (int i = 0; i < PARTS; ++i) {
                    widen(z[n][i], value[i]);
#pragma unroll
                    for (int j = 0; j < V; ++j) value[i][j] += bias[i][j];
                }
#pragma unroll
                for (int j = 0; j < V; ++j) {
                    const Curve at_gate = curve(value[0][j]);
                    const float factor = GATED ? value[PARTS - 1][j] : 1.0f;
                    if (WEIGHTED) {
                        product += gradient[j] * at_gate.height * factor;
                        gradient[j] *= weight;
                    }
                    value[0][j] = gradient[j] * at_gate.slope * factor;
                    if (GATED) value[PARTS - 1][j] = gradient[j] * at_gate.height;
                    if (WEIGHTED) gradient[j] = weight * at_gate.height * factor;
                }
#pragma unroll
                for (int i = 0; i < PARTS; ++i) {
#pragma unroll
                    for (int j = 0; j < V; ++j) sum[i][j] += value[i][j];
                    copy(s.d_z + PARTS * (before + n * step) + i * s.hidden + at, narrow(value[i]));
                }
                if (WEIGHTED) copy(s.h + before + n * step + at, narrow(gradient));
            }
            if (WEIGHTED) {
                product = sum_of_lanes(product);
                if (threadIdx.x == 0) s.partial[(top + (number + n) * WARPS) * across + part.strip / (32 * V)] = product;
            }
        }
    }
    if (s.sums)
#pragma unroll
        for (int i = 0; i < PARTS; ++i)
            store_sums<V>(sum[i], s.sums, static_cast<Index>(part.number) * PARTS + i, part.strip, s.hidden);
}

// d_h (N, F) → d_z (N, F; 2F for swiglu) = d_h · act'(z + bias), which may be d_h itself, except for swiglu; and sums of its
// rows (parts, F; 2F) where sums is not 0. Grid: as many parts as there may be, times their strips.
extern "C" __global__ void __launch_bounds__(32 * WARPS)
activate_backward(const Element* z, const Element* bias, const int* slot_of_row, const int* offsets, Index experts,
                  const Element* d_h, Element* d_z, float* sums, Index hidden, Index wide) {
    const Part part(offsets, experts, hidden, wide);
    if (part.start == part.end) return;
    const Slopes slopes = {z, bias, slot_of_row, d_h, d_z, sums, nullptr, nullptr, nullptr, hidden};
    if (wide) slopes_of_part<LINE, false>(slopes, part);
    else slopes_of_part<1, false>(slopes, part);
}

// The same where h was not kept, and d_h is of rows without their weights (T, K): d_z and h = act(z + bias), both weighted,
// and ⟨d_h, act(z + bias)⟩ of each row over a strip, partial (N, strips).
extern "C" __global__ void __launch_bounds__(32 * WARPS, 3)
weighted_backward(const Element* z, const Element* bias, const int* slot_of_row, const int* offsets, Index experts,
                  const Element* d_h, Element* d_z, float* sums, const float* weights, Element* h, float* partial,
                  Index hidden, Index wide) {
    const Part part(offsets, experts, hidden, wide);
    if (part.start == part.end) return;
    const Slopes slopes = {z, bias, slot_of_row, d_h, d_z, sums, weights, h, partial, hidden};
    if (wide) slopes_of_part<LINE, true>(slopes, part);
    else slopes_of_part<1, true>(slopes, part);
}

// d_weights (T, K) = Σ of the slot's row in partial (N, B), and of dots (T, K) where that is not 0; 0 for a dropped slot.
extern "C" __global__ void __launch_bounds__(32 * WARPS)
slot_gradient(const float* partial, const int* row_of_slot, const int* kept, const float* dots, float* d_weights,
              Index slots, Index blocks) {
    const Index slot = warp_of_grid() * 32 + threadIdx.x;
    if (slot >= slots) return;
    const Index row = row_of_slot[slot];
    float sum = 0.0f;
    if (row < *kept) {
#pragma unroll 4
        for (Index at = 0; at < blocks; ++at) sum += partial[row * blocks + at];
        if (dots) sum += dots[slot];
    }
    d_weights[slot] = sum;
}

// Gradients of the experts' parameters

template <int V> __device__ void sum_columns(
    const Element* __restrict__ rows, const float* __restrict__ weights, const int* __restrict__ slot_of_row,
    float* __restrict__ sums, const Part& part, Index top_k, Index width) {
    const int at = part.strip + static_cast<int>(threadIdx.x) * V;
    float sum[V] = {};
    if (weights) {
        static_assert(TALL == 32 * WARPS, "a warp's rows have a lane each, which holds their token and weight");
        constexpr int AHEAD = 8;  // rows whose loads are in flight
        const Index top = part.start + threadIdx.y;
        const int count = static_cast<int>((part.end - top + WARPS - 1) / WARPS);  // of this warp; 0 or less: none
        int token_of_lane = 0;
        float weight_of_lane = 0.0f;
        if (static_cast<int>(threadIdx.x) < count) {
            const int slot = slot_of_row[top + threadIdx.x * WARPS];
            token_of_lane = static_cast<int>(slot / top_k);
            weight_of_lane = weights[slot];
        }
        for (int first = 0; first < count; first += AHEAD) {
            Chunk<V> chunk[AHEAD];
#pragma unroll
            for (int n = 0; n < AHEAD; ++n) {
                const Index token = __shfl_sync(ALL, token_of_lane, first + n);
                if (at < width && first + n < count) chunk[n] = load<V>(rows + token * width + at);
            }
#pragma unroll
            for (int n = 0; n < AHEAD; ++n) {
                const float weight = __shfl_sync(ALL, weight_of_lane, first + n);
                if (at >= width || first + n >= count) continue;
                float value[V];
                widen(chunk[n], value);
#pragma unroll
                for (int j = 0; j < V; ++j) sum[j] += weight * value[j];
            }
        }
    } else if (at < width) {
#pragma unroll 4
        for (Index row = part.start + threadIdx.y; row < part.end; row += WARPS) add<V>(sum, rows + row * width + at);
    }
    store_sums<V>(sum, sums, part.number, part.strip, width);
}

// rows (N, C) → sums (parts, C), over the rows of each part; or with weights (T, K) of tokens (T, C) for rows, the sum of
// their rows times the weights. Grid: as many parts as there may be, times their strips.
extern "C" __global__ void __launch_bounds__(32 * WARPS)
bias_parts(const Element* rows, const float* weights, const int* slot_of_row, const int* offsets, float* sums,
           Index experts, Index top_k, Index width, Index wide) {
    const Part part(offsets, experts, width, wide);
    if (part.start == part.end) return;
    BY_WIDTH(wide, sum_columns, rows, weights, slot_of_row, sums, part, top_k, width);
}

// An expert's parts, of `tall` rows each, where those of all experts stand one after another.
struct Parts {
    Index first = 0, count = 0;

    __device__ Parts(const int* offsets, int expert, Index tall) {
        for (int e = 0; e <= expert; ++e) {
            first += count;
            count = (offsets[e] - (e ? offsets[e - 1] : 0) + tall - 1) / tall;
        }
    }
};

// sums (parts, C) → out (E, C), over the parts of an expert, of `tall` rows each, in their order. Grid: (C / (32 · WARPS), E).
extern "C" __global__ void __launch_bounds__(32 * WARPS)
bias_gradient(const float* sums, const int* offsets, Element* out, Index tall, Index width) {
    const Index at = warp_of_grid() * 32 + threadIdx.x;
    if (at >= width) return;
    const Parts parts(offsets, blockIdx.y, tall);
    float sum[1] = {};
#pragma unroll 16
    for (Index part = parts.first; part < parts.first + parts.count; ++part) sum[0] += sums[part * width + at];
    store(out + blockIdx.y * width + at, narrow(sum));
}

// ends (count): where each part of the experts' rows ends, and those that there are not, where the last one does.
extern "C" __global__ void __launch_bounds__(32 * WARPS)
part_ends(const int* offsets, int* ends, Index experts, Index tall, Index count) {
    const Index part = warp_of_grid() * 32 + threadIdx.x;
    if (part >= count) return;
    Index first = 0, start = 0;
    for (int e = 0; e < experts; ++e) {
        const Index end = offsets[e], next = first + (end - start + tall - 1) / tall;
        if (part < next) {
            const Index here = start + (part - first + 1) * tall;
            ends[part] = static_cast<int>(here < end ? here : end);
            return;
        }
        first = next;
        start = end;
    }
    ends[part] = static_cast<int>(start);
}

template <int V> __device__ void sum_matrices(
    const Element* __restrict__ made, Element* __restrict__ out, const Parts& parts, Index size) {
    made += parts.first * size;
    out += blockIdx.y * size;
    const Index step = static_cast<Index>(gridDim.x) * 32 * WARPS * V;
    for (Index at = (warp_of_grid() * 32 + threadIdx.x) * V; at < size; at += step) {
        float sum[V] = {};
#pragma unroll 4
        for (Index part = 0; part < parts.count; ++part) add<V>(sum, made + part * size + at);
        copy(out + at, narrow(sum));
    }
}

// made (parts, …) of `size` elements each → out (E, …), over an expert's parts, in their order; zeros for one without
// rows. Grid: (any, E).
extern "C" __global__ void __launch_bounds__(32 * WARPS)
sum_parts(const Element* made, const int* offsets, Element* out, Index tall, Index size, Index wide) {
    const Parts parts(offsets, blockIdx.y, tall);
    BY_WIDTH(wide, sum_matrices, made, out, parts, size);
}

// Zeros in both weight gradients, of `size` elements an expert, of experts without rows. Grid: (any, E).
extern "C" __global__ void __launch_bounds__(32 * WARPS)
clear_idle(const int* offsets, Element* d_in, Index in_size, Element* d_out, Index out_size) {
    const Index expert = blockIdx.y, start = expert ? offsets[expert - 1] : 0;
    if (offsets[expert] > start) return;
    const Index first = warp_of_grid() * 32 + threadIdx.x, step = static_cast<Index>(gridDim.x) * 32 * WARPS;
    for (Index i = first; i < in_size; i += step) d_in[expert * in_size + i] = 0;
    for (Index i = first; i < out_size; i += step) d_out[expert * out_size + i] = 0;
}
