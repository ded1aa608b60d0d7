// What is multiplied: float32, or bfloat16 where the processor has its dot product. Both are read as words of four
// bytes, one float or two bfloat16 that follow each other along the dimension that is summed over, so that the
// products of matrices, and attention over them, are written once.
#pragma once
#include "vector.h"
#ifdef __AVX512F__
#include <immintrin.h>
#endif

// The largest, with NaN in b kept: one instruction where the compiler would make two of a comparison.
static inline V larger(V a, V b) {
#ifdef __AVX512F__
    return (V)_mm512_max_ps((__m512)a, (__m512)b);
#else
    return vmax(a, b);
#endif
}

// Whether any number of a exceeds its fellow in b; NaN does not.
static inline bool exceeds(V a, V b) {
#ifdef __AVX512F__
    return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ) != 0;
#else
    const VI greater = a > b;
    int32_t found = 0;
    for (int i = 0; i < W; i++) found |= greater[i];
    return found != 0;
#endif
}

// Whether any does, or is NaN.
static inline bool exceeds_or_nan(V a, V b) {
#ifdef __AVX512F__
    return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_NLE_UQ) != 0;
#else
    const VI within = a <= b;
    int32_t found = -1;
    for (int i = 0; i < W; i++) found &= within[i];
    return found == 0;
#endif
}

// 2^x by a polynomial of the fraction, in [0, 1): c[0] r^n + ... + c[n]. 0 far below, also at minus infinity (whose fraction
// is 0 to the processor); infinity far above; NaN stays NaN.
constexpr float EXP2[] = {0.00186713005f, 0.00901703071f, 0.0557999127f, 0.240164444f, 0.693151295f, 1.0f};  // within 2e-7
constexpr float ROUGH_EXP2[] = {0.0780245215f, 0.226067156f, 0.695833564f, 0.999925196f};                    // within 8e-5
template <int TERMS> static inline V power_of_two(V x, const float (&c)[TERMS]) {
#ifdef __AVX512DQ__
    const V r = (V)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    V p = all(c[0]);
#pragma GCC unroll 8
    for (int i = 1; i < TERMS; i++) p = p * r + all(c[i]);
    return (V)_mm512_scalef_ps((__m512)p, (__m512)x);
#else
    return exp2v(x);
#endif
}

// The words of two vectors in turns, and back.
#ifndef __clang__
static inline void into_turns(V& first, V& second) {
    VI low, high;
    for (int i = 0; i < W; i++) {
        low[i] = i / 2 + i % 2 * W;
        high[i] = low[i] + W / 2;
    }
    const V both = __builtin_shuffle(first, second, low);
    second = __builtin_shuffle(first, second, high);
    first = both;
}
static inline void out_of_turns(V& first, V& second) {
    VI even, odd;
    for (int i = 0; i < W; i++) even[i] = 2 * i, odd[i] = 2 * i + 1;
    const V evens = __builtin_shuffle(first, second, even);
    second = __builtin_shuffle(first, second, odd);
    first = evens;
}
#else
static inline void into_turns(V& first, V& second) {
    float turns[2 * W];
    for (int i = 0; i < W; i++) turns[2 * i] = first[i], turns[2 * i + 1] = second[i];
    first = load(turns), second = load(turns + W);
}
static inline void out_of_turns(V& first, V& second) {
    float turns[2 * W];
    store(turns, first), store(turns + W, second);
    for (int i = 0; i < W; i++) first[i] = turns[2 * i], second[i] = turns[2 * i + 1];
}
#endif
static inline void store_words(float* to, V first, V second) {
    into_turns(first, second);
    store(to, first), store(to + W, second);
}

