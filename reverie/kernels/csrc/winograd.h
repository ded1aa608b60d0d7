// Convolutions of 3x3 (stride 1, padding 1) with fewer multiplications: F(2x2, 3x3), with 16 where 36 are plain,
// F(2x4, 3x3), with 24 where 72 are, and F(4x4, 3x3), with 36 where 144 are; and of images whose pixels are repeated 2x2,
// with 9 where 36 are.
//
//     y = A^T ( sum over the inputs of (G g G^T) * (B^T d B) ) A        for each tile of 2x2, 2x4 or 4x4 pixels, or of one
//
// "Fast Algorithms for Convolutional Neural Networks" (Lavin & Gray, 2015), equations 8 to 12,
// https://arxiv.org/abs/1509.09308
//
// For each of the 9, 16, 24 or 36 positions the sum is a product of matrices, of (tiles, in) and (in, out). A block of tiles is
// transformed, multiplied by a panel of outputs at all positions, and transformed back while that is in the cache. What a
// tile comes to does not depend on the others of its block.
#pragma once
#include "gemm.h"

constexpr long TILES = 64;  // in a block; from 24 to 192 are as fast within a tenth

struct Image {
    int64_t samples, height, width, in, out;
};

// The transforms along one side, of SIZE numbers for M pixels, which give OUT. CUT: the last of those is not wanted.
template <int M> struct Side;

// A pixel that is repeated: all three weights of it, and the first and the last of what its neighbours differ by. Where
// the repetition is cut off, the last weight sees zero, as the neighbour is there, and not the pixel once more.
template <> struct Side<1> {
    static constexpr int SIZE = 3, OUT = 2;
    static constexpr double G[3][3] = {{1, 0, 0}, {1, 1, 1}, {0, 0, 1}};
    static inline __attribute__((always_inline)) void before(V* d, int step) {
        const V a = d[0], b = d[step], c = d[2 * step];
        d[0] = a - b, d[2 * step] = c - b;
    }
    static inline __attribute__((always_inline)) void after(const V* m, int step, V* y, int to, bool cut) {
        const V a = m[0], b = m[step], c = m[2 * step];
        y[0] = cut ? a + b + c : a + b, y[to] = b + c;
    }
};

// At the points 0, 1, -1 and infinity.
template <> struct Side<2> {
    static constexpr int SIZE = 4, OUT = 2;
    static constexpr double G[4][3] = {{1, 0, 0}, {0.5, 0.5, 0.5}, {0.5, -0.5, 0.5}, {0, 0, 1}};
    static inline __attribute__((always_inline)) void before(V* d, int step) {
        const V a = d[0], b = d[step], c = d[2 * step], e = d[3 * step];
        d[0] = a - c, d[step] = b + c, d[2 * step] = c - b, d[3 * step] = e - b;
    }
    static inline __attribute__((always_inline)) void after(const V* m, int step, V* y, int to, bool) {
        const V a = m[0], b = m[step], c = m[2 * step], e = m[3 * step];
        y[0] = a + b + c, y[to] = b - c + e;
    }
};

// At 0, 2/3, -2/3, 3/2, -3/2 and infinity: nearer to each other in size than the usual 0, 1, -1, 2, -2, so that less is
// lost.
template <> struct Side<4> {
    static constexpr int SIZE = 6, OUT = 4;
    static constexpr float P = 2 / 3.f, Q = 3 / 2.f, SUM = P * P + Q * Q;  // P Q is 1
    static constexpr double G[6][3] = {{1, 0, 0},
                                       {-81 / 130., -54 / 130., -36 / 130.},
                                       {-81 / 130., 54 / 130., -36 / 130.},
                                       {8 / 65., 12 / 65., 18 / 65.},
                                       {8 / 65., -12 / 65., 18 / 65.},
                                       {0, 0, 1}};
    static inline __attribute__((always_inline)) void before(V* d, int step) {
        const V a = d[0], b = d[step], c = d[2 * step], e = d[3 * step], f = d[4 * step], g = d[5 * step];
        const V even = f - all(Q * Q) * c, odd = all(P) * e - all(Q) * b;
        const V even2 = f - all(P * P) * c, odd2 = all(Q) * e - all(P) * b;
        d[0] = a - all(SUM) * c + f;
        d[step] = even + odd, d[2 * step] = even - odd;
        d[3 * step] = even2 + odd2, d[4 * step] = even2 - odd2;
        d[5 * step] = b - all(SUM) * e + g;
    }
    static inline __attribute__((always_inline)) void after(const V* m, int step, V* y, int to, bool) {
        const V sum = m[step] + m[2 * step], off = m[step] - m[2 * step];
        const V sum2 = m[3 * step] + m[4 * step], off2 = m[3 * step] - m[4 * step];
        y[0] = m[0] + sum + sum2;
        y[to] = all(P) * off + all(Q) * off2;
        y[2 * to] = all(P * P) * sum + all(Q * Q) * sum2;
        y[3 * to] = all(P * P * P) * off + all(Q * Q * Q) * off2 + m[5 * step];
    }
};

