// Attention in blocks of QB queries and KB keys: scores never leave the nearest cache. Queries lie along the vectors,
// so that the softmax over the keys is a sum of vectors, and keys and values are read where they are.
//
//     s = k q^T scale (+ mask),  p = 2^(s log2(e) - lse),  o = p^T v / sum p
//     dv = p do,  dp = v do^T,  ds = p (dp - sum_d o do),  dq = ds^T k scale,  dk = ds q scale
//
// FlashAttention (Dao et al., 2022), algorithms 1 and 4, https://arxiv.org/abs/2205.14135
#pragma once
#include "gemm.h"

constexpr int QB = 64, KB = 64;
constexpr float LOG2E = 1.44269504088896341f;

// Where the numbers are: strides in floats of sample, head and token; the channels of a head lie side by side.
struct Tokens {
    const float* data;
    int64_t sample, head, token;
    const float* at(long b, long h) const { return data + b * sample + h * head; }
};

struct Shape {
    int64_t samples, heads, queries, keys, dim;
};

// Keys of the next block, of those from j on: blocks of as equal size as can be.
static inline long share(long keys, long j) {
    const long left = (keys - j + KB - 1) / KB;
    return (keys - j + left - 1) / left;
}

static inline long up(long n) { return (n + W - 1) / W * W; }

// A square of W rows as columns.
#ifdef __clang__
static inline void transpose(V* v) {
    V t[W];
    for (int i = 0; i < W; i++)
        for (int j = 0; j < W; j++) t[i][j] = v[j][i];
    memcpy(v, t, sizeof t);
}
#else
// At each stage, halves of neighbouring blocks change places.
template <int HALF> static inline void swap_halves(V* v) {
    VI low, high;
    for (int i = 0; i < W; i++) {
        low[i] = (i & HALF) ? i - HALF + W : i;
        high[i] = (i & HALF) ? i + W : i + HALF;
    }
    for (int i = 0; i < W; i++)
        if (!(i & HALF)) {
            V a = v[i], b = v[i + HALF];
            v[i] = __builtin_shuffle(a, b, low);
            v[i + HALF] = __builtin_shuffle(a, b, high);
        }
}
static inline void transpose(V* v) {
    if constexpr (W == 16) swap_halves<8>(v);
    if constexpr (W >= 8) swap_halves<4>(v);
    swap_halves<2>(v), swap_halves<1>(v);
}
#endif

// Rows [0, count), times a factor, as columns (dim, QB); columns up to the next whole vector are zero.
static void columns(const float* x, long token, long count, long dim, float factor, float* to) {
    for (long q = 0; q < count; q += W)
        for (long d = 0; d < dim; d += W) {
            V v[W];
            for (long i = 0; i < W; i++)
                v[i] = q + i < count ? load_n(x + (q + i) * token + d, dim - d) * all(factor) : V{};
            transpose(v);
            for (long i = 0; i < W && d + i < dim; i++) store(to + (d + i) * QB + q, v[i]);
        }
}

// Columns (dim, QB), times a factor for each, as rows [0, count).
static void columns_to_rows(const float* from, long count, long dim, const float* factors, float* x, long token) {
    for (long q = 0; q < count; q += W)
        for (long d = 0; d < dim; d += W) {
            V v[W];
            for (long i = 0; i < W; i++)
                v[i] = d + i < dim ? load(from + (d + i) * QB + q) * load(factors + q) : V{};
            transpose(v);
            for (long i = 0; i < W && q + i < count; i++) store_n(x + (q + i) * token + d, v[i], dim - d);
        }
}

// Rows [0, count) side by side, in rows of `width` numbers; rows up to `most` and numbers beyond `dim` are zero.
static void rows(const float* x, long token, long count, long most, long dim, float* to, long width) {
    for (long q = 0; q < most; q++) {
        const long there = q < count ? dim : 0;
        if (there == 8) memcpy(to + q * width, x + q * token, 8 * sizeof(float));
        else if (there) memcpy(to + q * width, x + q * token, dim * sizeof(float));
        if (there < width) memset(to + q * width + there, 0, (width - there) * sizeof(float));
    }
}

static void add_mask(float* s, const float* mask, long query, long key, long count, long keys) {
    for (long j = 0; j < keys; j++)
        for (long q = 0; q < count; q++) s[j * QB + q] += mask[q * query + j * key] * LOG2E;
}

struct Mask {
    const float* data;  // null: none
    int64_t sample, head, query, key;
    const float* at(long b, long h, long q, long j) const {
        return data + b * sample + h * head + q * query + j * key;
    }
};

