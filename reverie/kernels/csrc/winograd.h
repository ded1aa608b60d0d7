// Convolutions of 3x3 (stride 1, padding 1) with fewer multiplications: F(2x2, 3x3), with 16 where 36 are plain, and
// F(4x4, 3x3), with 36 where 144 are.
//
//     y = A^T ( sum over the inputs of (G g G^T) * (B^T d B) ) A        for each tile of 2x2 or 4x4 pixels
//
// "Fast Algorithms for Convolutional Neural Networks" (Lavin & Gray, 2015), equations 8 to 12,
// https://arxiv.org/abs/1509.09308
//
// For each of the 16 or 36 positions the sum is a product of matrices, of (tiles, in) and (in, out). A block of tiles is
// transformed, multiplied by a panel of outputs at all positions, and transformed back while that is in the cache. What a
// tile comes to does not depend on the others of its block.
#pragma once
#include "gemm.h"

constexpr long TILES = 64;  // in a block; from 24 to 192 are as fast within a tenth

struct Image {
    int64_t samples, height, width, in, out;
};

// The transforms along one side, of SIZE numbers for M pixels.
template <int M> struct Side;

// At the points 0, 1, -1 and infinity.
template <> struct Side<2> {
    static constexpr int SIZE = 4;
    static constexpr double G[4][3] = {{1, 0, 0}, {0.5, 0.5, 0.5}, {0.5, -0.5, 0.5}, {0, 0, 1}};
    static inline __attribute__((always_inline)) void before(V* d, int step) {
        const V a = d[0], b = d[step], c = d[2 * step], e = d[3 * step];
        d[0] = a - c, d[step] = b + c, d[2 * step] = c - b, d[3 * step] = e - b;
    }
    static inline __attribute__((always_inline)) void after(const V* m, int step, V* y, int to) {
        const V a = m[0], b = m[step], c = m[2 * step], e = m[3 * step];
        y[0] = a + b + c, y[to] = b - c + e;
    }
};

// At 0, 1/2, -1/2, 2, -2 and infinity: nearer to each other in size than the usual 0, 1, -1, 2, -2, so that less is lost.
template <> struct Side<4> {
    static constexpr int SIZE = 6;
    static constexpr double G[6][3] = {{1, 0, 0},
                                       {-8 / 15., -4 / 15., -2 / 15.},
                                       {-8 / 15., 4 / 15., -2 / 15.},
                                       {1 / 30., 1 / 15., 2 / 15.},
                                       {1 / 30., -1 / 15., 2 / 15.},
                                       {0, 0, 1}};
    static inline __attribute__((always_inline)) void before(V* d, int step) {
        const V a = d[0], b = d[step], c = d[2 * step], e = d[3 * step], f = d[4 * step], g = d[5 * step];
        const V even = f - all(4) * c, odd = all(0.5f) * e - all(2) * b;
        const V even2 = f - all(0.25f) * c, odd2 = all(2) * e - all(0.5f) * b;
        d[0] = a - all(4.25f) * c + f;
        d[step] = even + odd, d[2 * step] = even - odd;
        d[3 * step] = even2 + odd2, d[4 * step] = even2 - odd2;
        d[5 * step] = b - all(4.25f) * e + g;
    }
    static inline __attribute__((always_inline)) void after(const V* m, int step, V* y, int to) {
        const V sum = m[step] + m[2 * step], off = m[step] - m[2 * step];
        const V sum2 = m[3 * step] + m[4 * step], off2 = m[3 * step] - m[4 * step];
        y[0] = m[0] + sum + sum2;
        y[to] = all(0.5f) * off + all(2) * off2;
        y[2 * to] = all(0.25f) * sum + all(4) * sum2;
        y[3 * to] = all(0.125f) * off + all(8) * off2 + m[5 * step];
    }
};

