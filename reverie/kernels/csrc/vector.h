// Vectors of floats as wide as the target has them, by the compilers' vector extensions: no intrinsics, so that
// one source serves AVX-512, AVX2 and whatever else there is.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int W = 16;       // floats in a vector
constexpr int PANEL = 4;    // vectors side by side in a tile of a matrix product
#elif defined(__AVX__)
constexpr int W = 8;
constexpr int PANEL = 2;
#else
constexpr int W = 4;
constexpr int PANEL = 2;
#endif

typedef float V __attribute__((vector_size(4 * W)));
typedef int32_t VI __attribute__((vector_size(4 * W)));
typedef uint32_t VU __attribute__((vector_size(4 * W)));
typedef uint16_t VH __attribute__((vector_size(2 * W)));

static inline long up(long n) { return (n + W - 1) / W * W; }  // to whole vectors

constexpr float LOG2E = 1.44269504088896341f;
constexpr float INF = std::numeric_limits<float>::infinity();

static inline V all(float x) { return x - V{}; }  // x - 0 is x, so that it costs nothing; x + 0 is not, for -0
static inline V vmax(V a, V b) { return a > b ? a : b; }

static inline V load(const float* p) {
    V v;
    memcpy(&v, p, sizeof v);
    return v;
}
static inline void store(float* p, V v) { memcpy(p, &v, sizeof v); }

// bfloat16 is the upper half of a float; stored, it is rounded to the nearest, ties to even, and NaN stays NaN.
static inline V load(const uint16_t* p) {
    VH h;
    memcpy(&h, p, sizeof h);
    VU u = __builtin_convertvector(h, VU) << 16;
    V v;
    memcpy(&v, &u, sizeof v);
    return v;
}
// (Numbers below 2^-126 are zero to the processor's own instruction.)
static inline void store(uint16_t* p, V v) {
#ifdef __AVX512BF16__
    const __m256bh h = _mm512_cvtneps_pbh((__m512)v);
    memcpy(p, &h, sizeof h);
#else
    VU u;
    memcpy(&u, &v, sizeof v);
    VU rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    VU nan = (u >> 16) | 0x40u;
    VH h = __builtin_convertvector(v != v ? nan : rounded, VH);
    memcpy(p, &h, sizeof h);
#endif
}

// The first n < W numbers of a vector; the others are zero, and are not written.
#ifdef __AVX512BW__
static inline V load_part(const float* p, int n) { return (V)_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p); }
static inline V load_part(const uint16_t* p, int n) {
    const __m256i h = _mm256_maskz_loadu_epi16(__mmask16((1u << n) - 1), p);
    return (V)_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16);
}
static inline void store_part(float* p, V v, int n) { _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), (__m512)v); }
static inline void store_part(uint16_t* p, V v, int n) {
    uint16_t full[W];
    store(full, v);
    _mm256_mask_storeu_epi16(p, __mmask16((1u << n) - 1), _mm256_loadu_si256((const __m256i*)full));
}
#else
template <class T> static inline V load_part(const T* p, int n) {
    T full[W] = {};
    memcpy(full, p, n * sizeof(T));
    return load(full);
}
template <class T> static inline void store_part(T* p, V v, int n) {
    T full[W];
    store(full, v);
    memcpy(p, full, n * sizeof(T));
}
#endif
template <class T> static inline V load_n(const T* p, long n) { return n >= W ? load(p) : load_part(p, int(n)); }
template <class T> static inline void store_n(T* p, V v, long n) {
    if (n >= W) store(p, v);
    else store_part(p, v, int(n));
}

// 2^x within 2e-7 of itself; 0 below 2^-126; NaN stays NaN. BELOW: x is known to lie below 128.
template <bool BELOW = false> static inline V exp2v(V x) {
    const V magic = all(12582912.0f);  // 1.5 * 2^23: what is added to it is rounded to a whole number
    V low = x < all(-126.0f) ? all(-126.0f) : x;
    V c = low;
    if constexpr (!BELOW) c = low > all(128.0f) ? all(128.0f) : low;
    V t = c + magic;
    V r = c - (t - magic);
    V p = all(0.001326472731307149f);
    p = p * r + all(0.009671512991189957f);
    p = p * r + all(0.05550733581185341f);
    p = p * r + all(0.24022242426872253f);
    p = p * r + all(0.6931470036506653f);
    p = p * r + all(1.0f);
    VI bits;
    memcpy(&bits, &t, sizeof t);
    bits = (bits << 23) + 0x3f800000;  // n + 127 in the exponent; 2^128 becomes infinity, as it should
    V scale;
    memcpy(&scale, &bits, sizeof scale);
    V y = p * scale;
    return x < all(-126.0f) ? V{} : y;
}
static inline V expv(V x) { return exp2v(x * all(LOG2E)); }

static inline float sum(V v) {
#ifdef __AVX512F__
    return _mm512_reduce_add_ps((__m512)v);
#else
    float s = 0;
    for (int i = 0; i < W; i++) s += v[i];
    return s;
#endif
}

// A square of W rows as columns.
#ifdef __clang__
static inline void transpose(V* v) {
    V t[W];
    for (int i = 0; i < W; i++)
        for (int j = 0; j < W; j++) t[i][j] = v[j][i];
    memcpy(v, t, sizeof t);
}
#else
// At each stage, halves of neighbouring blocks change places.
template <int HALF> static inline void swap_halves(V* v) {
    VI low, high;
    for (int i = 0; i < W; i++) {
        low[i] = (i & HALF) ? i - HALF + W : i;
        high[i] = (i & HALF) ? i + W : i + HALF;
    }
    for (int i = 0; i < W; i++)
        if (!(i & HALF)) {
            V a = v[i], b = v[i + HALF];
            v[i] = __builtin_shuffle(a, b, low);
            v[i + HALF] = __builtin_shuffle(a, b, high);
        }
}
static inline void transpose(V* v) {
    if constexpr (W == 16) swap_halves<8>(v);
    if constexpr (W >= 8) swap_halves<4>(v);
    swap_halves<2>(v), swap_halves<1>(v);
}
#endif

// Memory for each of some threads, aligned to cache lines.
struct Scratch {
    size_t each;
    float* data;
    Scratch(int threads, size_t floats)
        : each((floats + 31) / 16 * 16),  // a line more, so that the threads' parts are not all at the same place of a page
          data(static_cast<float*>(aligned_alloc(64, threads * each * sizeof(float)))) {}
    float* of(int thread) const { return data + thread * each; }
    ~Scratch() { free(data); }
};
