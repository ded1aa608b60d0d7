// The gradient of the weight of a convolution of 3x3 (stride 1, padding 1), by Winograd's F(3x3, 2x2): a tile of 2x2
// pixels of dy and the 4x4 of x that it comes from say 3x3 numbers of dw, in 16 multiplications where 36 are plain.
//
//     dw = A^T ( sum over tiles and samples of (G dy G^T) * (B^T x B) ) A
//
// with the B of winograd.h's F(2x2, 3x3); A is applied once, to the sum. For each of the 16 positions the sum is a
// product of matrices, of (out, tiles) and (tiles, in). A word of bfloat16 holds the same number of two samples.
#pragma once
#include "winograd.h"

constexpr long BLOCK = 64;  // tiles that are transformed and multiplied at a time

template <class N> struct WeightGradient {
    using T = typename N::Number;
    static constexpr int SIZE = 4, POSITIONS = 16;

    Image n;
    const T *x, *dy;  // (samples, height, width, in), (samples, height, width, out)
    long wide, high;  // inputs and outputs, in whole vectors

    WeightGradient(const Image& n, const T* x, const T* dy) : n(n), x(x), dy(dy), wide(up(n.in)), high(up(n.out)) {}

    // A tile of dy, in the samples that share words.
    struct Place {
        long sample, top, left;
        void next(const Image& n) {
            if ((left += 2) < n.width) return;
            left = 0, top += 2;
            if (top >= n.height) top = 0, sample += N::STEP;
        }
    };

    // A line more, so that positions are not all at the same place of a page.
    long plane(long width) const { return BLOCK * width + W; }
    long sums() const { return POSITIONS * n.out * wide; }
    size_t scratch() const { return POSITIONS * (plane(wide) + plane(high)) + sums(); }

    // The words of a tile, at each position: B^T x B.
    void lay_x(const Place& at, float* to) const {
        const bool inside = at.top > 0 && at.left > 0 && at.top + 3 <= n.height && at.left + 3 <= n.width &&
                            at.sample + N::STEP <= n.samples && n.in % W == 0;
        if (inside) words_of_x(to, [&](int s, int p, long c) { return load(pixel(at, s, p) + c); });
        else words_of_x(to, [&](int s, int p, long c) {
            const long row = at.top + p / SIZE - 1, column = at.left + p % SIZE - 1;
            const bool there =
                row >= 0 && row < n.height && column >= 0 && column < n.width && at.sample + s < n.samples;
            return there ? load_n(pixel(at, s, p) + c, n.in - c) : V{};
        });
    }

    const T* pixel(const Place& at, int s, int p) const {
        return x + (((at.sample + s) * n.height + at.top + p / SIZE - 1) * n.width + at.left + p % SIZE - 1) * n.in;
    }

    template <class Load> inline __attribute__((always_inline)) void words_of_x(float* to, const Load& number) const {
        for (long c = 0; c < n.in; c += W) {
            V d[N::STEP][POSITIONS];
#pragma GCC unroll 2
            for (int s = 0; s < N::STEP; s++) {
#pragma GCC unroll 16
                for (int p = 0; p < POSITIONS; p++) d[s][p] = number(s, p, c);
#pragma GCC unroll 4
                for (int j = 0; j < SIZE; j++) Side<2>::before(d[s] + j, SIZE);
#pragma GCC unroll 4
                for (int i = 0; i < SIZE; i++) Side<2>::before(d[s] + i * SIZE, 1);
            }
#pragma GCC unroll 16
            for (int p = 0; p < POSITIONS; p++) store(to + p * plane(wide) + c, N::join(d[0][p], d[N::STEP - 1][p]));
        }
    }

    // G along one side, twice the paper's at 1 and -1.
    static inline __attribute__((always_inline)) void before(V* g, int step) {
        const V a = g[0], b = g[3 * step];
        g[step] = a + b, g[2 * step] = a - b;
    }

    // Those of dy, 4 G dy G^T; and dy is added to db.
    void lay_dy(const Place& at, float* to, float* db) const {
        const bool below = at.top + 1 < n.height, beside = at.left + 1 < n.width;
        for (long c = 0; c < n.out; c += W) {
            V g[N::STEP][POSITIONS], sum = load(db + c);
#pragma GCC unroll 2
            for (int s = 0; s < N::STEP; s++) {
                const bool there = at.sample + s < n.samples;
                const T* from = dy + (((at.sample + s) * n.height + at.top) * n.width + at.left) * n.out + c;
                const auto number = [&](bool there, long pixel) {
                    return there ? load_n(from + pixel * n.out, n.out - c) : V{};
                };
                g[s][0] = number(there, 0), g[s][3] = number(there && beside, 1);
                g[s][12] = number(there && below, n.width), g[s][15] = number(there && below && beside, n.width + 1);
                sum += (g[s][0] + g[s][3]) + (g[s][12] + g[s][15]);
                before(g[s], SIZE), before(g[s] + 3, SIZE);
#pragma GCC unroll 4
                for (int i = 0; i < SIZE; i++) before(g[s] + i * SIZE, 1);
            }
            store(db + c, sum);
#pragma GCC unroll 16
            for (int p = 0; p < POSITIONS; p++) store(to + p * plane(high) + c, N::join(g[0][p], g[N::STEP - 1][p]));
        }
    }

    // A^T along one side, which halves what G doubled.
    static inline __attribute__((always_inline)) void after(const V* m, int step, V* y, int to) {
        const V sum = all(0.5f) * (m[step] + m[2 * step]);
        y[0] = m[0] + sum, y[to] = all(0.5f) * (m[step] - m[2 * step]), y[2 * to] = sum + m[3 * step];
    }

    // A^T m A, to dw (out, 3, 3, wide).
    void end(const float* m, float* dw) const {
        for (long o = 0; o < n.out; o++)
            for (long c = 0; c < wide; c += W) {
                V sums_at[POSITIONS], half[3 * SIZE], y[9];
                for (int p = 0; p < POSITIONS; p++) sums_at[p] = load(m + (p * n.out + o) * wide + c);
                for (int j = 0; j < SIZE; j++) after(sums_at + j, SIZE, half + j, SIZE);
                for (int i = 0; i < 3; i++) after(half + i * SIZE, 1, y + i * 3, 1);
                for (int k = 0; k < 9; k++) store(dw + (o * 9 + k) * wide + c, y[k]);
            }
    }

    // The sums over samples [first, last), of which the first is the first of its word.
    void run(long first, long last, float* dw, float* db, float* space) const {
        float *laid_x = space, *laid_dy = laid_x + POSITIONS * plane(wide), *m = laid_dy + POSITIONS * plane(high);
        memset(m, 0, sums() * sizeof(float));
        memset(db, 0, high * sizeof(float));
        for (Place at{first, 0, 0}; at.sample < last;) {
            long count = 0;
            for (; count < BLOCK && at.sample < last; count++, at.next(n)) {
                lay_x(at, laid_x + count * wide);
                lay_dy(at, laid_dy + count * high, db);
            }
            for (int p = 0; p < POSITIONS; p++)
                gemm<N>(n.out, wide / W, count, laid_dy + p * plane(high), 1, high, laid_x + p * plane(wide), wide,
                        m + p * n.out * wide, wide);
        }
        end(m, dw);
    }
};
