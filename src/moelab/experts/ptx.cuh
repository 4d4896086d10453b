// What the kernels ask of the machine beyond the language: conversions, approximations, and clusters. It stands before
// each of them. No header of the CUDA toolkit is needed.
//
// Compiled with BLOCKS, the thread blocks of a cluster: 8 from compute capability 9.0 on, else 1.

constexpr unsigned ALL = 0xffffffffu;

// 2^x, relative error 2^-22.
__device__ inline float power_of_2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// 1 / x, relative error 2^-23.
__device__ inline float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// 1 where x ≥ 0, or is NaN; else 0.
__device__ inline float at_least_0(float x) {
    float y;
    asm("set.geu.f32.f32 %0, %1, 0f00000000;" : "=f"(y) : "f"(x));
    return y;
}

__device__ inline float from_half(unsigned short bits) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(bits));
    return y;
}

// Two floats as halves in one word, the first one low; rounded to nearest even.
__device__ inline unsigned two_halves(float first, float second) {
    unsigned word;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
    return word;
}

__device__ inline unsigned two_bfloats(float first, float second) {
    unsigned word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
    return word;
}

// One store of 16 bytes: the compiler takes a copy of four loaded words apart.
__device__ inline void store_line(void* to, const uint4& line) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};"
                 :: "l"(__cvta_generic_to_global(to)), "r"(line.x), "r"(line.y), "r"(line.z), "r"(line.w)
                 : "memory");
}

// Thread block clusters (PTX ISA, barrier.cluster and mapa). Without them a cluster is one block.
#if BLOCKS > 1
#define CLUSTER __cluster_dims__(BLOCKS, 1, 1)

__device__ inline void cluster_arrive() { asm volatile("barrier.cluster.arrive.release;" ::: "memory"); }

__device__ inline void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }

// The value that stands at this shared address in another block of the cluster.
__device__ inline int of_block(const int* shared, int block) {
    unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(shared)), there;
    int value;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(block));
    asm volatile("ld.shared::cluster.s32 %0, [%1];" : "=r"(value) : "r"(there) : "memory");
    return value;
}
#else
#define CLUSTER

__device__ inline void cluster_arrive() { __syncthreads(); }

__device__ inline void cluster_wait() {}

__device__ inline int of_block(const int* shared, int) { return *shared; }
#endif
