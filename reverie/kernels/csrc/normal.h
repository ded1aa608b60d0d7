// Standard normal numbers, bit for bit those of NumPy's Generator(Philox(key)).standard_normal in float32: Philox4x64-10
// (Salmon et al., 2011, https://doi.org/10.1145/2063384.2063405) and a ziggurat of 256 layers of one area (Marsaglia &
// Tsang, 2000, https://doi.org/10.18637/jss.v005.i08; Doornik, 2005, https://www.doornik.com/research/ziggurat.pdf).
#pragma once
#include "vector.h"

constexpr uint64_t PHILOX_TIMES[] = {0xD2E7470EE14C6C93u, 0xCA5A826395121157u};
constexpr uint64_t PHILOX_STEP[] = {0x9E3779B97F4A7C15u, 0xBB67AE8584CAA73Bu};
constexpr int PHILOX_ROUNDS = 10, PHILOX_BLOCKS = 8;  // blocks of four words of 64 bits that are made side by side

// The upper half of the products, and the lower half in their place.
static inline uint64_t multiply(uint64_t& x, uint64_t by) {
    const unsigned __int128 product = static_cast<unsigned __int128>(x) * by;
    x = uint64_t(product);
    return uint64_t(product >> 64);
}

#ifdef __AVX512DQ__
typedef uint64_t V8 __attribute__((vector_size(64)));
static inline V8 multiply(V8& x, uint64_t by) {
    auto product = [](V8 a, uint64_t b) { return (V8)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(b)); };
    const V8 high = x >> 32, cross = product(high, uint32_t(by)) + (product(x, uint32_t(by)) >> 32);
    const V8 other = product(x, by >> 32) + (cross & 0xffffffffu);
    x *= by;
    return product(high, by >> 32) + (cross >> 32) + (other >> 32);
}
#endif

// One round, on a counter's four words.
template <class T> static inline void philox_round(T (&c)[4], uint64_t low, uint64_t high) {
    const T a = multiply(c[0], PHILOX_TIMES[0]), b = multiply(c[2], PHILOX_TIMES[1]);
    const T first = b ^ c[1] ^ low, third = a ^ c[3] ^ high;
    c[3] = c[0], c[1] = c[2], c[0] = first, c[2] = third;
}

// The blocks of some counters that follow each other, in words of 32 bits, the lower half first.
static void philox(uint64_t low, uint64_t high, uint64_t counter, uint32_t* to) {
#ifdef __AVX512DQ__
    V8 c[4] = {counter + V8{0, 1, 2, 3, 4, 5, 6, 7}};
    for (int r = 0; r < PHILOX_ROUNDS; r++) philox_round(c, low + r * PHILOX_STEP[0], high + r * PHILOX_STEP[1]);
    uint64_t words[4 * PHILOX_BLOCKS];
    for (int j = 0; j < 4; j++)
        for (int i = 0; i < PHILOX_BLOCKS; i++) words[4 * i + j] = c[j][i];
    memcpy(to, words, sizeof words);
#else
    for (int i = 0; i < PHILOX_BLOCKS; i++) {
        uint64_t c[4] = {counter + i};
        for (int r = 0; r < PHILOX_ROUNDS; r++) philox_round(c, low + r * PHILOX_STEP[0], high + r * PHILOX_STEP[1]);
        memcpy(to + 8 * i, c, sizeof c);
    }
#endif
}

// The layers: the first is the one with the tail, then from the top down to the widest.
struct Ziggurat {
    static constexpr double END = 3.6541528853610088;  // where the tail begins
    float width[256];                                  // over 2^23
    uint32_t inside[256];                              // below which of 2^23 a number lies in the layer above as well
    float height[256];

    Ziggurat() {
        auto density = [](double x) { return std::exp(-x * x / 2); };
        const double area = END * density(END) + std::sqrt(std::acos(-1.0) / 2) * std::erfc(END / std::sqrt(2.0));
        double x[256];
        x[0] = area / density(END), x[255] = END;
        for (int i = 255; i > 1; i--) x[i - 1] = std::sqrt(-2 * std::log(area / x[i] + density(x[i])));
        for (int i = 0; i < 256; i++) {
            width[i] = float(x[i] / (1 << 23));
            inside[i] = i == 1 ? 0 : uint32_t(std::lround((i ? x[i - 1] : END) / x[i] * (1 << 23)));
            height[i] = i ? float(density(x[i])) : 1;
        }
    }
};

// A product as it is when rounded: the compiler may not join it with the sum that follows.
static inline float rounded(float x) {
    asm("" : "+x"(x));
    return x;
}

// A key's stream of words, and the number that each is where it lies inside its layer, which 99 of 100 do.
struct Normals {
    static constexpr int ROOM = 1024, STEP = 8 * PHILOX_BLOCKS;
    const Ziggurat& layers;
    uint64_t low, high, counter = 1;
    int at = 0, end = 0;
    alignas(64) uint32_t words[ROOM];
    float numbers[ROOM];
    uint8_t outside[ROOM];

    // The next words, as many as numbers are wanted, or more, or as there is room for.
    void fill(long wanted) {
        at = 0, end = wanted < ROOM ? int(wanted + STEP - 1) / STEP * STEP : ROOM;
        for (int i = 0; i < end; i += STEP, counter += PHILOX_BLOCKS) philox(low, high, counter, words + i);
        for (int i = 0; i < end; i++) {
            const uint32_t layer = words[i] & 255, place = words[i] >> 9;
            const float size = float(int32_t(place)) * layers.width[layer];
            numbers[i] = words[i] & 256 ? -size : size;
            outside[i] = place >= layers.inside[layer];
        }
    }
    uint32_t next() {
        if (at == end) fill(1);
        return words[at++];
    }
    float uniform() { return float(next() >> 8) * (1.0f / (1 << 24)); }  // in [0, 1)

    // Whether the number of a word that lies outside is to be had; it may become another.
    bool settled(uint32_t word, float& x) {
        const uint32_t layer = word & 255;
        if (layer) {
            const float part = rounded((layers.height[layer - 1] - layers.height[layer]) * uniform());
            return part + layers.height[layer] < std::exp(-0.5 * x * x);
        }
        for (;;) {
            const float beyond = rounded(float(-1 / Ziggurat::END) * std::log1p(-uniform()));
            const float y = -std::log1p(-uniform());
            if (y + y <= beyond * beyond) continue;
            x = float(Ziggurat::END) + beyond;
            if (word >> 17 & 1) x = -x;
            return true;
        }
    }

    void draw(long count, float* out) {
        for (long i = 0; i < count;) {
            if (at == end) fill(count - i);
            const long most = end - at < count - i ? end - at : count - i;
            const auto found = static_cast<const uint8_t*>(memchr(outside + at, 1, most));
            const long run = found ? found - (outside + at) : most;
            memcpy(out + i, numbers + at, run * sizeof *out);
            at += run, i += run;
            if (!found) continue;
            float x = numbers[at];
            if (settled(next(), x)) out[i++] = x;
        }
    }
};

static void normals(uint64_t low, uint64_t high, long count, float* out) {
    static const Ziggurat layers;
    Normals{layers, low, high}.draw(count, out);
}
