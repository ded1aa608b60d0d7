// Attention in blocks of QB queries and KB keys: scores never leave the registers, their weights never the nearest
// cache. Queries lie along the vectors, so that the softmax over the keys is a sum of vectors.
//
//     s = k q^T scale (+ mask),  p = 2^(s log2(e) - lse),  o = p^T v / sum p
//     dv = p do,  dp = v do^T,  ds = p (dp - sum_d o do),  dq = ds^T k scale,  dk = ds q scale
//
// FlashAttention (Dao et al., 2022), algorithms 1 and 4, https://arxiv.org/abs/2205.14135
#pragma once
#include "gemm.h"

constexpr int QB = 64, KB = 96;
constexpr int TILE = 6;  // keys whose scores are in registers at once, with PANEL vectors of queries
// A query's weights are 2^(s - level), where the level is raised only when a score exceeds it by more than this: it
// divides out in the end, and what was summed seldom has to be scaled again.
constexpr float SLACK = 16, LARGEST = 1 << 16;
constexpr float VERY_LARGE = 1 << 20;
constexpr float NOTHING = std::numeric_limits<float>::lowest();  // the level of a query that has seen no key yet

// Where the numbers are: strides in numbers of sample, head and token; the channels of a head lie side by side.
template <class T> struct Tokens {
    const T* data;
    int64_t sample, head, token;
    const T* at(long b, long h) const { return data + b * sample + h * head; }
};

struct Shape {
    int64_t samples, heads, queries, keys, dim;
};

struct Mask {
    const float* data;  // null: none
    int64_t sample, head, query, key;
    const float* at(long b, long h, long q, long j) const {
        return data + b * sample + h * head + q * query + j * key;
    }
};

// Rows [0, count) as columns of words (dim, QB); columns up to the next whole vector are zero.
template <class N>
static void columns(const typename N::Number* x, long token, long count, long dim, float* to) {
    for (long q = 0; q < count; q += W)
        for (long d = 0; d < words<N>(dim); d += W) {
            V v[W];
            for (long i = 0; i < W; i++)
                v[i] = q + i < count ? load_words<N>(x + (q + i) * token + d * N::STEP, dim - d * N::STEP) : V{};
            transpose(v);
            for (long i = 0; i < W && d + i < words<N>(dim); i++) store(to + (d + i) * QB + q, v[i]);
        }
}

// Columns (dim, QB), times a factor for each, as rows [0, count).
template <class T>
static void columns_to_rows(const float* from, long count, long dim, const float* factors, T* x, long token) {
    for (long q = 0; q < count; q += W)
        for (long d = 0; d < dim; d += W) {
            V v[W];
            for (long i = 0; i < W; i++)
                v[i] = d + i < dim ? load(from + (d + i) * QB + q) * load(factors + q) : V{};
            transpose(v);
            for (long i = 0; i < W && q + i < count; i++) store_n(x + (q + i) * token + d, v[i], dim - d);
        }
}

// Rows [0, count) side by side, in whole words.
template <class N> static void rows(const typename N::Number* x, long token, long count, long dim, float* to) {
    for (long j = 0; j < count; j++, to += words<N>(dim)) {
        if (dim % N::STEP) to[words<N>(dim) - 1] = 0;
        if (dim == 8) memcpy(to, x + j * token, 8 * sizeof *x);
        else memcpy(to, x + j * token, dim * sizeof *x);
    }
}

// Rows [0, count) in words that go along the rows: `dim` of them for each STEP rows.
template <class N> static void across_rows(const typename N::Number* x, long token, long count, long dim, float* to) {
    for (long j = 0; j < count; j += N::STEP, to += dim)
        for (long d = 0; d < dim; d += W)
            store_n(to + d, words_across<N>(x + j * token + d, token, count - j, dim - d), dim - d);
}

// What a mask adds to the scores of W queries and one key.
static inline V mask_of(const float* mask, long query, long count) {
    if (query == 0) return all(*mask * LOG2E);
    V v = {};
    for (long i = 0; i < W && i < count; i++) v[i] = mask[i * query];
    return v * all(LOG2E);
}

