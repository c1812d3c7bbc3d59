// NF4 weights on a CPU: decoding, and products with few tokens that never form the weight.
//
// A plain C interface without PyTorch's headers, so that it builds in about two seconds; `nf4.py` calls it to decode,
// `nf4_linear.h` to multiply.
// Compile with -ffp-contract=off: a doubly quantised scale is a product and a sum, rounded one after the other.
// Threads take their work in small parts, so that they end together on a machine that has other things to do; which
// thread computes a number does not change it.

#include "nf4_tiles.h"

namespace {

// g (tokens, Kind::TILE) = dy[:, rows first .. last] W[rows, columns start .. stop], the rest of it zero.
template <class Kind>
void gradient_tile(const Weight& w, int64_t first, int64_t last, int64_t start, int64_t stop,
                   const typename Kind::Number* dy, int64_t tokens, float* g, int64_t g_stride) {
    typedef typename Kind::Number Number;
    alignas(64) Number part[Kind::DEPTH * Kind::TILE], two[2 * Kind::TILE];
    const Sixteen code = code_of(w);
    const int64_t n = up(stop - start, VECTORS * LANES), dy_stride = up(w.rows, 32);
    for (int64_t t = 0; t < tokens; ++t) std::fill(g + t * g_stride, g + t * g_stride + n, 0.0f);
    for (; first < last; first += Kind::DEPTH) {
        const int64_t rows = std::min<int64_t>(Kind::DEPTH, last - first), whole = up(rows, Kind::BLOCK);
        for (int64_t r = 0; r < whole; ++r) {
            const int64_t at = (first + r) * w.columns, done = r < rows ? stop - start : 0;
            Number* to = Kind::row(part, two, r);
            if (done) decode(w, code, at + start, at + stop, to, Kind::DTYPE);
            std::fill(to + done, to + n, Number(0));
            Kind::decoded(part, two, r, n);
        }
        all_outer(part, dy + first, dy_stride, whole, g, g_stride, n, tokens, Kind());
    }
}

template <class Kind>
void product(const Weight& w, const void* x, int64_t tokens, float* y, int64_t height, int threads) {
#pragma omp parallel num_threads(threads)
    {
        [[maybe_unused]] typename Kind::Session session;
#pragma omp for schedule(dynamic) nowait
        for (int64_t first = 0; first < w.rows; first += height)
            product_rows(w, first, static_cast<const typename Kind::Number*>(x), tokens, y, Kind());
    }
}

template <class Kind>
void gradient_parts(const Weight& w, const void* dy, int64_t tokens, int64_t depth, float* parts, int threads) {
    const int64_t stride = up(w.columns, TILE), tiles = stride / Kind::TILE, count = up(w.rows, depth) / depth;
#pragma omp parallel num_threads(threads)
    {
        [[maybe_unused]] typename Kind::Session session;
#pragma omp for schedule(dynamic) nowait
        for (int64_t i = 0; i < tiles * count; ++i) {
            const int64_t part = i / tiles, start = i % tiles * Kind::TILE;
            if (start >= w.columns) continue;
            gradient_tile<Kind>(w, part * depth, std::min(w.rows, (part + 1) * depth), start,
                                std::min(w.columns, start + Kind::TILE), static_cast<const typename Kind::Number*>(dy),
                                tokens, parts + part * tokens * stride + start, stride);
        }
    }
}

template <class T>
void decode_tile(const Weight& w, int64_t row, int64_t rows, int64_t column, int64_t columns, T* out, int32_t dtype,
                 int threads) {
    const Sixteen code = code_of(w);
    if (columns == w.columns) {  // one run of elements, cut anywhere between blocks
        const int64_t begin = row * columns, end = begin + rows * columns;
        const int64_t step = (int64_t(1) << 15) / w.blocksize * w.blocksize;
        const int64_t from = begin / step, to = (end + step - 1) / step;
#pragma omp parallel for schedule(static) num_threads(threads)
        for (int64_t i = from; i < to; ++i) {
            const int64_t a = std::max(begin, i * step), b = std::min(end, (i + 1) * step);
            decode<T>(w, code, a, b, out + (a - begin), dtype);
        }
        return;
    }
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t r = 0; r < rows; ++r) {
        const int64_t at = (row + r) * w.columns + column;
        decode<T>(w, code, at, at + columns, out + r * columns, dtype);
    }
}

}  // namespace

