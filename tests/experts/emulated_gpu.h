// A GPU of one lane at a time, for running the kernels where there is none. It stands where ptx.cuh does.
//
// Every thread of the blocks that run together is a fiber; a barrier or an exchange between lanes hands the turn to the
// next one until all have come. Shared memory, warps, blocks and clusters are as the kernels see them on a GPU; timing,
// races and the machine's approximations are not.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <ucontext.h>
#include <vector>

#define __device__
#define __global__
#define __shared__ static
#define __launch_bounds__(...)
#define CLUSTER

using std::min;

constexpr unsigned ALL = 0xffffffffu;

struct Triple {  // unsigned, as the GPU's
    unsigned x, y, z;
};
struct uint4 {
    unsigned x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

static Triple threadIdx, blockIdx, blockDim, gridDim;

struct Barrier {
    int size = 0, here = 0, turn = 0;
};
struct Warp {
    Barrier barrier;
    unsigned value[32];
};
struct Block {
    Barrier barrier;
    std::vector<Warp> warps;
    std::vector<int> memory;
};
struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    Triple thread, block;
    Block* of;
    bool done = false;
};

static std::vector<Fiber> fibers;
static std::vector<Block> blocks;
static Barrier cluster;
static int current;
static ucontext_t scheduler;
static void (*kernel)(long long, long long, long long, long long, long long, long long, long long, long long, long long,
                      long long, long long, long long, long long, long long, long long, long long);
static long long arguments[16];

inline void yield() { swapcontext(&fibers[current].context, &scheduler); }

inline void wait(Barrier& barrier, int turn) {
    while (barrier.turn == turn) yield();
}

inline int arrive(Barrier& barrier) {
    const int turn = barrier.turn;
    if (++barrier.here == barrier.size) {
        barrier.here = 0;
        ++barrier.turn;
    }
    return turn;
}

inline Block& my_block() { return *fibers[current].of; }
inline int my_thread() { return threadIdx.y * blockDim.x + threadIdx.x; }
inline int my_lane() { return my_thread() % 32; }
inline Warp& my_warp() { return my_block().warps[my_thread() / 32]; }

inline void __syncthreads() { wait(my_block().barrier, arrive(my_block().barrier)); }
inline void __syncwarp() { wait(my_warp().barrier, arrive(my_warp().barrier)); }

template <typename T> T of_lane(T value, int lane) {
    Warp& warp = my_warp();
    std::memcpy(&warp.value[my_lane()], &value, 4);
    __syncwarp();
    T found;
    std::memcpy(&found, &warp.value[lane < 0 || lane > 31 ? my_lane() : lane], 4);
    __syncwarp();
    return found;
}
template <typename T> T __shfl_up_sync(unsigned, T value, int step) { return of_lane(value, my_lane() - step); }
template <typename T> T __shfl_xor_sync(unsigned, T value, int step) { return of_lane(value, my_lane() ^ step); }
template <typename T> T __shfl_sync(unsigned, T value, int lane) { return of_lane(value, lane); }

inline unsigned __ballot_sync(unsigned, bool vote) {
    Warp& warp = my_warp();
    warp.value[my_lane()] = vote;
    __syncwarp();
    unsigned votes = 0;
    for (int lane = 0; lane < 32; ++lane) votes |= warp.value[lane] << lane;
    __syncwarp();
    return votes;
}

static thread_local int cluster_turn[1 << 16];  // of every fiber
inline void cluster_arrive() { cluster_turn[current] = arrive(cluster); }
inline void cluster_wait() { wait(cluster, cluster_turn[current]); }
inline int* dynamic_shared() { return my_block().memory.data(); }
inline int of_block(const int* shared, int block) { return blocks[block].memory[shared - dynamic_shared()]; }

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __clz(unsigned bits) { return bits ? __builtin_clz(bits) : 32; }
inline float __uint_as_float(unsigned bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
inline unsigned __float_as_uint(float value) {
    unsigned bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}
inline float power_of_2(float x) { return exp2f(x); }
inline float reciprocal(float x) { return 1 / x; }
inline float at_least_0(float x) { return x < 0 ? 0.0f : 1.0f; }
inline float from_half(unsigned short bits) {
    _Float16 value;
    std::memcpy(&value, &bits, 2);
    return value;
}
inline unsigned half_bits(float value) {
    const _Float16 half = static_cast<_Float16>(value);
    unsigned short bits;
    std::memcpy(&bits, &half, 2);
    return bits;
}
inline unsigned two_halves(float first, float second) { return half_bits(first) | half_bits(second) << 16; }
inline unsigned bfloat_bits(float value) {
    const unsigned bits = __float_as_uint(value);
    return value != value ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline unsigned two_bfloats(float first, float second) { return bfloat_bits(first) | bfloat_bits(second) << 16; }
inline void store_line(void* to, const uint4& line) { std::memcpy(to, &line, 16); }

static void thread() {
    const long long* a = arguments;
    kernel(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11], a[12], a[13], a[14],
           a[15]);
    fibers[current].done = true;
    yield();
}

// Runs a kernel, `together` blocks at a time, each with `shared` bytes of dynamic shared memory full of rubbish.
extern "C" int run(void* function, const int* grid, const int* block, int together, int shared, const long long* given) {
    kernel = reinterpret_cast<decltype(kernel)>(function);
    std::memcpy(arguments, given, sizeof(arguments));
    gridDim = {grid[0], grid[1], 1};
    blockDim = {block[0], block[1], 1};
    const int threads = block[0] * block[1], count = grid[0] * grid[1];
    for (int first = 0; first < count; first += together) {
        blocks.assign(together, {});
        fibers.clear();
        fibers.resize(together * threads);
        cluster = {together * threads};
        for (int b = 0; b < together; ++b) {
            blocks[b].barrier.size = threads;
            blocks[b].warps.resize(threads / 32);
            for (Warp& warp : blocks[b].warps) warp.barrier.size = 32;
            blocks[b].memory.assign(shared / 4, 0x7f0f0f0f);
            for (int t = 0; t < threads; ++t) {
                Fiber& fiber = fibers[b * threads + t];
                fiber.stack.reset(new char[1 << 14]);
                std::memset(fiber.stack.get(), 0xff, 1 << 14);  // NaN where nothing is written
                fiber.thread = {t % block[0], t / block[0], 0};
                fiber.block = {(first + b) % grid[0], (first + b) / grid[0], 0};
                fiber.of = &blocks[b];
                getcontext(&fiber.context);
                fiber.context.uc_stack.ss_sp = fiber.stack.get();
                fiber.context.uc_stack.ss_size = 1 << 14;
                makecontext(&fiber.context, thread, 0);
            }
        }
        for (int left = fibers.size(), idle = 0; left > 0;) {
            const int before = left;
            for (current = 0; current < static_cast<int>(fibers.size()); ++current) {
                if (fibers[current].done) continue;
                threadIdx = fibers[current].thread;
                blockIdx = fibers[current].block;
                swapcontext(&scheduler, &fibers[current].context);
                left -= fibers[current].done;
            }
            idle = left == before ? idle + 1 : 0;
            if (idle > 1000000) return 1;  // a barrier that nobody else comes to
        }
    }
    return 0;
}
