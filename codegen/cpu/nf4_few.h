// Products of an NF4 weight with few tokens: it is decoded into the first-level cache as it is multiplied.

#pragma once

#include "nf4_weight.h"

namespace {

constexpr int ROWS = 4;     // of the weight that a product takes together
constexpr int TOKENS = LANES == 16 ? 4 : 2;
constexpr int SPAN = 1024;  // columns that are decoded at a time: ROWS of them stay in the first-level cache
constexpr int TILE = 512;   // columns of an input gradient that come together
constexpr int VECTORS = 4;  // of a tile that it takes together

constexpr int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// How numbers are multiplied: as float32, or on processors that have it as pairs of bfloat16, added in float32.
struct Floats {
    typedef float Number;
    typedef Vector Operand;
    static constexpr int32_t DTYPE = FLOAT32;
    static constexpr int WIDTH = LANES;  // numbers of an operand
    static constexpr int BLOCK = 1;      // rows of the weight that an input gradient takes together,
    static constexpr int DEPTH = 16;     // and that it decodes at a time,
    static constexpr int TILE = 512;     // of so many columns
    struct Session {};

    static Operand get(const Number* p) { return load(p); }
    static Operand spread(const Number* p) { return Vector{} + *p; }
    static Vector add(Vector sum, Operand a, Operand b) { return fma(a, b, sum); }

    // Where row r of a tile is decoded, and what is done to it then over n columns.
    static Number* row(Number* part, Number*, int64_t r) { return part + r * TILE; }
    static void decoded(Number*, const Number*, int64_t, int64_t) {}
};

#if defined(CPU_AVX512) && defined(__AVX512BF16__)
#define NF4_PAIRS
struct Pairs {
    typedef uint16_t Number;
    typedef __m512bh Operand;
    static constexpr int32_t DTYPE = BFLOAT16;
    static constexpr int WIDTH = 32;
    static constexpr int BLOCK = 2;
    static constexpr int DEPTH = 16;
    static constexpr int TILE = 512;
    struct Session {};

    static Operand get(const Number* p) { return (Operand)_mm512_loadu_si512(p); }
    static Operand spread(const Number* p) {
        int32_t both;
        std::memcpy(&both, p, 4);
        return (Operand)_mm512_set1_epi32(both);
    }
    static Vector add(Vector sum, Operand a, Operand b) { return _mm512_dpbf16_ps(sum, a, b); }

    // Two rows make pairs of their numbers, column by column.
    static Number* row(Number*, Number* two, int64_t r) { return two + r % 2 * TILE; }
    static void decoded(Number* part, const Number* two, int64_t r, int64_t n) {
        if (r % 2) interleave(two, two + TILE, part + (r - 1) * TILE, n);
    }
    static void interleave(const Number* first, const Number* second, Number* to, int64_t n) {
        const __m512i order = _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0);  // so that halves of lanes are in order
        for (int64_t k = 0; k < n; k += 32) {
            __m512i a = _mm512_permutexvar_epi64(order, _mm512_load_si512(first + k));
            __m512i b = _mm512_permutexvar_epi64(order, _mm512_load_si512(second + k));
            _mm512_store_si512(to + 2 * k, _mm512_unpacklo_epi16(a, b));
            _mm512_store_si512(to + 2 * k + 32, _mm512_unpackhi_epi16(a, b));
        }
    }
};
#endif

// y[t][r] += x[t] . w[r] over n columns, n a multiple of the operand's.
template <class Kind, int T>
void dots(const typename Kind::Number* w, const typename Kind::Number* x, int64_t x_stride, int64_t n, float* y,
          int64_t y_stride, int rows) {
    Vector a[T][ROWS] = {};
    for (int64_t k = 0; k < n; k += Kind::WIDTH) {
        typename Kind::Operand part[ROWS];
        for (int r = 0; r < ROWS; ++r) part[r] = Kind::get(w + r * SPAN + k);
        for (int t = 0; t < T; ++t) {
            const auto xt = Kind::get(x + t * x_stride + k);
            for (int r = 0; r < ROWS; ++r) a[t][r] = Kind::add(a[t][r], xt, part[r]);
        }
    }
    for (int t = 0; t < T; ++t)
        for (int r = 0; r < rows; ++r) y[t * y_stride + r] += sum(a[t][r]);
}

