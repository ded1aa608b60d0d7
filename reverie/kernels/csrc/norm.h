// Group norm of images in channels-last, with an optional addition before it, scale and shift after it, and SiLU:
//
//     u = (x + add_bc - mean_bg) rstd_bg,  z = (u w_c + b_c)(1 + scale_bc) + shift_bc,  y = z or silu(z)
//
// One walk over memory for the moments and one to apply them, each in blocks of rows that stay in the nearest cache.
// The moments are those of Chan, Golub & LeVeque (1979), block by block, which large means do not spoil.
#pragma once
#include "vector.h"

struct Norm {
    int64_t samples, pixels, channels, groups;
    float eps;
    int32_t silu;
    const float *add, *weight, *bias, *scale, *shift;  // add (B, C), weight (C), bias (C), scale, shift (B, C); or null
    float *mean, *rstd;                                // (B, G)
};


static inline V sigmoid(V z) { return all(1.0f) / (all(1.0f) + expv(-z)); }
static inline V silu(V z) { return z * sigmoid(z); }
static inline V dsilu(V z) {
    V s = sigmoid(z);
    // z -> -inf: s = 0 and z (1 - s) is finite; z = +-inf itself gives NaN, as the formula does
    return s * (all(1.0f) + z * (all(1.0f) - s));
}

static inline long block_rows(long channels) {
    const long rows = 4096 / channels;  // 16 KiB
    return rows < 32 ? 32 : rows > 128 ? 128 : rows;
}

// Mean and sum of squared distances from it, of each channel [from, to) of one sample: into mean and spread (doubles).
template <class T>
static void moments(const T* x, long pixels, long channels, long from, long to, double* mean, double* spread) {
    const long rows = block_rows(channels);
    for (long c = 0; c < to - from + W; c++) mean[c] = spread[c] = 0;
    for (long first = 0; first < pixels; first += rows) {
        const long count = pixels - first < rows ? pixels - first : rows;
        const double share = double(count) / double(first + count), part = 1 / double(count);
        for (long c = from; c < to; c += W) {
            const long n = to - c;
            const T* p = x + first * channels + c;
            V s0{}, s1{}, s2{}, s3{}, q0{}, q1{}, q2{}, q3{};
            long r = 0;
            for (; r + 4 <= count; r += 4, p += 4 * channels) {
                s0 += load_n(p, n), s1 += load_n(p + channels, n);
                s2 += load_n(p + 2 * channels, n), s3 += load_n(p + 3 * channels, n);
            }
            for (; r < count; r++, p += channels) s0 += load_n(p, n);
            const V middle = ((s0 + s1) + (s2 + s3)) * all(1.0f / float(count));
            p = x + first * channels + c, r = 0;
            V e{};  // what rounding has left in the middle
            for (; r + 4 <= count; r += 4, p += 4 * channels) {
                V a = load_n(p, n) - middle, b = load_n(p + channels, n) - middle;
                V d = load_n(p + 2 * channels, n) - middle, f = load_n(p + 3 * channels, n) - middle;
                q0 += a * a, q1 += b * b, q2 += d * d, q3 += f * f;
                e += (a + b) + (d + f);
            }
            for (; r < count; r++, p += channels) {
                V a = load_n(p, n) - middle;
                q0 += a * a, e += a;
            }
            float kept[3][W];
            store(kept[0], middle), store(kept[1], e), store(kept[2], (q0 + q1) + (q2 + q3));
            double *m = mean + c - from, *s = spread + c - from;
            for (int i = 0; i < W; i++) {
                const double left = double(kept[1][i]) * part;
                const double gap = double(kept[0][i]) + left - m[i];
                s[i] += double(kept[2][i]) - left * double(kept[1][i]) + gap * gap * double(first) * share;
                m[i] += gap * share;
            }
        }
    }
}

