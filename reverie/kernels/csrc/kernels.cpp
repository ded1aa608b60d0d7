// The library's plain C interface. Every function returns 0, or 1 where there was no memory for its scratch.
#include "attention.h"
#include "blend.h"
#include "gate.h"
#include "linear.h"
#include "strassen.h"
#include "norm.h"
#include "normal.h"
#include "weight_gradient.h"
#include "winograd.h"
#ifdef _OPENMP
#include <omp.h>
#else
static inline int omp_get_thread_num() { return 0; }
#endif
#define API extern "C" __attribute__((visibility("default")))

// The checksum of the sources: a library that was built of others is not used.
API uint32_t reverie_sources() { return REVERIE_SOURCES; }

template <class N, class T = typename N::Number>
static int attention(const int64_t* shape, const T* q, const T* k, const T* v, const int64_t* strides,
                     const float* mask, const int64_t* mask_strides, float scale, T* out, float* lse, int threads) {
    const Shape n{shape[0], shape[1], shape[2], shape[3], shape[4]};
    const Tokens<T> tq{q, strides[0], strides[1], strides[2]}, tk{k, strides[3], strides[4], strides[5]},
        tv{v, strides[6], strides[7], strides[8]};
    const Mask m{mask, mask_strides[0], mask_strides[1], mask_strides[2], mask_strides[3]};
    const long blocks = (n.queries + QB - 1) / QB, heads = n.samples * n.heads;
    long parts = (threads + heads - 1) / heads;  // of a head's queries, so that all threads have something to do
    if (parts > blocks) parts = blocks;
    const size_t line = (n.dim + 1) * QB, head = (n.keys + 1) * (n.dim + 1);
    const Scratch scratch(threads, 2 * line + KB * QB + 2 * QB + 2 * head);
    if (!scratch.data) return 1;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (long task = 0; task < heads * parts; task++) {
        const long index = task / parts, part = task % parts, b = index / n.heads, h = index % n.heads;
        float *qt = scratch.of(omp_get_thread_num()), *o = qt + line, *p = o + line, *level = p + KB * QB,
              *total = level + QB, *kr = total + QB, *vr = kr + head;
        rows<N>(tk.at(b, h), tk.token, n.keys, n.dim, kr);
        across_rows<N>(tv.at(b, h), tv.token, n.keys, n.dim, vr);
        T* to = out + (b * n.queries * n.heads + h) * n.dim;
        for (long block = blocks * part / parts; block < blocks * (part + 1) / parts; block++) {
            const long first = block * QB, count = n.queries - first < QB ? n.queries - first : QB;
            columns<N>(tq.at(b, h) + first * tq.token, tq.token, count, n.dim, qt);
            Forward<N> f{n.keys, n.dim, qt, kr, vr, mask ? m.at(b, h, first, 0) : nullptr, m.query, m.key, count,
                         scale * LOG2E, false, p, level, total, o};
            f.run();
            f.end(to + first * n.heads * n.dim, n.heads * n.dim, lse ? lse + index * n.queries + first : nullptr);
        }
    }
    return 0;
}

template <class N, class T = typename N::Number>
static int attention_backward(const int64_t* shape, const T* q, const T* k, const T* v, const int64_t* strides,
                              const float* mask, const int64_t* mask_strides, float scale, const T* out, const T* dout,
                              const float* lse, T* dq, T* dk, T* dv, int64_t dq_token, int64_t dkv_token, int threads) {
    const Shape n{shape[0], shape[1], shape[2], shape[3], shape[4]};
    const Tokens<T> tq{q, strides[0], strides[1], strides[2]}, tk{k, strides[3], strides[4], strides[5]},
        tv{v, strides[6], strides[7], strides[8]};
    const Mask m{mask, mask_strides[0], mask_strides[1], mask_strides[2], mask_strides[3]};
    const Scratch scratch(threads, Backward<N>::scratch(n));
    if (!scratch.data) return 1;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (long head = 0; head < n.samples * n.heads; head++) {
        const long b = head / n.heads, h = head % n.heads, token = n.heads * n.dim;
        const long from = b * n.queries * token + h * n.dim;
        Backward<N> w{};
        w.begin(n, scratch.of(omp_get_thread_num()));
        w.scale = scale * LOG2E, w.lse = lse + head * n.queries;
        w.mask = mask ? m.at(b, h, 0, 0) : nullptr, w.mask_query = m.query, w.mask_key = m.key;
        rows<N>(tk.at(b, h), tk.token, n.keys, n.dim, w.k);
        rows<N>(tv.at(b, h), tv.token, n.keys, n.dim, w.v);
        across_rows<N>(tk.at(b, h), tk.token, n.keys, n.dim, w.k_across);
        float factors[QB];
        for (float& factor : factors) factor = scale;
        for (long first = 0; first < n.queries; first += QB) {
            const long count = n.queries - first < QB ? n.queries - first : QB;
            w.read(tq.at(b, h) + first * tq.token, tq.token, out + from + first * token, dout + from + first * token,
                   token, first, count);
            w.run(first, count);
            T* to = dq + (b * n.queries + first) * dq_token + h * n.dim;
            columns_to_rows(w.dqt, count, n.dim, factors, to, dq_token);
        }
        w.end(dk + b * n.keys * dkv_token + h * n.dim, dv + b * n.keys * dkv_token + h * n.dim, dkv_token, scale);
    }
    return 0;
}