template <class Kind, int T>
void all_dots(const typename Kind::Number* w, const typename Kind::Number* x, int64_t x_stride, int64_t n, float* y,
              int64_t y_stride, int rows, int64_t tokens) {
    for (; tokens >= T; tokens -= T, x += T * x_stride, y += T * y_stride)
        dots<Kind, T>(w, x, x_stride, n, y, y_stride, rows);
    if constexpr (T > 1) all_dots<Kind, T / 2>(w, x, x_stride, n, y, y_stride, rows, tokens);
}

template <class Kind>
void product_rows(const Weight& w, int64_t first, const typename Kind::Number* x, int64_t tokens, float* y, Kind) {
    alignas(64) typename Kind::Number part[ROWS * SPAN];
    const Sixteen code = code_of(w);
    const int rows = int(std::min<int64_t>(ROWS, w.rows - first));
    const int64_t x_stride = up(w.columns, 32);
    for (int64_t t = 0; t < tokens; ++t)
        for (int r = 0; r < rows; ++r) y[t * w.rows + first + r] = 0;
    for (int64_t start = 0; start < w.columns; start += SPAN) {
        const int64_t stop = std::min(w.columns, start + SPAN), n = up(stop - start, Kind::WIDTH);
        for (int r = 0; r < ROWS; ++r) {
            const int64_t at = (first + r) * w.columns, done = r < rows ? stop - start : 0;
            if (done) decode(w, code, at + start, at + stop, part + r * SPAN, Kind::DTYPE);
            std::fill(part + r * SPAN + done, part + r * SPAN + n, typename Kind::Number(0));
        }
        all_dots<Kind, TOKENS>(part, x + start, x_stride, n, y + first, w.rows, rows, tokens);
    }
}

// g[t][:] += sum over r < rows of dy[t][r] w[r][:], for VECTORS vectors of sums.
template <class Kind, int T>
void outer(const typename Kind::Number* w, const typename Kind::Number* dy, int64_t dy_stride, int64_t rows, float* g,
           int64_t g_stride) {
    Vector a[T][VECTORS];
    for (int t = 0; t < T; ++t)
        for (int v = 0; v < VECTORS; ++v) a[t][v] = load(g + t * g_stride + v * LANES);
    for (int64_t r = 0; r < rows; r += Kind::BLOCK) {
        typename Kind::Operand part[VECTORS];
        for (int v = 0; v < VECTORS; ++v) part[v] = Kind::get(w + r * Kind::TILE + v * Kind::WIDTH);
        for (int t = 0; t < T; ++t) {
            const auto s = Kind::spread(dy + t * dy_stride + r);
            for (int v = 0; v < VECTORS; ++v) a[t][v] = Kind::add(a[t][v], s, part[v]);
        }
    }
    for (int t = 0; t < T; ++t)
        for (int v = 0; v < VECTORS; ++v) store(g + t * g_stride + v * LANES, a[t][v]);
}

template <class Kind, int T>
void some_outer(const typename Kind::Number* w, const typename Kind::Number* dy, int64_t dy_stride, int64_t rows,
                float* g, int64_t g_stride, int64_t n, int64_t tokens) {
    for (; tokens >= T; tokens -= T, dy += T * dy_stride, g += T * g_stride)
        for (int64_t k = 0; k < n; k += VECTORS * LANES)
            outer<Kind, T>(w + k * Kind::BLOCK, dy, dy_stride, rows, g + k, g_stride);
    if constexpr (T > 1) some_outer<Kind, T / 2>(w, dy, dy_stride, rows, g, g_stride, n, tokens);
}

template <class Kind>
void all_outer(const typename Kind::Number* w, const typename Kind::Number* dy, int64_t dy_stride, int64_t rows,
               float* g, int64_t g_stride, int64_t n, int64_t tokens, Kind) {
    some_outer<Kind, TOKENS>(w, dy, dy_stride, rows, g, g_stride, n, tokens);
}

}  // namespace