// Mean and 1 / std of each group whose channels are [from, to).
static void group_moments(const Norm& n, long b, long from, long to, double* mean, const double* spread) {
    const long width = n.channels / n.groups;
    if (n.add)
        for (long c = from; c < to; c++) mean[c - from] += double(n.add[b * n.channels + c]);
    for (long g = from / width; g < to / width; g++) {
        const double *m = mean + g * width - from, *s = spread + g * width - from;
        double middle = 0, square = 0;
        for (long c = 0; c < width; c++) middle += m[c];
        middle /= double(width);
        for (long c = 0; c < width; c++) square += s[c] + double(n.pixels) * (m[c] - middle) * (m[c] - middle);
        n.mean[b * n.groups + g] = float(middle);
        n.rstd[b * n.groups + g] = float(1 / std::sqrt(square / double(width * n.pixels) + double(n.eps)));
    }
}

// What applies to each channel [from, to): four rows of numbers, each with a vector to spare.
static void channel_rows(const Norm& n, long b, long from, long to, float* middle, float* rstd, float* a, float* z) {
    const long width = n.channels / n.groups;
    for (long c = from; c < to; c++) {
        const long g = b * n.groups + c / width, at = b * n.channels + c, i = c - from;
        const float w = n.weight ? n.weight[c] : 1, bias = n.bias ? n.bias[c] : 0;
        const float more = n.scale ? 1 + n.scale[at] : 1;
        middle[i] = n.mean[g] - (n.add ? n.add[at] : 0);
        rstd[i] = n.rstd[g];
        a[i] = w * more;
        z[i] = bias * more + (n.shift ? n.shift[at] : 0);
    }
}

static inline size_t norm_scratch(long channels) { return 16 * (channels + W); }

template <class T, bool SILU>
static void norm_apply(const T* x, T* y, long pixels, long channels, long from, long to, const float* middle,
                       const float* rstd, const float* a, const float* z) {
    for (long r = 0; r < pixels; r++) {
        const T* p = x + r * channels;
        T* out = y + r * channels;
        for (long c = from; c < to; c += W) {
            const long i = c - from, n = to - c;
            V v = (load_n(p + c, n) - load(middle + i)) * load(rstd + i) * load(a + i) + load(z + i);
            store_n(out + c, SILU ? silu(v) : v, n);
        }
    }
}

template <class T> static void norm_forward(const Norm& n, const T* x, T* y, long b, long from, long to, float* scratch) {
    const long width = to - from + W;
    double *mean = reinterpret_cast<double*>(scratch), *spread = mean + width;
    float *middle = scratch + 4 * width, *rstd = middle + width, *a = rstd + width, *z = a + width;
    const T* from_x = x + b * n.pixels * n.channels;
    T* to_y = y + b * n.pixels * n.channels;
    moments(from_x, n.pixels, n.channels, from, to, mean, spread);
    group_moments(n, b, from, to, mean, spread);
    channel_rows(n, b, from, to, middle, rstd, a, z);
    if (n.silu) norm_apply<T, true>(from_x, to_y, n.pixels, n.channels, from, to, middle, rstd, a, z);
    else norm_apply<T, false>(from_x, to_y, n.pixels, n.channels, from, to, middle, rstd, a, z);
}

// The gradients; each of dweight, dbias, dscale, dshift, dadd is (B, C).
struct NormGradients {
    float *dweight, *dbias, *dscale, *dshift, *dadd;
};