#define ATTENTION(N, T, SUFFIX)                                                                                       \
    API int reverie_attention##SUFFIX(const int64_t* shape, const T* q, const T* k, const T* v,                       \
                                      const int64_t* strides, const float* mask, const int64_t* mask_strides,         \
                                      float scale, T* out, float* lse, int threads) {                                 \
        return attention<N>(shape, q, k, v, strides, mask, mask_strides, scale, out, lse, threads);                   \
    }                                                                                                                 \
    API int reverie_attention_backward##SUFFIX(                                                                       \
        const int64_t* shape, const T* q, const T* k, const T* v, const int64_t* strides, const float* mask,          \
        const int64_t* mask_strides, float scale, const T* out, const T* dout, const float* lse, T* dq, T* dk, T* dv, \
        int64_t dq_token, int64_t dkv_token, int threads) {                                                           \
        return attention_backward<N>(shape, q, k, v, strides, mask, mask_strides, scale, out, dout, lse, dq, dk, dv,  \
                                     dq_token, dkv_token, threads);                                                   \
    }

ATTENTION(Single, float, )
#ifdef __AVX512BF16__
ATTENTION(Half, uint16_t, _bfloat16)
#endif

API int reverie_gate(const void* x, int64_t rows, int64_t width, void* y, int bfloat16, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (long row = 0; row < rows; row++) {
        const long from = 2 * row * width, to = row * width;
        if (bfloat16) gate_row(static_cast<const uint16_t*>(x) + from, width, static_cast<uint16_t*>(y) + to);
        else gate_row(static_cast<const float*>(x) + from, width, static_cast<float*>(y) + to);
    }
    return 0;
}

// How many channels a thread takes at once: all, or where there are fewer samples than threads, whole groups and
// whole vectors of them. A channel's arithmetic is the same in any case.
static long channels_at_once(const Norm& n, int threads) {
    if (n.samples >= threads) return n.channels;
    const long width = n.channels / n.groups;
    long step = width;
    while (step % W) step += width;
    return step < n.channels ? step : n.channels;
}

template <class Task> static int over_channels(const Norm& n, int threads, const Task& task) {
    const long step = channels_at_once(n, threads), parts = (n.channels + step - 1) / step;
    const Scratch scratch(threads, norm_scratch(n.channels));
    if (!scratch.data) return 1;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (long i = 0; i < n.samples * parts; i++) {
        const long from = i % parts * step, to = from + step < n.channels ? from + step : n.channels;
        task(i / parts, from, to, scratch.of(omp_get_thread_num()));
    }
    return 0;
}

API int reverie_norm(const Norm* n, const void* x, void* y, int bfloat16, int threads) {
    return over_channels(*n, threads, [&](long b, long from, long to, float* scratch) {
        if (bfloat16)
            norm_forward(*n, static_cast<const uint16_t*>(x), static_cast<uint16_t*>(y), b, from, to, scratch);
        else norm_forward(*n, static_cast<const float*>(x), static_cast<float*>(y), b, from, to, scratch);
    });
}

API int reverie_norm_backward(const Norm* n, const NormGradients* out, const void* x, const void* dy, void* dx,
                              int bfloat16, int threads) {
    return over_channels(*n, threads, [&](long b, long from, long to, float* scratch) {
        if (bfloat16)
            norm_backward(*n, *out, static_cast<const uint16_t*>(x), static_cast<const uint16_t*>(dy),
                          static_cast<uint16_t*>(dx), b, from, to, scratch);
        else
            norm_backward(*n, *out, static_cast<const float*>(x), static_cast<const float*>(dy),
                          static_cast<float*>(dx), b, from, to, scratch);
    });
}