// Tiles of HIGH x WIDE pixels.
template <int HIGH, int WIDE, class N> struct Winograd {
    using T = typename N::Number;
    static constexpr int ROWS = Side<HIGH>::SIZE, COLS = Side<WIDE>::SIZE, POSITIONS = ROWS * COLS;
    static constexpr int DOWN = Side<HIGH>::OUT, ALONG = Side<WIDE>::OUT;
    static constexpr long COLUMNS = PANEL * W;

    Image n;
    const T* x;         // (samples, height, width, in)
    const float* u;     // the weights, in words: for each panel of outputs (POSITIONS, in, COLUMNS)
    const float* bias;  // (out), or null
    T* y;               // (samples, high, wide, out)
    long high, wide, across, each, tiles, rows;  // tiles in a row, in a sample, in all; words of a row of `in`

    Winograd(const Image& n, const T* x, const float* u, const float* bias, T* y, long high, long wide)
        : n(n), x(x), u(u), bias(bias), y(y), high(high), wide(wide), across((n.width + WIDE - 1) / WIDE),
          each(across * ((n.height + HIGH - 1) / HIGH)), tiles(n.samples * each), rows(words<N>(n.in)) {}

    long vectors() const { return (n.out + W - 1) / W; }
    // A line more, so that positions are not all at the same place of a page.
    long plane() const { return TILES * rows + 16; }
    size_t scratch() const { return POSITIONS * (plane() + TILES * COLUMNS) + (rows * N::STEP + 2 * W); }

    // The pixels that a tile is made of; those beyond the image are zeros.
    void pixels(long tile, const T* zeros, const T* (&from)[POSITIONS]) const {
        const long b = tile / each, top = tile % each / across * HIGH - 1, left = tile % across * WIDE - 1;
        for (long i = 0; i < ROWS; i++)
            for (long j = 0; j < COLS; j++) {
                const bool in = top + i >= 0 && top + i < n.height && left + j >= 0 && left + j < n.width;
                from[i * COLS + j] = in ? x + ((b * n.height + top + i) * n.width + left + j) * n.in : zeros;
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
            for (int j = 0; j < COLS; j++) Side<HIGH>::before(d + j, COLS);
#pragma GCC unroll 6
            for (int i = 0; i < ROWS; i++) Side<WIDE>::before(d + i * COLS, 1);
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
        const long b = tile / each, top = tile % each / across * DOWN, left = tile % across * ALONG;
        const long down = high - top < DOWN ? high - top : DOWN, along = wide - left < ALONG ? wide - left : ALONG;
        T* to = y + ((b * high + top) * wide + left) * n.out + first;
        for (long c = 0; c < count; c += W) {
            V sums[POSITIONS], half[DOWN * COLS], out[DOWN * ALONG];
#pragma GCC unroll 36
            for (int p = 0; p < POSITIONS; p++) sums[p] = load(m + p * TILES * COLUMNS + c);
#pragma GCC unroll 6
            for (int j = 0; j < COLS; j++) Side<HIGH>::after(sums + j, COLS, half + j, COLS, down < DOWN);
            const V more = bias ? load_n(bias + first + c, count - c) : V{};
#pragma GCC unroll 4
            for (int i = 0; i < DOWN; i++)
                Side<WIDE>::after(half + i * COLS, 1, out + i * ALONG, 1, along < ALONG);
            for (long i = 0; i < down; i++)
                for (long j = 0; j < along; j++)
                    store_n(to + (i * wide + j) * n.out + c, out[i * ALONG + j] + more, count - c);
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

// G g G^T of the weights (out, in, 3, 3) of W outputs, as `Winograd` reads them.
template <int HIGH, int WIDE, class N> struct Transform {
    typedef double D __attribute__((vector_size(4 * W)));
    typedef float F __attribute__((vector_size(2 * W)));
    static constexpr int ROWS = Side<HIGH>::SIZE, COLS = Side<WIDE>::SIZE, POSITIONS = ROWS * COLS, BLOCK = W * 9;
    const float* g;
    long out, in;
    float* u;

    // The weights of W inputs and outputs, outputs along the vectors.
    void read(long first, long i, float* d) const {
        const long left = (in - i) * 9;
        for (long k = 0; k < BLOCK; k += W) {
            V v[W];
            for (long o = 0; o < W; o++)
                v[o] = first + o < out && k < left ? load_n(g + ((first + o) * in + i) * 9 + k, left - k) : V{};
            transpose(v);
            for (long o = 0; o < W; o++) store(d + (k + o) * W, v[o]);
        }
    }

    // One input's, at all positions: half a vector at a time, as float64 takes twice the room.
    static void positions(const float* d, float* to) {
        for (long o = 0; o < W; o += W / 2) {
            D half[ROWS][3];
            for (int k = 0; k < 3; k++) {
                const D a = wide(d + k * W + o), b = wide(d + (3 + k) * W + o), c = wide(d + (6 + k) * W + o);
#pragma GCC unroll 6
                for (int i = 0; i < ROWS; i++) half[i][k] = times(Side<HIGH>::G[i], a, b, c);
            }
            for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 6
                for (int j = 0; j < COLS; j++) {
                    const F y = __builtin_convertvector(times(Side<WIDE>::G[j], half[i][0], half[i][1], half[i][2]), F);
                    memcpy(to + (i * COLS + j) * W + o, &y, sizeof y);
                }
        }
    }
    static inline D wide(const float* x) {
        F v;
        memcpy(&v, x, sizeof v);
        return __builtin_convertvector(v, D);
    }
    static inline D times(const double (&row)[3], D a, D b, D c) { return row[0] * a + row[1] * b + row[2] * c; }

    void run(long first) const {
        const long rows = words<N>(in), panel = first / (PANEL * W) * PANEL * W, left = up(out) - panel;
        const long width = left < PANEL * W ? left : PANEL * W;
        float* to = u + panel * POSITIONS * rows + first - panel;
        float d[BLOCK * W], full[N::STEP][POSITIONS * W];
        for (long i = 0; i < in; i += W) {
            read(first, i, d);
            for (long j = 0; j < W && i + j < in; j += N::STEP) {
                for (int s = 0; s < N::STEP; s++) positions(d + (j + s) * 9 * W, full[s]);
                for (int p = 0; p < POSITIONS; p++)
                    store(to + (p * rows + (i + j) / N::STEP) * width,
                          N::join(load(full[0] + p * W), load(full[N::STEP - 1] + p * W)));
            }
        }
    }
};
