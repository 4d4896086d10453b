// What hopper.cuh asks of a Hopper GPU, on the emulated one: as the PTX ISA describes it. Copies are done at once and
// products where they are issued; what is asynchronous on the machine is in order here.

struct TensorMap {
    const unsigned short* base;
    int columns, rows, box;
};
#define MAP const TensorMap&
#define __align__(...)
#define dynamic reinterpret_cast<unsigned char*>(dynamic_shared())

struct float2 {
    float x, y;
};
struct float4 {
    float x, y, z, w;
};
struct uint2 {
    unsigned x, y;
};
inline float2 make_float2(float x, float y) { return {x, y}; }

typedef unsigned Address;  // whose block it is, and from the start of its shared memory

inline Address shared_base() { return blockIdx.x % BLOCKS << 24; }
inline unsigned char* memory_of(Block& block, Address at) {
    return reinterpret_cast<unsigned char*>(block.memory.data()) + (at & 0xffffff);
}
inline uint4 load_line(Address at) { return *reinterpret_cast<uint4*>(memory_of(my_block(), at)); }
inline uint4 load_once(const void* from) { return *static_cast<const uint4*>(from); }
inline void clear_line(Address at) { std::memset(memory_of(my_block(), at), 0, 16); }
inline int max(int a, int b) { return a > b ? a : b; }
inline int rank_in_cluster() { return blockIdx.x % BLOCKS; }

struct Phases {
    short count, pending;
    int bytes : 31;
    unsigned parity : 1;
};
static_assert(sizeof(Phases) == 8);

inline Phases& phases_of(Block& block, Address at) { return *reinterpret_cast<Phases*>(memory_of(block, at)); }

inline void check(Phases& phases) {
    if (phases.pending == 0 && phases.bytes == 0) {
        phases.parity ^= 1;
        phases.pending = phases.count;
    }
}

inline void barrier_create(Address barrier, int count) {
    phases_of(my_block(), barrier) = {static_cast<short>(count), static_cast<short>(count), 0, 0};
}
inline void barriers_created() {}

inline void barrier_expect(Address barrier, int bytes) {
    Phases& phases = phases_of(my_block(), barrier);
    phases.bytes += bytes;
    --phases.pending;
    check(phases);
}

inline void barrier_arrive(Address barrier, int block) {
    Phases& phases = phases_of(blocks[block], barrier);
    --phases.pending;
    check(phases);
}

inline void barrier_arrive(Address barrier) { barrier_arrive(barrier, rank_in_cluster()); }

inline void barrier_wait(Address barrier, int parity) {
    while (phases_of(my_block(), barrier).parity == static_cast<unsigned>(parity)) yield();
}

static Barrier warpgroups[8][16];
inline void warpgroup_barrier(int first = 0) {
    Barrier& barrier = warpgroups[&my_block() - blocks.data()][first + threadIdx.x / 128];
    barrier.size = 128;
    wait(barrier, arrive(barrier));
}

inline void consumers_barrier() {
    static Barrier all[8];
    Barrier& barrier = all[&my_block() - blocks.data()];
    barrier.size = 256;
    wait(barrier, arrive(barrier));
}

inline void before_async() {}

inline void store_matrices(Address row, unsigned a, unsigned b, unsigned c, unsigned d) {
    const unsigned words[4] = {a, b, c, d};
    for (int matrix = 0; matrix < 4; ++matrix) {
        const Address to = of_lane(row, 8 * matrix + my_lane() / 4);
        std::memcpy(memory_of(my_block(), to + my_lane() % 4 * 4), &words[matrix], 4);
    }
}

inline unsigned swizzled(unsigned at) { return at ^ (at >> 7 & 7) << 4; }

inline void load_into(Block& block, const TensorMap& map, Address to, int x, int y, Address barrier) {
    for (int row = 0; row < map.box; ++row)
        for (int column = 0; column < 64; ++column) {
            const bool inside = x + column < map.columns && y + row < map.rows;
            const unsigned short value = inside ? map.base[static_cast<long long>(y + row) * map.columns + x + column] : 0;
            std::memcpy(memory_of(block, swizzled(to + row * 128 + column * 2)), &value, 2);
        }
    Phases& phases = phases_of(block, barrier);
    phases.bytes -= map.box * 128;
    check(phases);
}

inline void tensor_load(const TensorMap& map, Address to, int x, int y, Address barrier) {
    load_into(my_block(), map, to, x, y, barrier);
}

inline void tensor_load_all(const TensorMap& map, Address to, int x, int y, Address barrier) {
    for (Block& block : blocks) load_into(block, map, to, x, y, barrier);
}

inline void tensor_store(const TensorMap& map, Address from, int x, int y) {
    for (int row = 0; row < map.box; ++row)
        for (int column = 0; column < 64; ++column)
            if (x + column < map.columns && y + row < map.rows) {
                void* to = const_cast<unsigned short*>(map.base) + static_cast<long long>(y + row) * map.columns + x + column;
                std::memcpy(to, memory_of(my_block(), swizzled(from + row * 128 + column * 2)), 2);
            }
}
inline void stores_issued() {}
inline void stores_read() {}

inline void tensor_prefetch(const TensorMap&) {}

template <int COUNT> void fewer_registers() {}
template <int COUNT> void more_registers() {}

inline unsigned long long descriptor(Address at, int far) {
    return 1ull << 62 | 1024ull >> 4 << 32 | static_cast<unsigned long long>(far >> 4) << 16 | (at & 0x3ffff) >> 4;
}

// Element (i, k) of an operand, i its row of the left or column of the right one.
inline float element(unsigned long long description, int across, int i, int k) {
    const unsigned start = (description & 0x3fff) << 4, far = (description >> 16 & 0x3fff) << 4;
    const unsigned group = (description >> 32 & 0x3fff) << 4;
    const unsigned at = across ? start + i / 64 * far + i % 64 * 2 + k / 8 * group + k % 8 * 128
                               : start + i / 8 * group + i % 8 * 128 + k * 2;
    unsigned short bits;
    std::memcpy(&bits, memory_of(my_block(), swizzled(at)), 2);
    return __uint_as_float(static_cast<unsigned>(bits) << 16);
}

// The products of a warpgroup's four warps are one: none is done before all are issued.
inline void products_begin() { warpgroup_barrier(8); }
inline void products_issued() {}
template <int LEFT> void products_wait() { warpgroup_barrier(8); }

template <int A_ACROSS, int B_ACROSS>
void multiply_columns(float (&d)[64], unsigned long long a, unsigned long long b, int add, int first) {
    const int lane = threadIdx.x % 32, row = threadIdx.x % 128 / 32 * 16 + lane / 4;
    for (int i = 0; i < 64; ++i) {
        float sum = add ? d[i] : 0;
        for (int k = 0; k < 16; ++k)
            sum += element(a, A_ACROSS, row + i % 4 / 2 * 8, k) *
                   element(b, B_ACROSS, first + i / 4 * 8 + lane % 4 * 2 + i % 2, k);
        d[i] = sum;
    }
}

template <int A_ACROSS, int B_ACROSS>
void multiply(float (&d)[2][64], unsigned long long a, unsigned long long b, int add) {
    multiply_columns<A_ACROSS, B_ACROSS>(d[0], a, b, add, 0);
    multiply_columns<A_ACROSS, B_ACROSS>(d[1], a, b, add, 128);
}

inline void hold(float (&)[64]) {}