// plan: the numbers of terms and of sums, and the weights. call: how many numbers a tensor has, the threads, and the
// pointers to the terms, then to the sums. Few arguments: each costs as much as a thousand numbers. Returns 0 where every
// sum is finite, else 1.
API int reverie_blend(const int32_t* plan, const int64_t* call) {
    const int terms = plan[0], sums = plan[1];
    const auto weights = reinterpret_cast<const float*>(plan + 2);
    const long count = call[0], threads = call[1];
    const auto in = reinterpret_cast<const float* const*>(call + 2);
    const auto out = reinterpret_cast<float* const*>(call + 2 + terms);
    int bad = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(| : bad) if (threads > 1 && count > BLEND_BLOCK)
    for (long from = 0; from < count; from += BLEND_BLOCK) {
        const long to = from + BLEND_BLOCK < count ? from + BLEND_BLOCK : count;
        bad |= !BLENDS[terms - 1](from, to, sums, weights, in, out);
    }
    return bad;
}

// Rows of standard normal numbers, each by a key of its own of two words.
API int reverie_normals(const uint64_t* keys, int64_t rows, int64_t count, float* out, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1 && rows > 1)
    for (int64_t row = 0; row < rows; row++) normals(keys[2 * row], keys[2 * row + 1], count, out + row * count);
    return 0;
}

// How wide a panel of weights is, in numbers: whole ones, and the last in whole vectors.
API int reverie_panel() { return PANEL * W; }
API int reverie_vector() { return W; }

// shape: samples, height, width, inputs, outputs; height and width of y. Samples share blocks of tiles; where there are
// fewer blocks than threads, the outputs are shared out as well.
template <int HIGH, int WIDE, class N, class T = typename N::Number>
static int winograd(const int64_t* shape, const T* x, const float* u, const float* bias, T* y, int threads) {
    const Image n{shape[0], shape[1], shape[2], shape[3], shape[4]};
    const Winograd<HIGH, WIDE, N> w(n, x, u, bias, y, shape[5], shape[6]);
    const long panels = (w.vectors() + PANEL - 1) / PANEL;
    long blocks = (w.tiles + TILES - 1) / TILES;
    if (blocks > threads) blocks = (blocks + threads - 1) / threads * threads;
    const long wanted = (threads + blocks - 1) / blocks, parts = wanted < panels ? wanted : panels;
    const Scratch scratch(threads, w.scratch());
    if (!scratch.data) return 1;
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (threads > 1)
    for (long task = 0; task < blocks * parts; task++) {
        const long block = task / parts, part = task % parts;
        w.run(w.tiles * block / blocks, w.tiles * (block + 1) / blocks, panels * part / parts,
              panels * (part + 1) / parts, scratch.of(omp_get_thread_num()));
    }
    return 0;
}

template <int HIGH, int WIDE, class N>
static int winograd_weights(const float* g, int64_t out, int64_t in, float* u, int threads) {
    const Transform<HIGH, WIDE, N> transform{g, out, in, u};
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (threads > 1)
    for (long first = 0; first < out; first += W) transform.run(first);
    return 0;
}

#define WINOGRAD(HIGH, WIDE, N, T, SUFFIX)                                                                            \
    API int reverie_winograd##HIGH##WIDE##SUFFIX(const int64_t* shape, const T* x, const float* u, const float* bias, \
                                                 T* y, int threads) {                                                 \
        return winograd<HIGH, WIDE, N>(shape, x, u, bias, y, threads);                                                \
    }                                                                                                                 \
    API int reverie_winograd##HIGH##WIDE##_weights##SUFFIX(const float* g, int64_t out, int64_t in, float* u,         \
                                                           int threads) {                                             \
        return winograd_weights<HIGH, WIDE, N>(g, out, in, u, threads);                                               \
    }

WINOGRAD(1, 1, Single, float, )
WINOGRAD(2, 2, Single, float, )
WINOGRAD(4, 4, Single, float, )
#ifdef __AVX512BF16__
WINOGRAD(1, 1, Half, uint16_t, _bfloat16)
WINOGRAD(2, 2, Half, uint16_t, _bfloat16)
WINOGRAD(2, 4, Half, uint16_t, _bfloat16)
WINOGRAD(4, 4, Half, uint16_t, _bfloat16)
#endif

