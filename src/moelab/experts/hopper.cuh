// What a Hopper GPU has beyond the language (PTX ISA 8.0, target sm_90a): barriers in shared memory that count bytes,
// the tensor memory accelerator, and products by a warpgroup. It stands after ptx.cuh and before hopper.cu.

// A tensor and the box of it that is moved at once, as the driver encodes it.
struct alignas(64) TensorMap {
    unsigned long long words[16];
};
#define MAP const __grid_constant__ TensorMap

typedef unsigned Address;  // in shared memory, of this block

extern __shared__ __align__(1024) unsigned char dynamic[];

__device__ inline Address shared_base() { return static_cast<Address>(__cvta_generic_to_shared(dynamic)); }

// Four 8 × 8 matrices of 16 bits. Lane l holds of each the elements 2·(l % 4) and the next of row l / 4; `row` is where row
// l % 8 of matrix l / 8 goes.
__device__ inline void store_matrices(Address row, unsigned a, unsigned b, unsigned c, unsigned d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};"
                 :: "r"(row), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}

__device__ inline uint4 load_line(Address at) {
    uint4 line;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(line.x), "=r"(line.y), "=r"(line.z), "=r"(line.w) : "r"(at));
    return line;
}

// From global memory, of what is read no more.
__device__ inline uint4 load_once(const void* from) {
    uint4 line;
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(line.x), "=r"(line.y), "=r"(line.z), "=r"(line.w) : "l"(__cvta_generic_to_global(from)));
    return line;
}

__device__ inline void clear_line(Address at) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" :: "r"(at), "r"(0) : "memory");
}

__device__ inline int rank_in_cluster() {
    int rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

// Barriers: a phase ends when `count` have arrived and the bytes that they expect have come.

__device__ inline void barrier_create(Address barrier, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(barrier), "r"(count) : "memory");
}

// Makes created barriers known to the cluster and to the tensor memory accelerator.
__device__ inline void barriers_created() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ inline void barrier_expect(Address barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(barrier), "r"(bytes) : "memory");
}

// Arrives at the barrier at this address in a block of the cluster.
__device__ inline void barrier_arrive(Address barrier, int block) {
    Address there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(barrier), "r"(block));
    // Released in this block's memory only: what was read is all that counts, and a fence for the cluster costs a
    // microsecond.
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" :: "r"(there) : "memory");
}

// Arrives at a barrier of this block.
__device__ inline void barrier_arrive(Address barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(barrier) : "memory");
}

// Waits for the end of the phase of this parity; the phase before the first has parity 1 and has ended.
__device__ inline void barrier_wait(Address barrier, int parity) {
    asm volatile(
        "{\n"
        ".reg .pred ended;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 ended, [%0], %1;\n"
        "@ended bra past;\n"
        "bra again;\n"
        "past:\n"
        "}" :: "r"(barrier), "r"(parity) : "memory");
}

// Among the 128 threads of a warpgroup.
__device__ inline void warpgroup_barrier() { asm volatile("bar.sync %0, 128;" :: "r"(threadIdx.x / 128 + 1) : "memory"); }

// Among those of the warpgroups 1 and 2.
__device__ inline void consumers_barrier() { asm volatile("bar.sync 6, 256;" ::: "memory"); }

// What this thread has read and written in shared memory comes before what the tensor cores and the tensor memory
// accelerator do there next.
__device__ inline void before_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// The tensor memory accelerator. A box comes as rows of 128 bytes, in which the 16-byte line l of row r stands at line
// l ^ (r % 8); `to` is a multiple of 1,024. What is outside the tensor is 0.

__device__ inline void tensor_load(const TensorMap& map, Address to, int x, int y, Address barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
        :: "r"(to), "l"(&map), "r"(x), "r"(y), "r"(barrier) : "memory");
}

// To the same address in every block of the cluster, each of whose barriers hears of it.
__device__ inline void tensor_load_all(const TensorMap& map, Address to, int x, int y, Address barrier) {
#if BLOCKS > 1
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
        " [%0], [%1, {%2, %3}], [%4], %5;"
        :: "r"(to), "l"(&map), "r"(x), "r"(y), "r"(barrier), "h"(static_cast<unsigned short>((1 << BLOCKS) - 1))
        : "memory");
#else
    tensor_load(map, to, x, y, barrier);
#endif
}

// A box from shared memory; rows and columns outside the tensor are not stored.
__device__ inline void tensor_store(const TensorMap& map, Address from, int x, int y) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];"
                 :: "l"(&map), "r"(x), "r"(y), "r"(from) : "memory");
}

// Ends a group of this thread's stores; and waits until all groups have read what they store.
__device__ inline void stores_issued() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
__device__ inline void stores_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }

__device__ inline void tensor_prefetch(const TensorMap& map) {
    asm volatile("prefetch.tensormap [%0];" :: "l"(&map) : "memory");
}

// Registers of a warpgroup's threads, out of what the block was launched with.
template <int COUNT> __device__ inline void fewer_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(COUNT));
}
template <int COUNT> __device__ inline void more_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(COUNT));
}

// Products by a warpgroup of boxes as the tensor memory accelerator leaves them. A descriptor says where an operand
// stands (PTX ISA, "Shared memory matrix layout"). With its rows along the summed dimension (64 of it a row), groups of
// 8 rows are 1,024 bytes apart. ACROSS, its rows along the other one, groups of 8 of the summed dimension are 1,024
// bytes apart, and groups of 64 of the other one `far`.
__device__ inline unsigned long long descriptor(Address at, int far) {
    return 1ull << 62 | 1024ull >> 4 << 32 | static_cast<unsigned long long>(far >> 4) << 16 | (at & 0x3ffff) >> 4;
}