// A block of queries on its way along the keys.
template <class N> struct Forward {
    long keys, dim;         // of all the keys; channels of a head
    const float *q, *k, *v;  // in words: (dim, QB), (keys, dim), and (keys, dim) across the rows
    const float* mask;      // of the first query and key; null: none
    long mask_query, mask_key;
    long count;   // queries that there are
    float scale;  // of the scores, as powers of two
    bool scaled;  // whether they are scaled before anything is done with them: for a mask, or where they are very large
    float *p;               // weights, in words across the keys of a block: (KB, QB)
    float *level, *total;   // (QB)
    float* out;             // (dim, QB)

    void begin() {
        scaled = mask != nullptr;
        memset(out, 0, dim * QB * sizeof(float));
        for (long c = 0; c < QB; c++) level[c] = NOTHING, total[c] = 0;
    }

    // Keys from `first` on, and NV vectors of queries from column c on.
    template <int NV> void block(long first, long last, long c) {
        long taken = first;
        for (long j = first; j < last; j += TILE)
            some_keys<TILE, NV>(int(last - j < TILE ? last - j : TILE), first, j, c, taken);
        take<NV>(first, taken, last, c);
    }

    template <int ROWS, int NV> void some_keys(int rows, long first, long j, long c, long& taken) {
        if (rows == ROWS) weights<ROWS, NV>(first, j, c, taken);
        else if constexpr (ROWS > 1) some_keys<ROWS - 1, NV>(rows, first, j, c, taken);
    }

    // out += p^T v for the keys whose weights wait.
    template <int NV> void take(long first, long taken, long until, long c) {
        if (taken == until) return;
        panel<N, false, NV>(dim, words<N>(until - taken), v + taken / N::STEP * dim, 1, dim,
                           p + (taken - first) / N::STEP * QB + c, QB, out + c, QB);
    }

    template <int ROWS, int NV> void weights(long first, long j, long c, long& taken) {
        if (j > 0 && __builtin_expect(powers<ROWS, NV>(first, j, c), 1)) return;
        levels<ROWS, NV>(first, j, c, taken);
        powers<ROWS, NV, true>(first, j, c);
    }

    template <int ROWS, int NV> void scores(V (&s)[ROWS][NV], long j, long c) {
        product<N>(s, words<N>(dim), k + j * words<N>(dim), words<N>(dim), 1, q + c, QB);
        if (__builtin_expect(scaled, 0)) rescore(s, j, c);
    }

    // The weights of some keys at the levels that there are, and their sums; or, if these came out too large, false.
    template <int ROWS, int NV, bool RAISED = false> bool powers(long first, long j, long c) {
        V s[ROWS][NV] = {}, sums[NV];
        scores(s, j, c);
        const V factor = all(scaled ? 1 : scale);
        float* to = p + (j - first) / N::STEP * QB + c;
        bool good = true;
#pragma GCC unroll 4
        for (int x = 0; x < NV; x++) {
            const V low = load(level + c + x * W);
#pragma GCC unroll 6
            for (int i = 0; i < ROWS; i++) {
                s[i][x] = N::exp2(s[i][x] * factor - low);
                sums[x] = i ? sums[x] + s[i][x] : s[i][x];
            }
            good &= !exceeds_or_nan(sums[x], all(TILE * LARGEST));
#pragma GCC unroll 6
            for (int i = 0; i < ROWS; i += N::STEP)
                store(to + i / N::STEP * QB + x * W, N::join(s[i][x], i + 1 < ROWS ? s[i + 1][x] : V{}));
        }
        if (__builtin_expect(!good && !RAISED, 0)) return false;
#pragma GCC unroll 4
        for (int x = 0; x < NV; x++) store(total + c + x * W, load(total + c + x * W) + sums[x]);
        return true;
    }

    // Raise the levels that scores of these keys exceed by much; what waits is taken before.
    template <int ROWS, int NV> __attribute__((noinline)) void levels(long first, long j, long c, long& taken) {
        V s[ROWS][NV] = {};
        scores(s, j, c);
        take<NV>(first, taken, j, c);
        taken = j;
        bool large = false;
        for (int x = 0; x < NV; x++) {
            V top = s[0][x];
            for (int i = 1; i < ROWS; i++) top = larger(top, s[i][x]);
            large |= raise(top * all(scaled ? 1 : scale), c + x * W);
        }
        scaled |= large;
    }

    // Scores in their final scale, with the mask.
    template <int ROWS, int NV> void rescore(V (&s)[ROWS][NV], long j, long c) {
        for (int i = 0; i < ROWS; i++)
            for (int x = 0; x < NV; x++) {
                const long from = c + x * W;
                s[i][x] *= all(scale);
                if (mask)
                    s[i][x] += mask_of(mask + from * mask_query + (j + i) * mask_key, mask_query, count - from);
            }
    }

    // Raise the levels of W queries to their scores where those are much higher; whether any is very large.
    bool raise(V top, long c) {
        const V before = load(level + c), now = top > before + all(SLACK) ? top : before;
        const V shrink = now == before ? all(1) : exp2v<true>(before - now);
        store(level + c, now);
        store(total + c, load(total + c) * shrink);
        for (long d = 0; d < dim; d++) store(out + d * QB + c, load(out + d * QB + c) * shrink);
        return exceeds(now, all(VERY_LARGE)) || (exceeds(all(-VERY_LARGE), now) && exceeds(now, all(NOTHING)));
    }

    void run() {
        begin();
        const long tiles = (keys + TILE - 1) / TILE, most = KB / TILE, blocks = (tiles + most - 1) / most;
        for (long b = 0; b < blocks; b++) {
            const long first = tiles * b / blocks * TILE, end = tiles * (b + 1) / blocks * TILE;
            const long last = end < keys ? end : keys, vectors = (count + W - 1) / W;
            for (long x = 0; x < vectors; x += PANEL)
                by_vectors(vectors - x, [&](auto nv) { block<nv>(first, last, x * W); });
        }
    }

    // Divide by the sums, as rows; and the logarithms of the sums.
    void end(typename N::Number* to, long token, float* lse) {
        for (long c = 0; c < QB; c += W) {
            const V all_of_it = load(total + c);
            const VI nothing = all_of_it == V{};
            if (lse && c < count)
                store_n(lse + c, nothing ? all(INF) : load(level + c) + log2v(all_of_it), count - c);
            store(total + c, nothing ? V{} : all(1) / all_of_it);
        }
        columns_to_rows(out, count, dim, total, to, token);
    }
};

