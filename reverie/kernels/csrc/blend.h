// Sums of tensors, y_i = sum_j w_ij x_j, element by element, all of them in one walk over memory.
#pragma once
#include "vector.h"

constexpr long BLEND_BLOCK = 1 << 14;  // numbers that a thread takes at once

// The sums over [from, to), and whether all came out finite. N: how many terms each has.
template <int N>
static bool blend(long from, long to, int sums, const float* weights, const float* const* in, float* const* out) {
    VI bad{};
    auto at = [&](long i, long n) {
        V x[N];
        for (int j = 0; j < N; j++) x[j] = load_n(in[j] + i, n);
        for (int o = 0; o < sums; o++) {
            const float* w = weights + o * N;
            V y = x[0] * all(w[0]);
            for (int j = 1; j < N; j++) y += x[j] * all(w[j]);
            const V zero = y - y;  // all bits are 0, but for infinity and NaN
            VI bits;
            memcpy(&bits, &zero, sizeof bits);
            bad |= bits;
            store_n(out[o] + i, y, n);
        }
    };
    long i = from;
    for (; i + W <= to; i += W) at(i, W);
    if (i < to) at(i, to - i);
    int any = 0;
    for (int lane = 0; lane < W; lane++) any |= bad[lane];
    return !any;
}

typedef bool (*Blend)(long, long, int, const float*, const float* const*, float* const*);
constexpr Blend BLENDS[] = {blend<1>, blend<2>, blend<3>, blend<4>, blend<5>, blend<6>, blend<7>, blend<8>};