__device__ inline void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void products_issued() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int LEFT> __device__ inline void products_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(LEFT) : "memory");
}

// d (64, 256) = a (64, 16) · b (16, 256), with `add` + d; d[0] has the first 128 columns. Thread t holds of row
// 16·(t / 32) + t % 32 / 4, and of the row 8 below, columns 8·i + 2·(t % 4) and the next, for i < 16: d[…][4·i] and
// d[…][4·i + 1], and d[…][4·i + 2] and d[…][4·i + 3].
template <int A_ACROSS, int B_ACROSS>
__device__ inline void multiply(float (&d)[2][64], unsigned long long a, unsigned long long b, int add) {
    asm volatile(
        "{\n"
        ".reg .pred add;\n"
        "setp.ne.b32 add, %130, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
        "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
        "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
        "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
        "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, "
        "%128, %129, add, 1, 1, %131, %132;\n"
        "}"
        : "+f"(d[0][0]), "+f"(d[0][1]), "+f"(d[0][2]), "+f"(d[0][3]), "+f"(d[0][4]), "+f"(d[0][5]), "+f"(d[0][6]), "+f"(d[0][7]),
          "+f"(d[0][8]), "+f"(d[0][9]), "+f"(d[0][10]), "+f"(d[0][11]), "+f"(d[0][12]), "+f"(d[0][13]), "+f"(d[0][14]), "+f"(d[0][15]),
          "+f"(d[0][16]), "+f"(d[0][17]), "+f"(d[0][18]), "+f"(d[0][19]), "+f"(d[0][20]), "+f"(d[0][21]), "+f"(d[0][22]), "+f"(d[0][23]),
          "+f"(d[0][24]), "+f"(d[0][25]), "+f"(d[0][26]), "+f"(d[0][27]), "+f"(d[0][28]), "+f"(d[0][29]), "+f"(d[0][30]), "+f"(d[0][31]),
          "+f"(d[0][32]), "+f"(d[0][33]), "+f"(d[0][34]), "+f"(d[0][35]), "+f"(d[0][36]), "+f"(d[0][37]), "+f"(d[0][38]), "+f"(d[0][39]),
          "+f"(d[0][40]), "+f"(d[0][41]), "+f"(d[0][42]), "+f"(d[0][43]), "+f"(d[0][44]), "+f"(d[0][45]), "+f"(d[0][46]), "+f"(d[0][47]),
          "+f"(d[0][48]), "+f"(d[0][49]), "+f"(d[0][50]), "+f"(d[0][51]), "+f"(d[0][52]), "+f"(d[0][53]), "+f"(d[0][54]), "+f"(d[0][55]),
          "+f"(d[0][56]), "+f"(d[0][57]), "+f"(d[0][58]), "+f"(d[0][59]), "+f"(d[0][60]), "+f"(d[0][61]), "+f"(d[0][62]), "+f"(d[0][63]),
          "+f"(d[1][0]), "+f"(d[1][1]), "+f"(d[1][2]), "+f"(d[1][3]), "+f"(d[1][4]), "+f"(d[1][5]), "+f"(d[1][6]), "+f"(d[1][7]),
          "+f"(d[1][8]), "+f"(d[1][9]), "+f"(d[1][10]), "+f"(d[1][11]), "+f"(d[1][12]), "+f"(d[1][13]), "+f"(d[1][14]), "+f"(d[1][15]),
          "+f"(d[1][16]), "+f"(d[1][17]), "+f"(d[1][18]), "+f"(d[1][19]), "+f"(d[1][20]), "+f"(d[1][21]), "+f"(d[1][22]), "+f"(d[1][23]),
          "+f"(d[1][24]), "+f"(d[1][25]), "+f"(d[1][26]), "+f"(d[1][27]), "+f"(d[1][28]), "+f"(d[1][29]), "+f"(d[1][30]), "+f"(d[1][31]),
          "+f"(d[1][32]), "+f"(d[1][33]), "+f"(d[1][34]), "+f"(d[1][35]), "+f"(d[1][36]), "+f"(d[1][37]), "+f"(d[1][38]), "+f"(d[1][39]),
          "+f"(d[1][40]), "+f"(d[1][41]), "+f"(d[1][42]), "+f"(d[1][43]), "+f"(d[1][44]), "+f"(d[1][45]), "+f"(d[1][46]), "+f"(d[1][47]),
          "+f"(d[1][48]), "+f"(d[1][49]), "+f"(d[1][50]), "+f"(d[1][51]), "+f"(d[1][52]), "+f"(d[1][53]), "+f"(d[1][54]), "+f"(d[1][55]),
          "+f"(d[1][56]), "+f"(d[1][57]), "+f"(d[1][58]), "+f"(d[1][59]), "+f"(d[1][60]), "+f"(d[1][61]), "+f"(d[1][62]), "+f"(d[1][63])
        : "l"(a), "l"(b), "r"(add), "n"(A_ACROSS), "n"(B_ACROSS));
}

// The compiler is not to move what is held here before or after this.
__device__ inline void hold(float (&d)[64]) {
#pragma unroll
    for (int i = 0; i < 64; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
