// Group norm of images in channels-last, with an optional addition before it, scale and shift after it, and SiLU:
//
//     u = (x + add_bc - mean_bg) rstd_bg,  z = (u w_c + b_c)(1 + scale_bc) + shift_bc,  y = z or silu(z)
//
// One walk over memory for the moments and one to apply them, each in blocks of rows that stay in the nearest cache.
// The moments are those of Chan, Golub & LeVeque (1979), block by block, which large means do not spoil.
#pragma once
#include <algorithm>
#include <type_traits>

#include "numbers.h"

struct Norm {
    int64_t samples, pixels, channels, groups;
    float eps;
    int32_t silu;
    const float *add, *weight, *bias, *scale, *shift;  // add (B, C), weight (C), bias (C), scale, shift (B, C); or null
    float *mean, *rstd;                                // (B, G)
};

// A sigmoid as exact as what it is for: within 3e-7 of itself for float32, within 1e-4 for bfloat16, which is a
// twentieth of what is lost as the product is rounded.
template <class T> static inline V sigmoid(V z) {
    const V x = z * all(-LOG2E);
#ifdef __AVX512F__
    if constexpr (sizeof(T) == 2) return (V)_mm512_rcp14_ps((__m512)(all(1.0f) + power_of_two(x, ROUGH_EXP2)));
    else return all(1.0f) / (all(1.0f) + power_of_two(x, EXP2));
#else
    return all(1.0f) / (all(1.0f) + exp2v(x));
#endif
}
template <class T> static inline V silu(V z) { return z * sigmoid<T>(z); }
template <class T> static inline V dsilu(V z) {
    const V s = sigmoid<T>(z);
    // z -> -inf: s = 0 and z s (1 - s) is zero; z = +-inf itself gives NaN, as the formula does
    return s + z * s * (all(1.0f) - s);
}

// Rows of numbers that are worked through together: 16 KiB in float32, which stay in the nearest cache.
static inline long block_rows(long channels, long least) {
    const long rows = 4096 / channels;
    return rows < least ? least : rows > 128 ? 128 : rows;
}

// Vectors of the channels [from, to), the last of which may hold fewer: work(channel, its place, numbers that it has).
template <class Work> static inline void over_vectors(long from, long to, const Work& work) {
    long c = from;
    for (; c + W <= to; c += W) work(c, c - from, std::integral_constant<long, W>());  // known when it is compiled
    if (c < to) work(c, c - from, to - c);
}

// What a block of rows adds to the mean and the sum of squared distances of W channels that have seen `first` rows:
// total and square are the sums of the differences from `middle` and of their squares.
static inline void take_in(double* mean, double* spread, V middle, V total, V square, long first, long count) {
    float kept[3][W];
    store(kept[0], middle), store(kept[1], total), store(kept[2], square);
    const double share = double(count) / double(first + count), part = 1 / double(count);
    for (int i = 0; i < W; i++) {
        const double left = double(kept[1][i]) * part;
        const double gap = double(kept[0][i]) + left - mean[i];
        spread[i] += double(kept[2][i]) - left * double(kept[1][i]) + gap * gap * double(first) * share;
        mean[i] += gap * share;
    }
}

// The sum over some rows of a vector's differences from middle, and of their squares.
template <class T, class N>
static inline void differences(const T* p, long count, long channels, N n, V middle, V& total, V& square) {
    V s0{}, s1{}, s2{}, s3{}, q0{}, q1{}, q2{}, q3{};
    long r = 0;
    for (; r + 4 <= count; r += 4, p += 4 * channels) {
        const V a = load_n(p, n) - middle, b = load_n(p + channels, n) - middle;
        const V d = load_n(p + 2 * channels, n) - middle, f = load_n(p + 3 * channels, n) - middle;
        s0 += a, s1 += b, s2 += d, s3 += f;
        q0 += a * a, q1 += b * b, q2 += d * d, q3 += f * f;
    }
    for (; r < count; r++, p += channels) {
        const V a = load_n(p, n) - middle;
        s0 += a, q0 += a * a;
    }
    total = (s0 + s1) + (s2 + s3), square = (q0 + q1) + (q2 + q3);
}