// Sums over the pixels of dz, dz u and u, for channels [from, to); dz is left in dx.
template <class T, bool SILU>
static void norm_sums(const T* x, const T* dy, T* dx, long pixels, long channels, long from, long to,
                      const float* middle, const float* rstd, const float* a, const float* z, float* sum_dz,
                      float* sum_dzu, float* sum_u) {
    const long fit = 4096 / channels, rows = fit < 4 ? 4 : fit > 128 ? 128 : fit;  // 16 KiB, and few for many channels
    for (long c = 0; c < to - from + W; c++) sum_dz[c] = sum_dzu[c] = sum_u[c] = 0;
    for (long first = 0; first < pixels; first += rows) {
        const long last = pixels - first < rows ? pixels : first + rows;
        for (long c = from; c < to; c += W) {
            const long i = c - from, n = to - c;
            const V m = load(middle + i), s = load(rstd + i), av = load(a + i), zv = load(z + i);
            V g{}, gu{}, us{};
            for (long r = first; r < last; r++) {
                const long at = r * channels + c;
                V u = (load_n(x + at, n) - m) * s, d = load_n(dy + at, n);
                if (SILU) {
                    d *= dsilu(u * av + zv);
                    store_n(dx + at, d, n);
                }
                g += d, gu += d * u, us += u;
            }
            store(sum_dz + i, load(sum_dz + i) + g);
            store(sum_dzu + i, load(sum_dzu + i) + gu);
            store(sum_u + i, load(sum_u + i) + us);
        }
    }
}

template <class T>
static void norm_backward(const Norm& n, const NormGradients& out, const T* x, const T* dy, T* dx, long b, long from,
                          long to, float* scratch) {
    const long wide = to - from + W, width = n.channels / n.groups;
    float *middle = scratch, *rstd = middle + wide, *a = rstd + wide, *z = a + wide, *sum_dz = z + wide,
          *sum_dzu = sum_dz + wide, *sum_u = sum_dzu + wide, *mean_g = sum_u + wide, *mean_gu = mean_g + wide;
    const T *from_x = x + b * n.pixels * n.channels, *from_dy = dy + b * n.pixels * n.channels;
    T* to_dx = dx + b * n.pixels * n.channels;
    channel_rows(n, b, from, to, middle, rstd, a, z);
    if (n.silu)
        norm_sums<T, true>(from_x, from_dy, to_dx, n.pixels, n.channels, from, to, middle, rstd, a, z, sum_dz, sum_dzu,
                           sum_u);
    else
        norm_sums<T, false>(from_x, from_dy, to_dx, n.pixels, n.channels, from, to, middle, rstd, a, z, sum_dz,
                            sum_dzu, sum_u);
    for (long g = from; g < to; g += width) {
        double s1 = 0, s2 = 0;
        for (long c = g - from; c < g - from + width; c++)
            s1 += double(a[c]) * double(sum_dz[c]), s2 += double(a[c]) * double(sum_dzu[c]);
        for (long c = g - from; c < g - from + width; c++) {
            mean_g[c] = float(s1 / double(width * n.pixels));
            mean_gu[c] = float(s2 / double(width * n.pixels));
        }
    }
    for (long c = from; c < to; c++) {
        const long at = b * n.channels + c, i = c - from;
        const float w = n.weight ? n.weight[c] : 1, bias = n.bias ? n.bias[c] : 0;
        const float more = n.scale ? 1 + n.scale[at] : 1;
        if (out.dweight) out.dweight[at] = more * sum_dzu[i];
        if (out.dbias) out.dbias[at] = more * sum_dz[i];
        if (out.dscale) out.dscale[at] = w * sum_dzu[i] + bias * sum_dz[i];
        if (out.dshift) out.dshift[at] = sum_dz[i];
        if (out.dadd)
            out.dadd[at] = rstd[i] * (a[i] * sum_dz[i] - float(n.pixels) * mean_g[i] - mean_gu[i] * sum_u[i]);
    }
    const T* dz = n.silu ? to_dx : from_dy;
    for (long r = 0; r < n.pixels; r++)
        for (long c = from; c < to; c += W) {
            const long at = r * n.channels + c, i = c - from, left = to - c;
            const V s = load(rstd + i);
            V u = (load_n(from_x + at, left) - load(middle + i)) * s;
            V d = s * (load(a + i) * load_n(dz + at, left) - load(mean_g + i) - u * load(mean_gu + i));
            store_n(to_dx + at, d, left);
        }
}