extern "C" {

// out (rows, columns) = the weight there, in `dtype`; threads >= 1.
void nf4_decode(const Weight* w, int64_t row, int64_t rows, int64_t column, int64_t columns, void* out, int32_t dtype,
                int32_t threads) {
    if (dtype == FLOAT32)
        decode_tile(*w, row, rows, column, columns, static_cast<float*>(out), dtype, threads);
    else
        decode_tile(*w, row, rows, column, columns, static_cast<uint16_t*>(out), dtype, threads);
}

// How products of a dtype with few tokens are given x and dy.
int32_t nf4_layout([[maybe_unused]] int32_t dtype, [[maybe_unused]] int64_t tokens) {
#if defined(NF4_TILES)
    if (dtype == BFLOAT16 && tokens >= Tiles::LEAST) return GROUPED;
#endif
#if defined(NF4_PAIRS)
    if (dtype == BFLOAT16) return AS_IT_IS;
#endif
    return AS_FLOAT32;
}

// y (tokens, w.rows) = x W'; x (tokens, w.columns), both padded with zeros, the columns to 32.  Each element is summed
// by one thread, in an order that its shape fixes.
void nf4_product(const Weight* w, const void* x, int64_t tokens, float* y, int32_t threads) {
    const int32_t layout = nf4_layout(w->product, tokens);
#if defined(NF4_TILES)
    if (layout == GROUPED) return product<Tiles>(*w, x, tokens, y, Tiles::HEIGHT, threads);
#endif
#if defined(NF4_PAIRS)
    if (layout == AS_IT_IS) return product<Pairs>(*w, x, tokens, y, ROWS, threads);
#endif
    if (layout == AS_FLOAT32) product<Floats>(*w, x, tokens, y, ROWS, threads);
}

// Columns of a row of `parts`, below.
int64_t nf4_gradient_stride(int64_t columns) { return up(columns, TILE); }

// dx (tokens, w.columns) = dy W; dy (held, w.rows padded to 32 with zeros), where `held` are the tokens, padded.
// `parts` (ceil(w.rows / depth), held, stride) takes a sum for each `depth` rows of the weight, a multiple of 32; they
// are added in their order: the same for any number of threads.
void nf4_input_gradient(const Weight* w, const void* dy, int64_t tokens, int64_t held, int64_t depth, float* parts,
                        float* dx, int32_t threads) {
    [[maybe_unused]] const int32_t layout = nf4_layout(w->product, tokens);
    auto sums = gradient_parts<Floats>;
#if defined(NF4_TILES)
    if (layout == GROUPED) sums = gradient_parts<Tiles>;
#endif
#if defined(NF4_PAIRS)
    if (layout == AS_IT_IS) sums = gradient_parts<Pairs>;
#endif
    sums(*w, dy, held, depth, parts, threads);
    const int64_t stride = up(w->columns, TILE), tiles = stride / TILE, count = up(w->rows, depth) / depth;
#pragma omp parallel for schedule(static) num_threads(threads) if (tokens * stride * count > 1 << 18)
    for (int64_t i = 0; i < tokens * tiles; ++i) {
        const int64_t token = i / tiles, start = i % tiles * TILE, stop = std::min(w->columns, start + TILE);
        for (int64_t k = start; k < stop; ++k) {
            float total = 0;
            for (int64_t part = 0; part < count; ++part) total += parts[(part * held + token) * stride + k];
            dx[token * w->columns + k] = total;
        }
    }
}

// All of them, for operators of PyTorch.
const Nf4Kernels* nf4_kernels() {
    static const Nf4Kernels kernels = {nf4_decode, nf4_layout, nf4_product, nf4_gradient_stride, nf4_input_gradient};
    return &kernels;
}

}  // extern "C"