static inline long forward_scratch(const Shape& n) { return 2 * n.dim * QB + KB * QB + 2 * QB; }

// The gradients of a head.
template <class N> struct Backward {
    using Number = typename N::Number;
    static constexpr long KEYS = 64;       // in a block
    static constexpr long ROW = 2 * QB / N::STEP;  // words that two rows of queries take
    long queries, keys, dim;
    float scale;  // of the scores
    const float* mask;
    long mask_query, mask_key;
    const float* lse;
    // In words: keys and values (keys, dim), keys across the rows; queries and gradients as columns (dim, QB), and
    // gradients and queries in turns across the rows (QB, 2 dim).
    float *k, *v, *k_across, *qt, *dot, *turns;
    float *both, *ds;  // weights and gradients of scores in turns (KEYS, QB); the latter alone, across the keys
    float *dqt, *dkv, *level, *rest;  // dkv: gradients of values and keys in turns (keys, 2 dim)

    static size_t scratch(const Shape& n) {
        const size_t dim = n.dim + 1, keys = n.keys + 1;
        return 3 * keys * dim + 3 * dim * QB + QB * up(2 * n.dim) + KEYS * 3 * QB + keys * up(2 * n.dim) + 2 * QB;
    }

    void begin(const Shape& n, float* space) {
        queries = n.queries, keys = n.keys, dim = n.dim;
        const long line = (dim + 1) * QB, head = (keys + 1) * (dim + 1);
        const auto next = [&space](long count) { return (space += count) - count; };
        both = next(KEYS * 2 * QB), ds = next(KEYS * QB), level = next(QB), rest = next(QB);
        qt = next(line), dot = next(line), dqt = next(line), turns = next(QB * up(2 * dim));
        dkv = next((keys + 1) * up(2 * dim)), k = next(head), v = next(head), k_across = next(head);
        memset(dkv, 0, keys * up(2 * dim) * sizeof(float));
    }

    // What a block of queries brings: q, out and the gradient of out from their first row on.
    void read(const Number* q, long q_token, const Number* out, const Number* dout, long token, long first,
              long count) {
        columns<N>(q, q_token, count, dim, qt);
        columns<N>(dout, token, count, dim, dot);
        in_turns(dout, token, q, q_token, count);
        for (long i = 0; i < QB; i++) {
            V product = {};
            for (long d = 0; i < count && d < dim; d += W)
                product += load_n(out + i * token + d, dim - d) * load_n(dout + i * token + d, dim - d);
            rest[i] = sum(product);
            level[i] = i < count ? lse[first + i] : INF;  // infinity makes p = 0
        }
        memset(dqt, 0, dim * QB * sizeof(float));
    }

    void in_turns(const Number* a, long a_token, const Number* b, long b_token, long count) {
        const long width = up(2 * dim);
        float* to = turns;
        for (long i = 0; i < count; i += N::STEP, to += width)
            for (long d = 0; d < dim; d += W) {
                V first = words_across<N>(a + i * a_token + d, a_token, count - i, dim - d);
                V second = words_across<N>(b + i * b_token + d, b_token, count - i, dim - d);
                into_turns(first, second);
                store(to + 2 * d, first);
                if (2 * d + W < width) store(to + 2 * d + W, second);
            }
    }

    // Weights and gradients of scores of one or two keys j, and NV vectors of queries from column c on.
    template <int ROWS, int NV> void scores(long first, long j, long c, long query, long count) {
        const long wide = words<N>(dim);
        V s[ROWS][NV] = {}, dp[ROWS][NV] = {};
        product<N>(s, wide, k + j * wide, wide, 1, qt + c, QB);
        product<N>(dp, wide, v + j * wide, wide, 1, dot + c, QB);
#pragma GCC unroll 4
        for (int x = 0; x < NV; x++) {
            const long from = c + x * W;
#pragma GCC unroll 2
            for (int i = 0; i < ROWS; i++) {
                if (mask)
                    s[i][x] = s[i][x] * all(scale) + mask_of(mask + (query + from) * mask_query + (j + i) * mask_key,
                                                             mask_query, count - from);
                s[i][x] = N::exp2(s[i][x] * all(mask ? 1 : scale) - load(level + from));
                dp[i][x] = s[i][x] * (dp[i][x] - load(rest + from));
                N::store_both(both + (j + i - first) * ROW + 2 * from / N::STEP, s[i][x], dp[i][x]);
            }
#pragma GCC unroll 2
            for (int i = 0; i < ROWS; i += N::STEP)
                store(ds + (j + i - first) / N::STEP * QB + from, N::join(dp[i][x], i + 1 < ROWS ? dp[i + 1][x] : V{}));
        }
    }

    template <int NV> void block(long first, long last, long c, long query, long count) {
        for (long j = first; j < last; j += 2) {
            if (last - j > 1) scores<2, NV>(first, j, c, query, count);
            else scores<1, NV>(first, j, c, query, count);
        }
        panel<N, false, NV>(dim, words<N>(last - first), k_across + first / N::STEP * dim, 1, dim, ds + c, QB, dqt + c,
                            QB);
    }

    void run(long query, long count) {
        const long vectors = (count + W - 1) / W, width = up(2 * dim);
        for (long first = 0; first < keys; first += KEYS) {
            const long last = first + KEYS < keys ? first + KEYS : keys;
            for (long x = 0; x < vectors; x += PANEL) by_vectors(vectors - x, [&](auto nv) {
                block<nv>(first, last, x * W, query, count);
            });
            gemm<N, true>(last - first, width / W, words<N>(count), both, ROW, 2, turns, width, dkv + first * width,
                          width);
        }
    }

    // Gradients of keys and values, as rows.
    void end(Number* dk, Number* dv, long token, float factor) {
        const long width = up(2 * dim);
        for (long j = 0; j < keys; j++)
            for (long d = 0; d < dim; d += W) {
                const float* from = dkv + j * width + 2 * d;
                V first = load(from), second = 2 * d + W < width ? load(from + W) : V{};
                out_of_turns(first, second);
                store_n(dv + j * token + d, first, dim - d);
                store_n(dk + j * token + d, second * all(factor), dim - d);
            }
    }
};
