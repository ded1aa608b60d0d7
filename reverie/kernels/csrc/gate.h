// Gated units: y = h gelu(g) of rows (h, g), in one pass. gelu(g) = g Phi(g), with Phi by the error function within
// 2e-7: Abramowitz & Stegun, Handbook of Mathematical Functions, 7.1.26.
#pragma once
#include "numbers.h"

static inline V gelu(V x) {
    const V size = x < V{} ? -x : x, z = size * all(0.70710678118654752f);
    const V t = all(1) / (all(1) + all(0.3275911f) * z);
    V p = all(1.061405429f);
    p = p * t + all(-1.453152027f);
    p = p * t + all(1.421413741f);
    p = p * t + all(-0.284496736f);
    p = p * t + all(0.254829592f);
    const V tail = all(0.5f) * p * t * Single::exp2(z * z * all(-1.44269504088896341f));  // 1 - Phi(|x|)
    return x * (x < V{} ? tail : all(1) - tail);
}

template <class T> static void gate_row(const T* x, long width, T* y) {
    for (long i = 0; i < width; i += W)
        store_n(y + i, load_n(x + i, width - i) * gelu(load_n(x + width + i, width - i)), width - i);
}