template <int M, class N> struct Winograd {
    using T = typename N::Number;
    using S = Side<M>;
    static constexpr int SIZE = S::SIZE, POSITIONS = SIZE * SIZE;
    static constexpr long COLUMNS = PANEL * W;

    Image n;
    const T* x;         // (samples, height, width, in)
    const float* u;     // the weights, in words: for each panel of outputs (POSITIONS, in, COLUMNS)
    const float* bias;  // (out), or null
    T* y;               // (samples, height, width, out)
    long across, each, tiles, rows;  // tiles in a row, in a sample, in all; words of a row of `in`

    Winograd(const Image& n, const T* x, const float* u, const float* bias, T* y)
        : n(n), x(x), u(u), bias(bias), y(y), across((n.width + M - 1) / M),
          each(across * ((n.height + M - 1) / M)), tiles(n.samples * each), rows(words<N>(n.in)) {}

    long vectors() const { return (n.out + W - 1) / W; }
    // A line more, so that positions are not all at the same place of a page.
    long plane() const { return TILES * rows + 16; }
    size_t scratch() const { return POSITIONS * (plane() + TILES * COLUMNS) + (rows * N::STEP + 2 * W); }

    // The pixels that a tile is made of; those beyond the image are zeros.
    void pixels(long tile, const T* zeros, const T* (&from)[POSITIONS]) const {
        const long b = tile / each, top = tile % each / across * M - 1, left = tile % across * M - 1;
        for (long i = 0; i < SIZE; i++)
            for (long j = 0; j < SIZE; j++) {
                const bool in = top + i >= 0 && top + i < n.height && left + j >= 0 && left + j < n.width;
                from[i * SIZE + j] = in ? x + ((b * n.height + top + i) * n.width + left + j) * n.in : zeros;
            }
    }

    // B^T d B of a tile, to each position's row.
    void before(const T* (&from)[POSITIONS], float* to) const {
        for (long c = 0; c < n.in; c += W) {
            V d[POSITIONS];
            const long left = n.in - c;
            if (left >= W) {
#pragma GCC unroll 36
                for (int p = 0; p < POSITIONS; p++) d[p] = load(from[p] + c);
            } else {
                for (int p = 0; p < POSITIONS; p++) d[p] = load_part(from[p] + c, int(left));
            }
#pragma GCC unroll 6
            for (int j = 0; j < SIZE; j++) S::before(d + j, SIZE);
#pragma GCC unroll 6
            for (int i = 0; i < SIZE; i++) S::before(d + i * SIZE, 1);
            const long whole = left < W ? (left + N::STEP - 1) / N::STEP * N::STEP : W;
            if (whole == W) {
#pragma GCC unroll 36
                for (int p = 0; p < POSITIONS; p++) store(reinterpret_cast<T*>(to + p * plane()) + c, d[p]);
            } else {
                for (int p = 0; p < POSITIONS; p++)
                    store_part(reinterpret_cast<T*>(to + p * plane()) + c, d[p], int(whole));
            }
        }
    }

    // A^T m A of a tile, with the bias, to the pixels that there are.
    void after(long tile, const float* m, long first, int count) const {
        const long b = tile / each, top = tile % each / across * M, left = tile % across * M;
        const long high = n.height - top < M ? n.height - top : M, wide = n.width - left < M ? n.width - left : M;
        T* to = y + ((b * n.height + top) * n.width + left) * n.out + first;
        for (long c = 0; c < count; c += W) {
            V sums[POSITIONS], half[M * SIZE], out[M * M];
#pragma GCC unroll 36
            for (int p = 0; p < POSITIONS; p++) sums[p] = load(m + p * TILES * COLUMNS + c);
#pragma GCC unroll 6
            for (int j = 0; j < SIZE; j++) S::after(sums + j, SIZE, half + j, SIZE);
            const V more = bias ? load_n(bias + first + c, count - c) : V{};
#pragma GCC unroll 4
            for (int i = 0; i < M; i++) S::after(half + i * SIZE, 1, out + i * M, 1);
            for (long i = 0; i < high; i++)
                for (long j = 0; j < wide; j++)
                    store_n(to + (i * n.width + j) * n.out + c, out[i * M + j] + more, count - c);
        }
    }

    // Tiles [begin, end), and outputs of the panels [from, until).
    void run(long begin, long end, long from, long until, float* space) const {
        float *in = space, *m = in + POSITIONS * plane(), *zeros = m + POSITIONS * TILES * COLUMNS;
        memset(zeros, 0, rows * sizeof(float));
        for (long t = begin; t < end; t++) {
            const T* pixel[POSITIONS];
            pixels(t, reinterpret_cast<const T*>(zeros), pixel);
            before(pixel, in + (t - begin) * rows);
        }
        for (long q = from; q < until; q++) {
            const long v = q * PANEL;
            const float* weights = u + v * W * POSITIONS * rows;
            by_vectors(vectors() - v, [&](auto nv) {
                for (int p = 0; p < POSITIONS; p++)
                    panel<N, false, nv, true>(end - begin, rows, in + p * plane(), rows, 1,
                                              weights + p * rows * nv * W, nv * W, m + p * TILES * COLUMNS, COLUMNS);
            });
            const long first = v * W, count = n.out - first < COLUMNS ? n.out - first : COLUMNS;
            for (long t = begin; t < end; t++) after(t, m + (t - begin) * COLUMNS, first, int(count));
        }
    }
};

// G g G^T of weights (out, in, 3, 3), as `Winograd` reads them.
template <int M, class N>
static void transform_panel(const float* g, long out, long in, long first, typename N::Number* u) {
    using S = Side<M>;
    constexpr int SIZE = S::SIZE, COLUMNS = PANEL * W;
    const long rows = words<N>(in), left = (out - first + W - 1) / W * W, width = left < COLUMNS ? left : COLUMNS;
    u += first * SIZE * SIZE * rows * N::STEP;
    for (long i = 0; i < rows * N::STEP; i++) {
        double d[3][3][COLUMNS] = {}, half[SIZE][3][COLUMNS];
        for (long o = 0; o < width && first + o < out && i < in; o++)
            for (int k = 0; k < 9; k++) d[k / 3][k % 3][o] = g[((first + o) * in + i) * 9 + k];
        for (int a = 0; a < SIZE; a++)
            for (int k = 0; k < 3; k++)
                for (int o = 0; o < COLUMNS; o++)
                    half[a][k][o] = S::G[a][0] * d[0][k][o] + S::G[a][1] * d[1][k][o] + S::G[a][2] * d[2][k][o];
        for (int p = 0; p < SIZE * SIZE; p++) {
            const auto& row = half[p / SIZE];
            const auto& factor = S::G[p % SIZE];
            float full[COLUMNS];
            typename N::Number rounded[COLUMNS];
            for (int o = 0; o < COLUMNS; o++)
                full[o] = float(factor[0] * row[0][o] + factor[1] * row[1][o] + factor[2] * row[2][o]);
            for (int o = 0; o < COLUMNS; o += W) store(rounded + o, load(full + o));
            typename N::Number* to = u + (p * rows + i / N::STEP) * width * N::STEP + i % N::STEP;
            for (long o = 0; o < width; o++) to[o * N::STEP] = rounded[o];
        }
    }
}