// Call run(begin, end, from, until) for blocks of rows, at most so many and in whole tiles, and where there are fewer of them
// than threads, for parts of the panels too.
template <class F> static void in_blocks(long rows, long most, long panels, int threads, const F& run) {
    const long tiles = (rows + rows_of(PANEL) - 1) / rows_of(PANEL);
    long blocks = (rows + most - 1) / most;
    if (tiles >= threads) blocks = (blocks + threads - 1) / threads * threads;
    const long wanted = (threads + blocks - 1) / blocks, parts = wanted < panels ? wanted : panels;
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (threads > 1)
    for (long task = 0; task < blocks * parts; task++) {
        const long block = task / parts, part = task % parts, end = tiles * (block + 1) / blocks * rows_of(PANEL);
        run(tiles * block / blocks * rows_of(PANEL), end < rows ? end : rows, panels * part / parts,
            panels * (part + 1) / parts);
    }
}

// shape: rows, inputs in words, outputs.
template <class N, class T = typename N::Number>
static int linear(const int64_t* shape, const T* x, const float* w, const float* bias, const T* onto, T* y, int gated,
                  int threads) {
    const Linear<N> l{shape[0], shape[1], shape[2], x, w, bias, onto, y, gated != 0};
    in_blocks(l.rows, l.block(), l.panels(), threads,
              [&](long begin, long end, long from, long until) { l.run(begin, end, from, until); });
    return 0;
}

// shape: samples, rows of each, half of the inputs in words, outputs.
template <class N, class T = typename N::Number>
static int strassen(const int64_t* shape, const T* x, const float* w, const float* bias, const T* onto, T* y, int gated,
                    int threads) {
    const Strassen<N> l(shape, x, w, bias, onto, y, gated != 0);
    const Scratch scratch(threads, l.scratch());
    if (!scratch.data) return 1;
    in_blocks(l.pairs(), l.PAIRS, l.panels(), threads, [&](long begin, long end, long from, long until) {
        l.run(begin, end, from, until, scratch.of(omp_get_thread_num()));
    });
    return 0;
}

// shape: outputs of y, inputs.
template <class N>
static int linear_weights(const int64_t* shape, const float* weight, float* u, int gated, int threads) {
    const long vectors = up(shape[0]) / W * (gated ? 2 : 1);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (long v = 0; v < vectors; v++) panel_columns<N>(weight, shape[0], shape[1], gated != 0, v, u);
    return 0;
}

template <class N>
static int strassen_weights(const int64_t* shape, const float* weight, float* u, int gated, int threads) {
    const Halves<N> halves{weight, shape[0], shape[1], gated != 0, u};
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (long v = 0; v < halves.columns() / W; v++) halves.run(v);
    return 0;
}

#define LAYER(NAME, N, T, SUFFIX)                                                                                     \
    API int reverie_##NAME##_weights##SUFFIX(const int64_t* shape, const float* weight, float* u, int gated,          \
                                             int threads) {                                                           \
        return NAME##_weights<N>(shape, weight, u, gated, threads);                                                   \
    }                                                                                                                 \
    API int reverie_##NAME##SUFFIX(const int64_t* shape, const T* x, const float* w, const float* bias,               \
                                   const T* onto, T* y, int gated, int threads) {                                     \
        return NAME<N>(shape, x, w, bias, onto, y, gated, threads);                                                   \
    }

LAYER(linear, Single, float, )
LAYER(strassen, Single, float, )
#ifdef __AVX512BF16__
LAYER(linear, Half, uint16_t, _bfloat16)
LAYER(strassen, Half, uint16_t, _bfloat16)
#endif

// shape: samples, height, width, inputs, outputs. dw: (threads, outputs, 3, 3, inputs in whole vectors); db: (threads,
// outputs in whole vectors). Each thread's part is the sum over samples of its own.
template <class N, class T = typename N::Number>
static int weight_gradient(const int64_t* shape, const T* x, const T* dy, float* dw, float* db, int threads) {
    const WeightGradient<N> w({shape[0], shape[1], shape[2], shape[3], shape[4]}, x, dy);
    const long groups = words<N>(w.n.samples), size = w.n.out * 9 * w.wide;
    const Scratch scratch(threads, w.scratch());
    if (!scratch.data) return 1;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (long part = 0; part < threads; part++)
        w.run(groups * part / threads * N::STEP, groups * (part + 1) / threads * N::STEP, dw + part * size, db + part * w.high,
              scratch.of(omp_get_thread_num()));
    return 0;
}

#define WEIGHT_GRADIENT(N, T, SUFFIX)                                                                                 \
    API int reverie_weight_gradient##SUFFIX(const int64_t* shape, const T* x, const T* dy, float* dw, float* db,      \
                                            int threads) {                                                            \
        return weight_gradient<N>(shape, x, dy, dw, db, threads);                                                     \
    }

WEIGHT_GRADIENT(Single, float, )
#ifdef __AVX512BF16__
WEIGHT_GRADIENT(Half, uint16_t, _bfloat16)
#endif
