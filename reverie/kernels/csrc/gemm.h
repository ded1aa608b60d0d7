// C (M, N) (+)= A (M, K) B (K, N) on blocks that are in the cache: A with any strides, its numbers broadcast; B and C
// with rows of whole vectors. A tile of C stays in registers while k runs.
#pragma once
#include "vector.h"

template <int MR, int NV, bool ADD>
static inline void tile(long K, const float* a, long am, long ak, const float* b, long ldb, float* c, long ldc) {
    V acc[MR][NV];
#pragma GCC unroll 16
    for (int i = 0; i < MR; i++)
#pragma GCC unroll 16
        for (int n = 0; n < NV; n++) acc[i][n] = ADD ? load(c + i * ldc + n * W) : V{};
    long k = 0;
    do {  // K is never 0 here, and the compiler is to know it
        V row[NV];
#pragma GCC unroll 16
        for (int n = 0; n < NV; n++) row[n] = load(b + k * ldb + n * W);
#pragma GCC unroll 16
        for (int i = 0; i < MR; i++) {
            V x = all(a[i * am + k * ak]);
#pragma GCC unroll 16
            for (int n = 0; n < NV; n++) acc[i][n] += x * row[n];
        }
    } while (++k < K);
#pragma GCC unroll 16
    for (int i = 0; i < MR; i++)
#pragma GCC unroll 16
        for (int n = 0; n < NV; n++) store(c + i * ldc + n * W, acc[i][n]);
}

// Rows of a tile: as many as the registers hold.
constexpr int rows_of(int NV) { return W == 16 ? (NV == 4 ? 6 : NV == 3 ? 8 : 12) : (NV == 2 ? 6 : 12); }

template <int MR, int NV, bool ADD>
static inline void some_rows(int rows, long K, const float* a, long am, long ak, const float* b, long ldb, float* c,
                             long ldc) {
    if (rows == MR) tile<MR, NV, ADD>(K, a, am, ak, b, ldb, c, ldc);
    else if constexpr (MR > 1) some_rows<MR - 1, NV, ADD>(rows, K, a, am, ak, b, ldb, c, ldc);
}

template <int NV, bool ADD>
static inline void panel(long M, long K, const float* a, long am, long ak, const float* b, long ldb, float* c,
                         long ldc) {
    const long tiles = (M + rows_of(NV) - 1) / rows_of(NV);
    for (long t = 0, m = 0; t < tiles; t++) {  // tiles of as equal height as can be
        const int rows = int((M - m + tiles - t - 1) / (tiles - t));
        some_rows<rows_of(NV), NV, ADD>(rows, K, a + m * am, am, ak, b, ldb, c + m * ldc, ldc);
        m += rows;
    }
}

template <bool ADD>
static void gemm(long M, long vectors, long K, const float* a, long am, long ak, const float* b, long ldb, float* c,
                 long ldc) {
    for (long v = 0; v < vectors;) {
        const long left = vectors - v;
        const float* bv = b + v * W;
        float* cv = c + v * W;
        if constexpr (PANEL == 4) {
            if (left >= 4) panel<4, ADD>(M, K, a, am, ak, bv, ldb, cv, ldc), v += 4;
            else if (left == 3) panel<3, ADD>(M, K, a, am, ak, bv, ldb, cv, ldc), v += 3;
            else if (left == 2) panel<2, ADD>(M, K, a, am, ak, bv, ldb, cv, ldc), v += 2;
            else panel<1, ADD>(M, K, a, am, ak, bv, ldb, cv, ldc), v += 1;
        } else {
            if (left >= 2) panel<2, ADD>(M, K, a, am, ak, bv, ldb, cv, ldc), v += 2;
            else panel<1, ADD>(M, K, a, am, ak, bv, ldb, cv, ldc), v += 1;
        }
    }
}
