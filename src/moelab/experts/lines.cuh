// Numbers of a tensor as one access moves them, 16 bytes or one by itself, and as floats to calculate with. It stands after
// ptx.cuh.
//
// Compiled with FLOAT32 or FLOAT16; else numbers are bf16.

#ifdef FLOAT32
using Element = float;
constexpr int LINE = 4;  // elements of 16 bytes
#else
using Element = unsigned short;
constexpr int LINE = 8;
#endif

// V elements as one access moves them.
template <int V> struct Chunk;
template <> struct Chunk<LINE> { uint4 line; };
template <> struct Chunk<1> { Element element; };

template <int V> __device__ inline Chunk<V> load(const Element* from) {
    return *reinterpret_cast<const Chunk<V>*>(from);
}

template <int V> __device__ inline void store(Element* to, const Chunk<V>& chunk) {
    *reinterpret_cast<Chunk<V>*>(to) = chunk;
}

// The same of a chunk that the compiler would take apart.
__device__ inline void copy(Element* to, const Chunk<LINE>& chunk) { store_line(to, chunk.line); }

__device__ inline void copy(Element* to, const Chunk<1>& chunk) { *to = chunk.element; }

__device__ inline void widen(const uint4& line, float (&value)[LINE]) {
    const unsigned word[4] = {line.x, line.y, line.z, line.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#if defined(FLOAT32)
        value[i] = __uint_as_float(word[i]);
#elif defined(FLOAT16)
        value[2 * i] = from_half(word[i] & 0xffff);
        value[2 * i + 1] = from_half(word[i] >> 16);
#else
        value[2 * i] = __uint_as_float(word[i] << 16);
        value[2 * i + 1] = __uint_as_float(word[i] & 0xffff0000u);
#endif
    }
}

__device__ inline void widen(const Chunk<LINE>& chunk, float (&value)[LINE]) { widen(chunk.line, value); }

__device__ inline void widen(const Chunk<1>& chunk, float (&value)[1]) {
#if defined(FLOAT32)
    value[0] = chunk.element;
#elif defined(FLOAT16)
    value[0] = from_half(chunk.element);
#else
    value[0] = __uint_as_float(static_cast<unsigned>(chunk.element) << 16);
#endif
}

__device__ inline unsigned two(float first, float second) {
#ifdef FLOAT16
    return two_halves(first, second);
#else
    return two_bfloats(first, second);
#endif
}

__device__ inline Chunk<LINE> narrow(const float (&value)[LINE]) {
    unsigned word[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#ifdef FLOAT32
        word[i] = __float_as_uint(value[i]);
#else
        word[i] = two(value[2 * i], value[2 * i + 1]);
#endif
    }
    return {make_uint4(word[0], word[1], word[2], word[3])};
}

__device__ inline Chunk<1> narrow(const float (&value)[1]) {
    Chunk<1> chunk;
#ifdef FLOAT32
    chunk.element = value[0];
#else
    chunk.element = static_cast<Element>(two(value[0], 0.0f));
#endif
    return chunk;
}

template <int V> __device__ inline void add(float (&sum)[V], const Element* from) {
    float value[V];
    widen(load<V>(from), value);
#pragma unroll
    for (int i = 0; i < V; ++i) sum[i] += value[i];
}
