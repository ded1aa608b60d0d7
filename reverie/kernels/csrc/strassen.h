// Linear layers, y = x W^T + b, with seven products of halves where eight are plain. With two rows of a sample, and W^T, cut
// into halves, C = A B is
//
//     [C11 C12]   [A11 A12] [B11 B12]      S1 = A21 + A22    T1 = B12 - B11    P1 = A11 B11    P5 = A22 T4
//     [C21 C22] = [A21 A22] [B21 B22],     S2 = S1 - A11     T2 = B22 - T1     P2 = A12 B21    P6 = S1 T1
//                                          S3 = A11 - A21    T3 = B22 - B12    P3 = S2 T2      P7 = S4 B22
//     U2 = P1 + P3,  U3 = U2 + P4,         S4 = A12 - S2     T4 = B21 - T2     P4 = S3 T3
//
//     C11 = P1 + P2,    C12 = U2 + P6 + P7,    C21 = U3 + P5,    C22 = U3 + P6
//
// "On multiplication of 2 x 2 matrices" (Winograd, 1971), https://doi.org/10.1016/0024-3795(71)90009-7
//
// The sums of B are worked out once, for each panel of columns of a half (7, in / 2, its columns); those of A for a block of
// rows. Rows t and t + tokens / 2 of a sample go together, so that what they come to depends on no other sample; where
// there is no second one it is zeros. With gated units (gate.h) B11 and B12 are of h and of g, and y = h gelu(g).
#pragma once
#include "gate.h"
#include "gemm.h"

template <class N> struct Strassen {
    using T = typename N::Number;
    static constexpr long COLUMNS = PANEL * W, PAIRS = 96;  // of a block at most: whole tiles of every height
    static constexpr long KEPT = PAIRS * COLUMNS;           // numbers of a sum that is kept
    // Words of a half of a row up to which a panel's weights stay in the cache from one tile of pairs to the next.
    static constexpr long NARROW = 320;

    // The sums kept that a product is added to, if any, and the one that it makes: C11, C12, C21, P6, U2, U3.
    struct Step {
        int from, plus, to;
    };
    static constexpr Step STEPS[7] = {{-1, -1, 4}, {4, -1, 0}, {4, -1, 4}, {4, -1, 5}, {5, -1, 2}, {-1, -1, 3}, {4, 3, 1}};

    long samples, tokens, words, out;  // words: of a half of a row of x; out: numbers in a row of y
    const T* x;
    const float* w;     // the sums of B, in words
    const float* bias;  // (2, columns)
    const T* onto;      // what is added, or null; not with gated units
    T* y;
    bool gated;
    long lower, columns;  // the row that goes with a sample's first; columns of a half, in whole vectors
    long plane;           // words of a sum of A in a block: a line more, so that they are not all at the same place of a page

    Strassen(const int64_t* shape, const T* x, const float* w, const float* bias, const T* onto, T* y, bool gated)
        : samples(shape[0]), tokens(shape[1]), words(shape[2]), out(shape[3]), x(x), w(w), bias(bias), onto(onto), y(y),
          gated(gated), lower((tokens + 1) / 2), columns(up(gated ? out : (out + 1) / 2)), plane(PAIRS * words + 16) {}

    long pairs() const { return samples * lower; }
    long vectors() const { return columns / W; }
    long panels() const { return (vectors() + PANEL - 1) / PANEL; }
    size_t scratch() const { return 7 * plane + 6 * KEPT + 2 * words; }

    // What of A is multiplied, of pairs [begin, end).
    void sums(long begin, long end, float* to, T* zeros) const {
        const long half = words * N::STEP;
        memset(zeros, 0, 2 * words * sizeof(float));
        for (long pair = begin; pair < end; pair++, to += words) {
            const long t = pair % lower;
            const T *a = x + (pair / lower * tokens + t) * 2 * half, *b = t + lower < tokens ? a + lower * 2 * half : zeros;
            for (long c = 0; c < half; c += W) {
                const long n = half - c;
                const V a11 = load_n(a + c, n), a12 = load_n(a + half + c, n);
                const V a21 = load_n(b + c, n), a22 = load_n(b + half + c, n);
                const V s1 = a21 + a22, s2 = s1 - a11;
                const V all[7] = {a11, a12, s2, a11 - a21, a22, s1, a12 - s2};
#pragma GCC unroll 7
                for (int p = 0; p < 7; p++) store_n(reinterpret_cast<T*>(to + p * plane) + c, all[p], n);
            }
        }
    }

    // A tile of one of the products, added to what it goes on from.
    template <int MR, int NV> void tile(const float* a, const float* b, float* kept, const Step& step) const {
        V acc[MR][NV];
#pragma GCC unroll 16
        for (int i = 0; i < MR; i++)
#pragma GCC unroll 16
            for (int n = 0; n < NV; n++)
                acc[i][n] = step.from < 0 ? V{} : load(kept + step.from * KEPT + i * COLUMNS + n * W);
        if (step.plus >= 0)
#pragma GCC unroll 16
            for (int i = 0; i < MR; i++)
#pragma GCC unroll 16
                for (int n = 0; n < NV; n++) acc[i][n] += load(kept + step.plus * KEPT + i * COLUMNS + n * W);
        product<N>(acc, words, a, words, 1, b, NV * W);
#pragma GCC unroll 16
        for (int i = 0; i < MR; i++)
#pragma GCC unroll 16
            for (int n = 0; n < NV; n++) store(kept + step.to * KEPT + i * COLUMNS + n * W, acc[i][n]);
    }
    template <int MR, int NV>
    void some_rows(int count, const float* a, const float* b, float* kept, const Step& step) const {
        if (count == MR) tile<MR, NV>(a, b, kept, step);
        else if constexpr (MR > 1) some_rows<MR - 1, NV>(count, a, b, kept, step);
    }

    // The two rows of a pair, in columns [first, first + count) of both halves.
    void finish(long pair, const float* kept, long first, long count) const {
        const long t = pair % lower, row = pair / lower * tokens + t;
        for (long i = 0; i < count; i += W) {
            const float* c = kept + i;
            put(row, first + i, load(c), load(c + KEPT));
            if (t + lower < tokens)
                put(row + lower, first + i, load(c + 2 * KEPT), load(c + 3 * KEPT) + load(c + 5 * KEPT));
        }
    }
    void put(long row, long c, V left, V right) const {
        left += load(bias + c), right += load(bias + columns + c);
        if (gated) store_n(y + row * out + c, left * gelu(right), out - c);
        else put(row, c, left), put(row, columns + c, right);
    }
    void put(long row, long c, V v) const {
        if (c >= out) return;
        if (onto) v += load_n(onto + row * out + c, out - c);
        store_n(y + row * out + c, v, out - c);
    }

    // Ask for what `finish` reads or writes, a product or so before it does.
    void ask(const T* where, long pair, long first, long count) const {
        const long t = pair % lower, row = pair / lower * tokens + t;
        for (long half = 0; half < (gated ? columns : 2 * columns); half += columns)
            for (long c = half + first; c < half + first + count && c < out; c += 64 / sizeof(T)) {
                __builtin_prefetch(where + row * out + c, 1);
                if (t + lower < tokens) __builtin_prefetch(where + (row + lower) * out + c, 1);
            }
    }

    // A panel of pairs [begin, end), one product after another.
    template <int NV> void panel(long begin, long end, const float* a, long v, float* kept) const {
        constexpr int HIGH = rows_of(NV);
        for (int p = 0; p < 7; p++)
            for (long pair = begin; pair < end; pair += HIGH) {
                const long last = end - pair < HIGH ? end : pair + HIGH, i = pair - begin;
                if (p == 5 && onto)
                    for (long next = pair; next < last; next++) ask(onto, next, v * W, NV * W);
                if (p == 6)
                    for (long next = pair; next < last; next++) ask(y, next, v * W, NV * W);
                some_rows<HIGH, NV>(int(last - pair), a + p * plane + i * words, w + (7 * v + p * NV) * W * words,
                                    kept + i * COLUMNS, STEPS[p]);
                if (p == 6)
                    for (long done = pair; done < last; done++)
                        finish(done, kept + (done - begin) * COLUMNS, v * W, NV * W);
            }
    }

    // Pairs [begin, end), and the panels [from, until).
    void run(long begin, long end, long from, long until, float* space) const {
        float *a = space, *kept = a + 7 * plane;
        sums(begin, end, a, reinterpret_cast<T*>(kept + 6 * KEPT));
        for (long v = from * PANEL; v < until * PANEL && v < vectors(); v += PANEL)
            by_vectors(vectors() - v, [&](auto nv) {
                const long group = words > NARROW ? PAIRS : rows_of(nv);
                for (long first = begin; first < end; first += group)
                    panel<nv>(first, end - first < group ? end : first + group, a + (first - begin) * words, v, kept);
            });
    }
};

