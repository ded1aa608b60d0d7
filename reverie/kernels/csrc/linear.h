// Linear layers, y = x W^T + b, with weights in panels of outputs: for each panel (in, its columns), in words. What
// follows a layer is done while a tile of the result is in registers:
//
//     y = h gelu(g),    h and g the two halves of the layer's outputs, side by side in each panel
//
// so that h and g are never written; or
//
//     y = z + x W^T + b                    for a z of y's shape.
#pragma once
#include "gate.h"
#include "gemm.h"

constexpr long NEAR = 1 << 17;  // words of x that are gone through for one panel after another: half of a usual L2
constexpr long ROWS = 190;      // but so many at least: the weights are read again for each block, large ones from memory

template <class N> struct Linear {
    using T = typename N::Number;
    long rows, words, out;  // out: numbers in a row of y
    const T* x;
    const float* w;     // the weights
    const float* bias;  // one for each column of the panels, in whole vectors
    const T* onto;      // z, or null; not with gated units
    T* y;
    bool gated;

    long vectors() const { return (out + W - 1) / W * (gated ? 2 : 1); }  // columns of all panels
    long panels() const { return (vectors() + PANEL - 1) / PANEL; }
    // Rows of a block, in whole tiles.
    long block() const { return ((NEAR / words > ROWS ? NEAR / words : ROWS) / rows_of(PANEL) + 1) * rows_of(PANEL); }

    // Ask for what a tile is added and written to, while its product is made.
    template <int MR> void ask(long row, long first, long count) const {
        for (long i = row; i < row + MR; i++)
            for (long c = first; c < first + count; c += 64 / sizeof(T)) {
                if (onto) __builtin_prefetch(onto + i * out + c);
                __builtin_prefetch(y + i * out + c, 1);
            }
    }

    // A tile, and what follows it.
    template <int MR, int NV> void tile(long row, long v) const {
        V acc[MR][NV] = {};
        ask<MR>(row, v * W / (gated ? 2 : 1), NV * W / (gated ? 2 : 1));
        product<N>(acc, words, reinterpret_cast<const float*>(x) + row * words, words, 1, w + v * W * words, NV * W);
        const long first = v * W / (gated ? 2 : 1);
#pragma GCC unroll 16
        for (int n = 0; n < NV; n++) {
            const V more = load(bias + (v + n) * W);
#pragma GCC unroll 16
            for (int i = 0; i < MR; i++) acc[i][n] += more;
        }
#pragma GCC unroll 16
        for (int i = 0; i < MR; i++) {
            T* to = y + (row + i) * out + first;
            if (!gated) {
                const T* with = onto ? onto + (row + i) * out + first : nullptr;
#pragma GCC unroll 16
                for (int n = 0; n < NV; n++) {
                    const long left = out - first - n * W;
                    store_n(to + n * W, with ? acc[i][n] + load_n(with + n * W, left) : acc[i][n], left);
                }
            } else {
#pragma GCC unroll 16
                for (int n = 0; n < NV / 2; n++)
                    store_n(to + n * W, acc[i][n] * gelu(acc[i][n + NV / 2]), out - first - n * W);
            }
        }
    }

    template <int MR, int NV> void some_rows(int count, long row, long v) const {
        if (count == MR) tile<MR, NV>(row, v);
        else if constexpr (MR > 1) some_rows<MR - 1, NV>(count, row, v);
    }

    // Rows [begin, end), and the panels [from, until).
    void run(long begin, long end, long from, long until) const {
        for (long v = from * PANEL; v < until * PANEL && v < vectors(); v += PANEL)
            by_vectors(vectors() - v, [&](auto nv) {
                constexpr int MOST = rows_of(nv);
                for (long row = begin; row < end; row += MOST)
                    some_rows<MOST, nv>(int(end - row < MOST ? end - row : MOST), row, v);
            });
    }
};

// W columns of the panels, of the rows of a weight (2 out, in) or (out, in); columns beyond `out` are zero.
template <class N> static void panel_columns(const float* weight, long out, long in, bool gated, long v, float* u) {
    const long vectors = up(out) / W * (gated ? 2 : 1), panel = v / PANEL * PANEL, rows = words<N>(in);
    const long width = vectors - panel < PANEL ? vectors - panel : PANEL, n = v - panel;
    const bool gate = gated && n >= width / 2;
    const long first = gated ? (panel / 2 + n - (gate ? width / 2 : 0)) * W : v * W;
    const float* from = weight + ((gate ? out : 0) + first) * in;
    float* to = u + panel * W * rows + n * W;
    for (long i = 0; i < rows; i += W) {
        V columns[W];
        for (long c = 0; c < W; c++)
            columns[c] = first + c < out ? rounded_words<N>(from + c * in + i * N::STEP, in - i * N::STEP) : V{};
        transpose(columns);
        for (long j = 0; j < W && i + j < rows; j++) store(to + (i + j) * width * W, columns[j]);
    }
}
