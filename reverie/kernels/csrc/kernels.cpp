// The library's plain C interface. Every function returns 0, or 1 where there was no memory for its scratch.
#include "attention.h"
#include "norm.h"
#ifdef _OPENMP
#include <omp.h>
#else
static inline int omp_get_thread_num() { return 0; }
#endif
#define API extern "C" __attribute__((visibility("default")))

// The checksum of the sources: a library that was built of others is not used.
API uint32_t reverie_sources() { return REVERIE_SOURCES; }

API int reverie_attention(const int64_t* shape, const float* q, const float* k, const float* v, const int64_t* strides,
                          const float* mask, const int64_t* mask_strides, float scale, float* out, float* lse,
                          int threads) {
    const Shape n{shape[0], shape[1], shape[2], shape[3], shape[4]};
    const Tokens tq{q, strides[0], strides[1], strides[2]}, tk{k, strides[3], strides[4], strides[5]},
        tv{v, strides[6], strides[7], strides[8]};
    const Mask m{mask, mask_strides[0], mask_strides[1], mask_strides[2], mask_strides[3]};
    const long blocks = (n.queries + QB - 1) / QB, heads = n.samples * n.heads;
    long parts = (threads + heads - 1) / heads;  // of a head's queries, so that all threads have something to do
    if (parts > blocks) parts = blocks;
    const size_t own = 2 * n.dim * QB + KB * QB + 2 * QB;
    const Scratch scratch(threads, own + 2 * n.keys * n.dim);
    if (!scratch.data) return 1;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (long task = 0; task < heads * parts; task++) {
        const long head = task / parts, part = task % parts, b = head / n.heads, h = head % n.heads;
        float *space = scratch.of(omp_get_thread_num()), *kr = space + own, *vr = kr + n.keys * n.dim;
        rows(tk.at(b, h), tk.token, n.keys, n.keys, n.dim, kr, n.dim);
        rows(tv.at(b, h), tv.token, n.keys, n.keys, n.dim, vr, n.dim);
        float* to = out + (b * n.queries * n.heads + h) * n.dim;
        for (long block = blocks * part / parts; block < blocks * (part + 1) / parts; block++)
            forward_block(n, tq.at(b, h), tq.token, kr, vr, m, b, h, block * QB, scale, to, n.heads * n.dim,
                          lse ? lse + head * n.queries : nullptr, space);
    }
    return 0;
}

API int reverie_attention_backward(const int64_t* shape, const float* q, const float* k, const float* v,
                                   const int64_t* strides, const float* mask, const int64_t* mask_strides, float scale,
                                   const float* out, const float* dout, const float* lse, float* dq, float* dk,
                                   float* dv, int64_t dq_token, int64_t dkv_token, int threads) {
    const Shape n{shape[0], shape[1], shape[2], shape[3], shape[4]};
    const Tokens tq{q, strides[0], strides[1], strides[2]}, tk{k, strides[3], strides[4], strides[5]},
        tv{v, strides[6], strides[7], strides[8]};
    const Mask m{mask, mask_strides[0], mask_strides[1], mask_strides[2], mask_strides[3]};
    const Scratch scratch(threads, backward_scratch(n));
    if (!scratch.data) return 1;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (long head = 0; head < n.samples * n.heads; head++) {
        const long b = head / n.heads, h = head % n.heads, from = (b * n.queries * n.heads + h) * n.dim;
        float *to_q = dq + b * n.queries * dq_token + h * n.dim, *to_k = dk + b * n.keys * dkv_token + h * n.dim,
              *to_v = dv + b * n.keys * dkv_token + h * n.dim;
        backward_head(n, tq.at(b, h), tq.token, tk.at(b, h), tk.token, tv.at(b, h), tv.token, m, b, h, scale,
                      out + from, dout + from, n.heads * n.dim, lse + head * n.queries, to_q, to_k, to_v, dq_token,
                      dkv_token, scratch.of(omp_get_thread_num()));
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