// What of B is multiplied, of the rows of a weight (2 out, in) or (out, in), in panels; columns beyond `out` are zero.
template <class N> struct Halves {
    const float* weight;
    long out, in;
    bool gated;
    float* u;

    // How often B11, B12, B21 and B22 are in each.
    static constexpr int SUMS[7][4] = {{1, 0, 0, 0},   {0, 0, 1, 0},  {1, -1, 0, 1}, {0, -1, 0, 1},
                                       {-1, 1, 1, -1}, {-1, 1, 0, 0}, {0, 0, 0, 1}};

    long columns() const { return up(gated ? out : (out + 1) / 2); }

    // Add inputs [i, i + 2 W) of a column of a quarter, so many times, to a sum.
    void add(float times, int quarter, long column, long i, float* sum) const {
        const bool right = quarter % 2 == 1, known = gated ? column < out : column + (right ? columns() : 0) < out;
        if (!known) return;
        const long row = column + (right ? (gated ? out : columns()) : 0), left = in / 2 - i;
        const float* from = weight + row * in + (quarter / 2) * (in / 2) + i;
        store(sum, load(sum) + all(times) * load_n(from, left));
        if (left > W) store(sum + W, load(sum + W) + all(times) * load_n(from + W, left - W));
    }

    // One vector of columns.
    void run(long v) const {
        const long rows = in / 2 / N::STEP, panel = v / PANEL * PANEL, left = columns() / W - panel;
        const long width = left < PANEL ? left : PANEL;
        for (int p = 0; p < 7; p++) {
            float* to = u + (7 * panel + p * width) * W * rows + (v - panel) * W;
            for (long i = 0; i < rows; i += W) {
                V words[W];
                for (long c = 0; c < W; c++) {
                    float sum[2 * W] = {};
                    for (int q = 0; q < 4; q++)
                        if (SUMS[p][q]) add(float(SUMS[p][q]), q, v * W + c, i * N::STEP, sum);
                    words[c] = rounded_words<N>(sum, W * N::STEP);
                }
                transpose(words);
                for (long j = 0; j < W && i + j < rows; j++) store(to + (i + j) * width * W, words[j]);
            }
        }
    }
};
