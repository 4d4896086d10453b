// Counts the slots of every expert and ranks them, in one kernel. It reads the indices once where the cluster holds all
// of them, 256 a warp; else twice.
//
// The grid is one cluster of BLOCKS thread blocks. Slots are cut into as many contiguous pieces as the cluster has
// warps, in order. A warp ranks its piece 32 slots at a time: lanes with the same expert find one another by ballots
// over the bits of its number, and the warp's own counters, in shared memory, say how many came before. Then the
// counters are summed over warps, and over blocks through distributed shared memory; a slot's row is where its expert
// starts + what earlier blocks, earlier warps and earlier slots of its warp have of that expert. Integers throughout:
// the result is the stable sort, whatever the order of execution.
//
// No workspace, nothing to clear, no host: the barrier between counting and placing is the cluster's own.

constexpr int ITEMS = 8;           // slots that a lane holds at once
constexpr int TILE = 32 * ITEMS;   // slots that a warp holds at once

// bin[i]: the expert of slot first + 32·i + lane; `experts` for one that is dropped, −1 past the last slot.
__device__ inline void load(
    const long long* indices, long long first, long long slots, int experts, int lane, int (&bin)[ITEMS]) {
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
        const long long slot = first + 32 * i + lane;
        const unsigned long long expert = slot < slots ? indices[slot] : 0;
        bin[i] = slot >= slots ? -1 : expert < experts ? static_cast<int>(expert) : experts;
    }
}

// rank[i]: how many slots of the same bin this warp has counted before; counts them.
__device__ inline void rank_and_count(
    const int (&bin)[ITEMS], int* counts, int bits, int lane, int (&rank)[ITEMS]) {
    unsigned peers[ITEMS];
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) peers[i] = __ballot_sync(ALL, bin[i] >= 0);
    for (int bit = 0; bit < bits; ++bit) {
#pragma unroll
        for (int i = 0; i < ITEMS; ++i) {
            const bool set = bin[i] >> bit & 1;
            const unsigned others = __ballot_sync(ALL, set);
            peers[i] &= set ? others : ~others;
        }
    }
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
        const bool there = bin[i] >= 0;
        const int before = there ? counts[bin[i]] : 0;
        __syncwarp();
        rank[i] = before + __popc(peers[i] & ((1u << lane) - 1));
        if (there && peers[i] >> lane == 1) counts[bin[i]] = rank[i] + 1;  // the last of them
        __syncwarp();
    }
}

__device__ inline int sum_of_lanes_to(int value, int lane) {
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const int below = __shfl_up_sync(ALL, value, step);
        if (lane >= step) value += below;
    }
    return value;
}

// indices (N,) → row_of_slot (N,), its inverse slot_of_row (N,), offsets (E,) where each expert's rows end. An index
// outside 0 … E − 1 is a dropped slot: sorted last. Shared memory: warps · (bins | 1) + 3 · bins ints, bins = E + 1.
extern "C" __global__ void CLUSTER __launch_bounds__(1024)
route(const long long* __restrict__ indices, int* __restrict__ row_of_slot, int* __restrict__ slot_of_row,
      int* __restrict__ offsets, long long slots, long long experts_) {
    extern __shared__ int shared[];
    const int experts = static_cast<int>(experts_), bins = experts + 1, stride = bins | 1;
    const int block = blockIdx.x, warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int* counts = shared + warp * stride;      // of this warp, then of the warps before it
    int* totals = shared + warps * stride;     // of this block; other blocks read it
    int* everywhere = totals + bins;           // of all blocks
    int* starts = everywhere + bins;           // of the blocks before, then the block's first row of a bin
    const int bits = 32 - __clz(experts);

    const long long tiles = (slots + TILE - 1) / TILE, pieces = static_cast<long long>(BLOCKS) * warps;
    const long long piece = (tiles + pieces - 1) / pieces;  // tiles of a warp
    const long long first = (static_cast<long long>(block) * warps + warp) * piece * TILE;
    int bin[ITEMS], rank[ITEMS];
    for (int i = lane; i < bins; i += 32) counts[i] = 0;
    __syncwarp();
    for (long long tile = 0; tile < piece; ++tile) {
        load(indices, first + tile * TILE, slots, experts, lane, bin);
        rank_and_count(bin, counts, bits, lane, rank);
    }
    __syncthreads();
    for (int i = warp; i < bins; i += warps) {  // a lane for every warp
        const int count = lane < warps ? shared[lane * stride + i] : 0;
        const int up_to = sum_of_lanes_to(count, lane);
        if (lane < warps) shared[lane * stride + i] = up_to - count;
        if (lane == 31) totals[i] = up_to;
    }
    __syncthreads();
    cluster_arrive();
    cluster_wait();
    for (int i = threadIdx.x; i < bins; i += blockDim.x) {
        int before = 0, all = 0;
#pragma unroll
        for (int b = 0; b < BLOCKS; ++b) {
            if (b == block) before = all;
            all += of_block(totals + i, b);
        }
        everywhere[i] = all;
        starts[i] = before;
    }
    __syncthreads();
    cluster_arrive();  // this block has read what it needs of the others
    if (warp == 0) {
        int before = 0;
        for (int i = lane; i - lane < bins; i += 32) {
            const int all = i < bins ? everywhere[i] : 0;
            const int up_to = before + sum_of_lanes_to(all, lane);
            if (i < bins) starts[i] += up_to - all;
            if (block == 0 && i < experts) offsets[i] = up_to;
            before = __shfl_sync(ALL, up_to, 31);
        }
    }
    __syncthreads();
    for (long long tile = 0; tile < piece; ++tile) {
        if (piece > 1) {  // counts go on from the warps before
            load(indices, first + tile * TILE, slots, experts, lane, bin);
            rank_and_count(bin, counts, bits, lane, rank);
        }
#pragma unroll
        for (int i = 0; i < ITEMS; ++i) {
            if (bin[i] < 0) continue;
            const long long slot = first + tile * TILE + 32 * i + lane;
            const int row = starts[bin[i]] + rank[i] + (piece > 1 ? 0 : counts[bin[i]]);
            row_of_slot[slot] = row;
            slot_of_row[row] = static_cast<int>(slot);
        }
    }
    cluster_wait();  // until then other blocks may read this one's totals
}