// Mean and sum of squared distances from it, of each channel [from, to) of one sample: into mean and spread (doubles).
// The first rows are read twice, for their mean and for the distances from it; each block after them once, as its
// distances from the mean so far. Where that is not the block's own, the sum of squares grows by no more than a few
// times what the gap between the two adds to the spread, and so the rounding is of the spread.
template <class T>
static void moments(const T* x, long pixels, long channels, long from, long to, double* mean, double* spread) {
    const long head = pixels < 16 ? pixels : 16, rows = block_rows(channels, 32);
    for (long c = 0; c < to - from + W; c++) mean[c] = spread[c] = 0;
    for (long first = 0, count = head; first < pixels; first += count, count = std::min(rows, pixels - first))
        over_vectors(from, to, [&](long c, long i, auto n) {
            const T* p = x + first * channels + c;
            V middle{}, total, square;
            if (first == 0) {
                differences(p, count, channels, n, V{}, total, square);
                middle = total * all(1.0f / float(count));
            } else {
                float so_far[W];
                for (int j = 0; j < W; j++) so_far[j] = float(mean[i + j]);
                middle = load(so_far);
            }
            differences(p, count, channels, n, middle, total, square);
            take_in(mean + i, spread + i, middle, total, square, first, count);
        });
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

// What applies to each channel [from, to): rows of numbers, each with a vector to spare.
struct ChannelRows {
    float *middle, *rstd, *a, *scaled, *z;  // z_bc = (x - middle) scaled + z, scaled = rstd a
    ChannelRows(float* space, long width)
        : middle(space), rstd(middle + width), a(rstd + width), scaled(a + width), z(scaled + width) {}
    float* end(long width) const { return z + width; }
    void fill(const Norm& n, long b, long from, long to) const {
        const long width = n.channels / n.groups;
        for (long c = from; c < to; c++) {
            const long g = b * n.groups + c / width, at = b * n.channels + c, i = c - from;
            const float w = n.weight ? n.weight[c] : 1, bias = n.bias ? n.bias[c] : 0;
            const float more = n.scale ? 1 + n.scale[at] : 1;
            middle[i] = n.mean[g] - (n.add ? n.add[at] : 0);
            rstd[i] = n.rstd[g];
            a[i] = w * more;
            scaled[i] = rstd[i] * a[i];
            z[i] = bias * more + (n.shift ? n.shift[at] : 0);
        }
    }
};

static inline size_t norm_scratch(long channels) { return 16 * (channels + W); }

template <class T, bool SILU>
static void norm_apply(const T* x, T* y, long pixels, long channels, long from, long to, const float* middle,
                       const float* a, const float* z) {
    const long rows = block_rows(channels, 4);
    for (long first = 0; first < pixels; first += rows) {
        const long last = std::min(pixels, first + rows);
        over_vectors(from, to, [&](long c, long i, auto n) {
            const V m = load(middle + i), av = load(a + i), zv = load(z + i);
            for (long r = first; r < last; r++) {
                const V v = (load_n(x + r * channels + c, n) - m) * av + zv;
                store_n(y + r * channels + c, SILU ? silu<T>(v) : v, n);
            }
        });
    }
}

template <class T> static void norm_forward(const Norm& n, const T* x, T* y, long b, long from, long to, float* scratch) {
    const long width = to - from + W;
    double *mean = reinterpret_cast<double*>(scratch), *spread = mean + width;
    const ChannelRows rows(scratch + 4 * width, width);
    const T* from_x = x + b * n.pixels * n.channels;
    T* to_y = y + b * n.pixels * n.channels;
    moments(from_x, n.pixels, n.channels, from, to, mean, spread);
    group_moments(n, b, from, to, mean, spread);
    rows.fill(n, b, from, to);
    const auto apply = n.silu ? norm_apply<T, true> : norm_apply<T, false>;
    apply(from_x, to_y, n.pixels, n.channels, from, to, rows.middle, rows.scaled, rows.z);
}

// The gradients; each of dweight, dbias, dscale, dshift, dadd is (B, C).
struct NormGradients {
    float *dweight, *dbias, *dscale, *dshift, *dadd;
};

// Sums over the pixels of one sample, for each channel: of dz, dz u, and u where dadd is wanted.
struct NormSums {
    float *dz, *dzu, *u;
};

// Those sums for channels [from, to); dz is left in dx.
template <class T, bool SILU, bool ADD>
static void norm_sums(const T* x, const T* dy, T* dx, long pixels, long channels, long from, long to,
                      const ChannelRows& of, const NormSums& sums) {
    const long rows = block_rows(channels, 4);
    for (long c = 0; c < to - from + W; c++) sums.dz[c] = sums.dzu[c] = sums.u[c] = 0;
    for (long first = 0; first < pixels; first += rows) {
        const long last = std::min(pixels, first + rows);
        over_vectors(from, to, [&](long c, long i, auto n) {
            const V m = load(of.middle + i), av = load(of.scaled + i), zv = load(of.z + i), s = load(of.rstd + i);
            V g{}, gu{}, us{};
            for (long r = first; r < last; r++) {
                const long at = r * channels + c;
                const V gap = load_n(x + at, n) - m;
                V d = load_n(dy + at, n);
                if (SILU) {
                    d *= dsilu<T>(gap * av + zv);
                    store_n(dx + at, d, n);
                }
                g += d, gu += d * (gap * s);
                if (ADD) us += gap;
            }
            store(sums.dz + i, load(sums.dz + i) + g);
            store(sums.dzu + i, load(sums.dzu + i) + gu);
            if (ADD) store(sums.u + i, load(sums.u + i) + us * s);
        });
    }
}

// dx = rstd (a dz - mean(a dz) - u mean(a dz u)), the means over a group.
template <class T>
static void norm_dx(const T* x, const T* dz, T* dx, long pixels, long channels, long from, long to,
                    const ChannelRows& of, const float* mean_g, const float* mean_gu) {
    const long rows = block_rows(channels, 4);
    for (long first = 0; first < pixels; first += rows) {
        const long last = std::min(pixels, first + rows);
        over_vectors(from, to, [&](long c, long i, auto n) {
            const V m = load(of.middle + i), s = load(of.rstd + i), av = load(of.scaled + i);
            const V level = s * load(mean_g + i), slope = s * load(mean_gu + i);
            for (long r = first; r < last; r++) {
                const long at = r * channels + c;
                const V u = (load_n(x + at, n) - m) * s;
                store_n(dx + at, av * load_n(dz + at, n) - level - u * slope, n);
            }
        });
    }
}

template <class T>
static void norm_backward(const Norm& n, const NormGradients& out, const T* x, const T* dy, T* dx, long b, long from,
                          long to, float* scratch) {
    const long wide = to - from + W, width = n.channels / n.groups, start = b * n.pixels * n.channels;
    const ChannelRows rows(scratch, wide);
    float* space = rows.end(wide);
    const NormSums sums{space, space + wide, space + 2 * wide};
    float *mean_g = space + 3 * wide, *mean_gu = mean_g + wide;
    rows.fill(n, b, from, to);
    const auto add = n.silu ? (out.dadd ? norm_sums<T, true, true> : norm_sums<T, true, false>)
                            : (out.dadd ? norm_sums<T, false, true> : norm_sums<T, false, false>);
    add(x + start, dy + start, dx + start, n.pixels, n.channels, from, to, rows, sums);
    for (long g = from; g < to; g += width) {
        double s1 = 0, s2 = 0;
        for (long c = g - from; c < g - from + width; c++)
            s1 += double(rows.a[c]) * double(sums.dz[c]), s2 += double(rows.a[c]) * double(sums.dzu[c]);
        for (long c = g - from; c < g - from + width; c++) {
            mean_g[c] = float(s1 / double(width * n.pixels));
            mean_gu[c] = float(s2 / double(width * n.pixels));
        }
    }
    for (long c = from; c < to; c++) {
        const long at = b * n.channels + c, i = c - from;
        const float w = n.weight ? n.weight[c] : 1, bias = n.bias ? n.bias[c] : 0;
        const float more = n.scale ? 1 + n.scale[at] : 1;
        if (out.dweight) out.dweight[at] = more * sums.dzu[i];
        if (out.dbias) out.dbias[at] = more * sums.dz[i];
        if (out.dscale) out.dscale[at] = w * sums.dzu[i] + bias * sums.dz[i];
        if (out.dshift) out.dshift[at] = sums.dz[i];
        if (out.dadd)
            out.dadd[at] = rows.rstd[i] *
                           (rows.a[i] * sums.dz[i] - float(n.pixels) * mean_g[i] - mean_gu[i] * sums.u[i]);
    }
    norm_dx(x + start, (n.silu ? dx : dy) + start, dx + start, n.pixels, n.channels, from, to, rows, mean_g, mean_gu);
}
