// C (M, N) += A (M, K) B (K, N) on blocks that are in the cache: A with any strides, its words broadcast (with TWO, two
// of them, to the even and the odd columns); B and C with rows of whole vectors. K counts words. A tile of C stays in
// registers while k runs.
#pragma once
#include <type_traits>

#include "numbers.h"

// The sum of products itself, into registers.
template <class N, bool TWO = false, int MR, int NV>
static inline __attribute__((always_inline)) void product(V (&acc)[MR][NV], long K, const float* a, long am, long ak,
                                                          const float* b, long ldb) {
    long k = 0;
    do {  // K is never 0 here, and the compiler is to know it
        V row[NV];
#pragma GCC unroll 16
        for (int n = 0; n < NV; n++) row[n] = load(b + k * ldb + n * W);
#pragma GCC unroll 16
        for (int i = 0; i < MR; i++) {
            const float* word = a + i * am + k * ak;
            const V x = TWO ? spread_two(word) : spread(word);
#pragma GCC unroll 16
            for (int n = 0; n < NV; n++) acc[i][n] = N::multiply_add(acc[i][n], x, row[n]);
        }
    } while (++k < K);
}

// FRESH: C = A B, whatever C was.
template <class N, bool TWO, int MR, int NV, bool FRESH>
static inline void tile(long K, const float* a, long am, long ak, const float* b, long ldb, float* c, long ldc) {
    V acc[MR][NV];
#pragma GCC unroll 16
    for (int i = 0; i < MR; i++)
#pragma GCC unroll 16
        for (int n = 0; n < NV; n++) acc[i][n] = FRESH ? V{} : load(c + i * ldc + n * W);
    product<N, TWO>(acc, K, a, am, ak, b, ldb);
#pragma GCC unroll 16
    for (int i = 0; i < MR; i++)
#pragma GCC unroll 16
        for (int n = 0; n < NV; n++) store(c + i * ldc + n * W, acc[i][n]);
}

// Rows of a tile: as many as the registers hold.
constexpr int rows_of(int NV) { return W == 16 ? (NV == 4 ? 6 : NV == 3 ? 8 : 12) : (NV == 2 ? 6 : 12); }

template <class N, bool TWO, int MR, int NV, bool FRESH>
static inline void some_rows(int rows, long K, const float* a, long am, long ak, const float* b, long ldb, float* c,
                             long ldc) {
    if (rows == MR) tile<N, TWO, MR, NV, FRESH>(K, a, am, ak, b, ldb, c, ldc);
    else if constexpr (MR > 1) some_rows<N, TWO, MR - 1, NV, FRESH>(rows, K, a, am, ak, b, ldb, c, ldc);
}

template <class N, bool TWO, int NV, bool FRESH = false>
static void panel(long M, long K, const float* a, long am, long ak, const float* b, long ldb, float* c, long ldc) {
    const long tiles = (M + rows_of(NV) - 1) / rows_of(NV);
    for (long t = 0, m = 0; t < tiles; t++) {  // tiles of as equal height as can be
        const int rows = int((M - m + tiles - t - 1) / (tiles - t));
        some_rows<N, TWO, rows_of(NV), NV, FRESH>(rows, K, a + m * am, am, ak, b, ldb, c + m * ldc, ldc);
        m += rows;
    }
}

// Call f with the number of vectors to do at once, of those that are left, as a constant.
template <class F> static inline void by_vectors(long left, const F& f) {
    if constexpr (PANEL == 4) {
        if (left >= 4) return f(std::integral_constant<int, 4>());
        if (left == 3) return f(std::integral_constant<int, 3>());
    }
    if (left >= 2) return f(std::integral_constant<int, 2>());
    f(std::integral_constant<int, 1>());
}

template <class N, bool TWO = false>
static void gemm(long M, long vectors, long K, const float* a, long am, long ak, const float* b, long ldb, float* c,
                 long ldc) {
    for (long v = 0; v < vectors; v += PANEL)
        by_vectors(vectors - v, [&](auto nv) { panel<N, TWO, nv>(M, K, a, am, ak, b + v * W, ldb, c + v * W, ldc); });
}