// log2(x) within 2e-7 (of 1, or of itself where that is more), for normal x above 0; NaN stays NaN.
static inline V log2v(V x) {
    VI bits = (VI)x;
    const VI whole = (bits - 0x3f3504f3) >> 23;  // so that the rest lies in [sqrt(1/2), sqrt(2))
    const V rest = (V)(bits - (whole << 23));
    const V f = (rest - all(1)) / (rest + all(1)), g = f * f;
    V p = all(0.32059889798532f);  // 2 / ln 2 / 9, and on: the series of atanh
    p = p * g + all(0.41219858312399f);
    p = p * g + all(0.57707801635559f);
    p = p * g + all(0.96179669392598f);
    p = p * g + all(2.88539008177793f);
    return __builtin_convertvector(whole, V) + p * f + (x - x);
}

struct Single {
    using Number = float;
    static constexpr int STEP = 1;  // numbers in a word
    static inline V multiply_add(V sum, V a, V b) { return sum + a * b; }
    static inline V join(V first, V) { return first; }
    static inline V pack(V first, V) { return first; }
    static inline void store_both(float* to, V first, V second) { store_words(to, first, second); }
    static inline V exp2(V x) { return power_of_two(x, EXP2); }
};

#ifdef __AVX512BF16__
struct Half {
    using Number = uint16_t;
    static constexpr int STEP = 2;
    static inline V multiply_add(V sum, V a, V b) {
        return (V)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
    }
    // A twentieth of what is lost as it is rounded to bfloat16.
    static inline V exp2(V x) { return power_of_two(x, ROUGH_EXP2); }
    // Two vectors rounded to bfloat16, each number of the one in a word with its fellow of the other.
    static inline V join(V first, V second) {
        static const uint16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                           8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
        const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
        return (V)_mm512_permutexvar_epi16(_mm512_loadu_si512(order), both);
    }
    // Two vectors that follow each other, as one of words.
    static inline V pack(V first, V second) { return (V)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first); }
    // Two rows in words along them, in turns.
    static inline void store_both(float* to, V first, V second) {
        static const uint32_t order[16] = {0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15};
        const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
        store(to, (V)_mm512_permutexvar_epi32(_mm512_loadu_si512(order), both));
    }
};
#endif

// Words that n numbers take.
template <class N> static inline long words(long n) { return (n + N::STEP - 1) / N::STEP; }

// A word in all lanes.
static inline V spread(const float* word) {
    uint32_t bits;
    memcpy(&bits, word, sizeof bits);
    return (V)(bits - VU{});
}

// Two words that follow each other, in turns in all lanes.
static inline V spread_two(const float* word) {
    typedef uint64_t VL __attribute__((vector_size(4 * W)));
    uint64_t bits;
    memcpy(&bits, word, sizeof bits);
    return (V)(bits - VL{});
}

// The words of the first n numbers from x on, of a vector at most; what is beyond is zero.
template <class N> static inline V load_words(const typename N::Number* x, long n) {
    V v = {};
    if (n >= W * N::STEP) memcpy(&v, x, sizeof v);
#ifdef __AVX512BW__
    else if (N::STEP == 2) v = (V)_mm512_maskz_loadu_epi16((1u << n) - 1, x);
    else v = (V)_mm512_maskz_loadu_epi32(__mmask16((1u << n) - 1), x);
#else
    else memcpy(&v, x, n * sizeof(typename N::Number));
#endif
    return v;
}

// The words of the first n floats from x on, rounded; of a vector at most.
template <class N> static inline V rounded_words(const float* x, long n) {
    return N::pack(load_n(x, n), N::STEP > 1 && n > W ? load_n(x + W, n - W) : V{});
}

// Words that go along rows: a vector of them at most, each of the n numbers of a row, and its fellow of the next, where
// there is one, if a word holds two.
template <class N> static inline V words_across(const typename N::Number* x, long token, long rows, long n) {
    const V first = load_n(x, n);
    if constexpr (N::STEP == 1) return first;
    const V second = rows > 1 ? load_n(x + token, n) : V{};  // a bfloat16 is loaded as the upper half of its lane
    return (V)((VU)first >> 16 | (VU)second);
}