// One block of queries against keys and values (keys, dim), which lie side by side here: rows far apart would fall
// into a few sets of the cache.
static void forward_block(const Shape& n, const float* q, long q_token, const float* k, const float* v, const Mask& mask, long b, long h, long first, float scale, float* out,
                          long out_token, float* lse, float* scratch) {
    const long count = n.queries - first < QB ? n.queries - first : QB;
    const long vectors = (count + W - 1) / W;
    float *qt = scratch, *ot = qt + n.dim * QB, *s = ot + n.dim * QB, *top = s + KB * QB, *total = top + QB;
    columns(q + first * q_token, q_token, count, n.dim, scale * LOG2E, qt);
    memset(ot, 0, n.dim * QB * sizeof(float));
    for (long c = 0; c < QB; c++) top[c] = -INF, total[c] = 0;
    for (long j = 0, keys; j < n.keys; j += keys) {
        keys = share(n.keys, j);
        gemm<false>(keys, vectors, n.dim, k + j * n.dim, n.dim, 1, qt, QB, s, QB);
        if (mask.data) add_mask(s, mask.at(b, h, first, j), mask.query, mask.key, count, keys);
        for (long c = 0; c < vectors * W; c += W) {
            V before = load(top + c), now = before, more = V{};
            for (long i = 0; i < keys; i++) now = vmax(now, load(s + i * QB + c));
            V from = now == all(-INF) ? V{} : now;  // a query that may look at nothing yet: p = 0, not NaN
            for (long i = 0; i < keys; i++) {
                V p = exp2v<true>(load(s + i * QB + c) - from);
                more += p;
                store(s + i * QB + c, p);
            }
            V shrink = exp2v<true>(before - from);
            store(top + c, now);
            store(total + c, load(total + c) * shrink + more);
            if (j)
                for (long d = 0; d < n.dim; d++) store(ot + d * QB + c, load(ot + d * QB + c) * shrink);
        }
        gemm<true>(n.dim, vectors, keys, v + j * n.dim, 1, n.dim, s, QB, ot, QB);
    }
    for (long c = 0; c < QB; c++) {
        const bool nothing = total[c] == 0;
        if (lse && c < count) lse[first + c] = nothing ? INF : top[c] + log2f(total[c]);
        total[c] = nothing ? 0 : 1 / total[c];
    }
    columns_to_rows(ot, count, n.dim, total, out + first * out_token, out_token);
}

static size_t backward_scratch(const Shape& n) {
    const size_t wide = up(n.dim);
    return 3 * n.dim * QB + 2 * QB * wide + 2 * KB * QB + 2 * QB + 2 * n.keys * wide + 2 * n.keys * n.dim;
}

static void backward_head(const Shape& n, const float* q, long q_token, const float* k, long k_token, const float* v,
                          long v_token, const Mask& mask, long b, long h, float scale, const float* out,
                          const float* dout, long out_token, const float* lse, float* dq, float* dk, float* dv,
                          long d_token, long dkv_token, float* scratch) {
    const long wide = up(n.dim), vectors = wide / W;
    float *qt = scratch, *dot = qt + n.dim * QB, *dqt = dot + n.dim * QB, *s = dqt + n.dim * QB, *ds = s + KB * QB,
          *rest = ds + KB * QB, *level = rest + QB, *qr = level + QB, *dor = qr + QB * wide, *dks = dor + QB * wide,
          *dvs = dks + n.keys * wide, *kr = dvs + n.keys * wide, *vr = kr + n.keys * n.dim;
    rows(k, k_token, n.keys, n.keys, n.dim, kr, n.dim);
    rows(v, v_token, n.keys, n.keys, n.dim, vr, n.dim);
    memset(dks, 0, 2 * n.keys * wide * sizeof(float));
    for (long first = 0; first < n.queries; first += QB) {
        const long count = n.queries - first < QB ? n.queries - first : QB, across = (count + W - 1) / W;
        columns(q + first * q_token, q_token, count, n.dim, scale * LOG2E, qt);
        columns(dout + first * out_token, out_token, count, n.dim, 1, dot);
        rows(q + first * q_token, q_token, count, QB, n.dim, qr, wide);
        rows(dout + first * out_token, out_token, count, QB, n.dim, dor, wide);
        columns(out + first * out_token, out_token, count, n.dim, 1, dqt);
        for (long c = 0; c < across * W; c += W) {
            V product = V{};
            for (long d = 0; d < n.dim; d++) product += load(dqt + d * QB + c) * load(dot + d * QB + c);
            store(rest + c, product);
            for (long i = c; i < c + W; i++) level[i] = i < count ? lse[first + i] : INF;  // infinity makes p = 0
        }
        memset(dqt, 0, n.dim * QB * sizeof(float));
        for (long j = 0, keys; j < n.keys; j += keys) {
            keys = share(n.keys, j);
            gemm<false>(keys, across, n.dim, kr + j * n.dim, n.dim, 1, qt, QB, s, QB);
            gemm<false>(keys, across, n.dim, vr + j * n.dim, n.dim, 1, dot, QB, ds, QB);
            if (mask.data) add_mask(s, mask.at(b, h, first, j), mask.query, mask.key, count, keys);
            for (long i = 0; i < keys; i++)
                for (long c = 0; c < across * W; c += W) {
                    float *ps = s + i * QB + c, *pd = ds + i * QB + c;
                    V p = exp2v<true>(load(ps) - load(level + c));
                    store(ps, p);
                    store(pd, p * (load(pd) - load(rest + c)));
                }
            gemm<true>(n.dim, across, keys, kr + j * n.dim, 1, n.dim, ds, QB, dqt, QB);
            gemm<true>(keys, vectors, count, s, QB, 1, dor, wide, dvs + j * wide, wide);
            gemm<true>(keys, vectors, count, ds, QB, 1, qr, wide, dks + j * wide, wide);
        }
        for (long c = 0; c < QB; c++) rest[c] = scale;
        columns_to_rows(dqt, count, n.dim, rest, dq + first * d_token, d_token);
    }
    for (long j = 0; j < n.keys; j++)
        for (long d = 0; d < n.dim; d++) {
            dk[j * dkv_token + d] = dks[j * wide + d] * scale;
            dv[j * dkv_token + d] = dvs[j * wide + d];
        }
}
