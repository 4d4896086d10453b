// The activations, by the numbers that ACTIVATION knows them by. It stands after ptx.cuh.

#define GELU 0
#define GELU_TANH 1
#define RELU2 2
#define SILU 3
#define SWIGLU 4

constexpr float LOG2E = 1.4426950408889634f;

struct Curve {
    float height, slope;
};

// act(x) and act'(x); of swiglu its gate's, silu.
__device__ inline Curve curve(float x) {
#if ACTIVATION == GELU && defined(FLOAT32)
    // Φ and its density share one exponential: erfc(y) = poly(1 / (1 + 0.3275911 y)) exp(−y²), y = |x| / √2, within
    // 1.5e-7 (Abramowitz and Stegun 1964, 7.1.26; their coefficients halved).
    const float t = reciprocal(1.0f + 0.23164190f * fabsf(x));
    const float bell = power_of_2(-0.5f * LOG2E * x * x);
    const float poly =
        ((((0.53070271f * t - 0.72657601f) * t + 0.71070687f) * t - 0.14224837f) * t + 0.12741480f) * t;
    const float tail = poly * bell;
    const float below = x < 0.0f ? tail : 1.0f - tail;
    return {x * below, below + 0.39894228f * x * bell};
#elif ACTIVATION == GELU
    // log2 Φ(−|x|) by a polynomial: within 1.1e-6 in x·Φ(x) and 2.4e-5 in its derivative (triton_kernels.py says more).
    const float m = fabsf(x);
    float p = -0.00043716971f * m + 0.0068323477f;
    p = p * m - 0.051218577f;
    p = p * m - 0.46061057f;
    p = p * m - 1.1505370f;
    const float tail = power_of_2(p * m - 1.0000669f);
    const float density = power_of_2(-0.5f * LOG2E * x * x - 1.3257481f);
    return {fmaxf(x, 0.0f) - m * tail, fabsf(at_least_0(x) - tail) + x * density};
#elif ACTIVATION == GELU_TANH
    const float s = reciprocal(1.0f + power_of_2(-1.5957691f * LOG2E * (x + 0.044715f * x * x * x)));
    return {x * s, s + x * s * (1.0f - s) * 1.5957691f * (1.0f + 0.134145f * x * x)};
#elif ACTIVATION == RELU2
    const float above = x < 0.0f ? 0.0f : x;  // NaN stays NaN
    return {above * above, 2.0f * above};
#else
    const float s = reciprocal(1.0f + power_of_2(-LOG2E * x));
    return {x * s, s + x * s * (1.0f - s)};
#endif
}
