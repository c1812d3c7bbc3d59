// NF4 weights on a CPU: decoding, and products with few tokens that never form the weight.
//
// A plain C interface without PyTorch's headers, so that it builds in about two seconds; `nf4.py` calls it.
// What decodes is bit for bit `codegen/nf4.py`: code x scale in float32, rounded to nearest even.  Since the sixteen
// values of a block are all that can come out of it, a block is rounded as one table of sixteen, which its codes then
// index: by `vpermps` / `vpermw` on AVX-512, `vpermps` / `pshufb` on AVX2, one by one elsewhere.
// Compile with -ffp-contract=off: a doubly quantised scale is a product and a sum, rounded one after the other.

#include <algorithm>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define NF4_AVX512
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define NF4_AVX2
#endif
#if defined(NF4_AVX512) || defined(NF4_AVX2)
#include <immintrin.h>
#endif

namespace {

// --- vectors -----------------------------------------------------------------------------------------------------

#if defined(NF4_AVX512)
constexpr int LANES = 16;
#elif defined(NF4_AVX2)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));
typedef float Loose __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

inline Vector load(const float* p) { return *reinterpret_cast<const Loose*>(p); }
inline void store(float* p, Vector v) { *reinterpret_cast<Loose*>(p) = v; }
inline Vector all(float x) { return Vector{} + x; }

inline Vector fma(Vector a, Vector b, Vector c) {
#if defined(NF4_AVX512)
    return _mm512_fmadd_ps(a, b, c);
#elif defined(NF4_AVX2)
    return _mm256_fmadd_ps(a, b, c);
#else
    return a * b + c;
#endif
}

inline float sum(Vector v) {
#if defined(NF4_AVX512)
    return _mm512_reduce_add_ps(v);
#else
    float total = 0;
    for (int i = 0; i < LANES; i += 4) total += (v[i] + v[i + 1]) + (v[i + 2] + v[i + 3]);
    return total;
#endif
}

// --- rounding ----------------------------------------------------------------------------------------------------

enum Dtype : int32_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

template <class To, class From>
inline To bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "");
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

// The upper half of the float32 is the bfloat16; a nan keeps its sign and becomes quiet.
inline Vector bfloat16_of(Vector v) {
    Bits u = (Bits)v, number = (Bits)(v == v);
    Bits nearest = u + 0x7fff + ((u >> 16) & 1);
    return (Vector)(((nearest & number) | ((u | 0x400000) & ~number)) & 0xffff0000u);
}

#if defined(NF4_AVX512)
typedef __m256i Halves;  // as many float16 as a vector has floats
inline Halves float16_of(Vector v) { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Vector float32_of(Halves h) { return _mm512_cvtph_ps(h); }
#elif defined(NF4_AVX2)
typedef __m128i Halves;
inline Halves float16_of(Vector v) { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Vector float32_of(Halves h) { return _mm256_cvtph_ps(h); }
#else
struct Halves {
    uint16_t at[LANES];
};

inline uint16_t float16_of(float x) {
    uint32_t u = bits<uint32_t>(x), sign = (u >> 16) & 0x8000;
    u &= 0x7fffffff;
    if (u > 0x7f800000) return uint16_t(sign | 0x7e00 | ((u >> 13) & 0x3ff));
    if (u >= 0x477ff000) return uint16_t(sign | 0x7c00);  // rounds to 65536, or is infinite
    if (u < 0x38800000)  // subnormal: what is left of it are the last bits of this sum, rounded to nearest even
        return uint16_t(sign | (bits<uint32_t>(bits<float>(u) + 0.5f) - 0x3f000000));
    return uint16_t(sign | ((u + 0xfff + ((u >> 13) & 1) - 0x38000000) >> 13));
}

inline float float32_of(uint16_t h) {
    uint32_t sign = uint32_t(h & 0x8000) << 16, u = h & 0x7fff;
    if (u >= 0x7c00) return bits<float>(sign | 0x7f800000 | ((u & 0x3ff) << 13));
    if (u >= 0x400) return bits<float>(sign | ((u << 13) + 0x38000000));
    return bits<float>(sign | bits<uint32_t>(bits<float>(u + 0x3f000000) - 0.5f));
}

inline Halves float16_of(Vector v) {
    Halves h;
    for (int i = 0; i < LANES; ++i) h.at[i] = float16_of(v[i]);
    return h;
}

inline Vector float32_of(Halves h) {
    Vector v;
    for (int i = 0; i < LANES; ++i) v[i] = float32_of(h.at[i]);
    return v;
}
#endif

inline Vector rounded(Vector v, int32_t dtype) {
    if (dtype == BFLOAT16) return bfloat16_of(v);
    if (dtype == FLOAT16) return float32_of(float16_of(v));
    return v;
}

// --- sixteen values, looked up by code ---------------------------------------------------------------------------

constexpr int PARTS = 16 / LANES;

struct Sixteen {
    Vector part[PARTS];
};

template <class T>
struct Table;  // `run` turns the bytes of n codes into n values; an odd n ends with the upper half of a byte

template <>
struct Table<float> {
    Sixteen values;

    Table(const Sixteen& v, int32_t) : values(v) {}

    void run(const uint8_t* codes, int64_t n, float* out) const {
        int64_t i = 0;
#if defined(NF4_AVX512)
        // A byte in each 64-bit lane, moved so that each 32-bit half ends in one of its codes; vpermps reads 4 bits.
        for (; i + 16 <= n; i += 16) {
            __m512i byte = _mm512_cvtepu8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + i / 2)));
            __m512i index = _mm512_or_si512(_mm512_srli_epi64(byte, 4), _mm512_slli_epi64(byte, 32));
            _mm512_storeu_ps(out + i, _mm512_permutexvar_ps(index, values.part[0]));
        }
#elif defined(NF4_AVX2)
        for (; i + 8 <= n; i += 8) {
            int32_t four;
            std::memcpy(&four, codes + i / 2, 4);
            __m256i byte = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(four));
            __m256i index = _mm256_or_si256(_mm256_srli_epi64(byte, 4), _mm256_slli_epi64(byte, 32));
            __m256 low = _mm256_permutevar8x32_ps(values.part[0], index);
            __m256 high = _mm256_permutevar8x32_ps(values.part[1], index);
            __m256 fourth = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));  // the code's upper bit, as the sign
            _mm256_storeu_ps(out + i, _mm256_blendv_ps(low, high, fourth));
        }
#endif
        if (i == n) return;
        float value[16];
        std::memcpy(value, &values, sizeof value);
        for (; i < n; ++i) out[i] = value[i % 2 ? codes[i / 2] & 15 : codes[i / 2] >> 4];
    }
};

template <>
struct Table<uint16_t> {
    alignas(32) uint16_t values[16];

    Table(const Sixteen& v, int32_t dtype) {
        for (int i = 0; i < PARTS; ++i) {
            Halves halves;
            if (dtype == FLOAT16) {
                halves = float16_of(v.part[i]);
            } else {
                Bits upper = (Bits)bfloat16_of(v.part[i]) >> 16;
#if defined(NF4_AVX512)
                halves = _mm512_cvtepi32_epi16((__m512i)upper);
#elif defined(NF4_AVX2)
                __m256i both = _mm256_packus_epi32((__m256i)upper, (__m256i)upper);
                halves = _mm256_castsi256_si128(_mm256_permute4x64_epi64(both, 0x08));
#else
                for (int k = 0; k < LANES; ++k) halves.at[k] = uint16_t(upper[k]);
#endif
            }
            std::memcpy(values + i * LANES, &halves, sizeof halves);
        }
    }

    void run(const uint8_t* codes, int64_t n, uint16_t* out) const {
        int64_t i = 0;
#if defined(NF4_AVX512)
        // vpermw reads 5 bits of an index; the table stands there twice, so that the fifth, a neighbour's, is idle.
        __m512i table = _mm512_broadcast_i64x4(_mm256_load_si256(reinterpret_cast<const __m256i*>(values)));
        for (; i + 32 <= n; i += 32) {
            __m512i byte = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i / 2)));
            __m512i index = _mm512_or_si512(_mm512_srli_epi32(byte, 4), _mm512_slli_epi32(byte, 16));
            _mm512_storeu_si512(out + i, _mm512_permutexvar_epi16(index, table));
        }
#elif defined(NF4_AVX2)
        // pshufb looks up bytes: the lower and the upper ones of the values, then side by side.
        const __m256i words = _mm256_load_si256(reinterpret_cast<const __m256i*>(values));
        const __m256i lower = bytes(_mm256_and_si256(words, _mm256_set1_epi16(255)));
        const __m256i upper = bytes(_mm256_srli_epi16(words, 8));
        const __m128i four = _mm_set1_epi8(15);
        for (; i + 32 <= n; i += 32) {
            __m128i byte = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i / 2));
            __m128i first = _mm_and_si128(_mm_srli_epi16(byte, 4), four), second = _mm_and_si128(byte, four);
            __m256i index = _mm256_set_m128i(_mm_unpackhi_epi8(first, second), _mm_unpacklo_epi8(first, second));
            __m256i low = _mm256_shuffle_epi8(lower, index), high = _mm256_shuffle_epi8(upper, index);
            __m256i even = _mm256_unpacklo_epi8(low, high), odd = _mm256_unpackhi_epi8(low, high);
            __m256i* to = reinterpret_cast<__m256i*>(out + i);
            _mm256_storeu_si256(to, _mm256_permute2x128_si256(even, odd, 0x20));
            _mm256_storeu_si256(to + 1, _mm256_permute2x128_si256(even, odd, 0x31));
        }
#endif
        for (; i < n; ++i) out[i] = values[i % 2 ? codes[i / 2] & 15 : codes[i / 2] >> 4];
    }

#if defined(NF4_AVX2)
    // Sixteen words below 256 as bytes, in both halves.
    static __m256i bytes(__m256i words) {
        return _mm256_permute4x64_epi64(_mm256_packus_epi16(words, words), 0x88);
    }
#endif
};

}  // namespace

// --- a stored weight ---------------------------------------------------------------------------------------------

struct Weight {  // as `nf4.py` declares it
    const float* code;            // [16]
    const uint8_t* codes;         // [ceil(rows * columns / 2)]
    const float* absmax;          // [ceil(rows * columns / blocksize)], or null where it is doubly quantised:
    const uint8_t* absmax_codes;  // the same number of codes,
    const float* nested_absmax;   // one for 256 of them,
    const float* nested_code;     // [256]
    const float* offset;          // [1]
    int64_t rows, columns, blocksize;
    int32_t dtype;    // that the weight has
    int32_t product;  // that it is multiplied in
};

namespace {

inline float scale_of(const Weight& w, int64_t block) {
    if (w.absmax) return w.absmax[block];
    float product = w.nested_code[w.absmax_codes[block]] * w.nested_absmax[block / 256];
    return product + *w.offset;
}

inline Sixteen code_of(const Weight& w) {
    Sixteen code;
    for (int i = 0; i < PARTS; ++i) code.part[i] = load(w.code + i * LANES);
    return code;
}

// Elements begin .. end of the flat weight, as they are multiplied (float) or stored (halves of `dtype`).
template <class T>
void decode(const Weight& w, const Sixteen& code, int64_t begin, int64_t end, T* out, int32_t dtype) {
    for (int64_t block = begin / w.blocksize; begin < end; ++block) {
        int64_t stop = std::min(end, (block + 1) * w.blocksize);
        const float scale = scale_of(w, block);
        Sixteen values;
        for (int i = 0; i < PARTS; ++i) {
            values.part[i] = rounded(code.part[i] * scale, w.dtype);
            if (dtype == FLOAT32) values.part[i] = rounded(values.part[i], w.product);
        }
        Table<T> table(values, dtype);
        if (begin % 2) {  // the lower half of a byte
            const uint8_t code = uint8_t(w.codes[begin++ / 2] << 4);
            table.run(&code, 1, out++);
        }
        table.run(w.codes + begin / 2, stop - begin, out);
        out += stop - begin;
        begin = stop;
    }
}

// --- products with few tokens ------------------------------------------------------------------------------------

constexpr int ROWS = 4;       // of the weight that a product takes together
constexpr int TOKENS = LANES == 16 ? 4 : 2;
constexpr int SPAN = 1024;    // columns that are decoded at a time: ROWS of them stay in the first-level cache
constexpr int DEPTH = 16;     // rows that an input gradient decodes at a time,
constexpr int TILE = 512;     // of so many columns
constexpr int VECTORS = 4;    // of a tile that it takes together

constexpr int64_t padded(int64_t n) { return (n + 15) / 16 * 16; }

// y[t][r] += x[t] . w[r] over n columns, n a multiple of the lanes.
template <int T>
void dots(const float* w, const float* x, int64_t x_stride, int64_t n, float* y, int64_t y_stride, int rows) {
    Vector a[T][ROWS] = {};
    for (int64_t k = 0; k < n; k += LANES) {
        Vector part[ROWS];
        for (int r = 0; r < ROWS; ++r) part[r] = load(w + r * SPAN + k);
        for (int t = 0; t < T; ++t) {
            Vector xt = load(x + t * x_stride + k);
            for (int r = 0; r < ROWS; ++r) a[t][r] = fma(xt, part[r], a[t][r]);
        }
    }
    for (int t = 0; t < T; ++t)
        for (int r = 0; r < rows; ++r) y[t * y_stride + r] += sum(a[t][r]);
}

template <int T>
void all_dots(const float* w, const float* x, int64_t x_stride, int64_t n, float* y, int64_t y_stride, int rows,
              int64_t tokens) {
    for (; tokens >= T; tokens -= T, x += T * x_stride, y += T * y_stride)
        dots<T>(w, x, x_stride, n, y, y_stride, rows);
    if constexpr (T > 1) all_dots<T / 2>(w, x, x_stride, n, y, y_stride, rows, tokens);
}

void product_rows(const Weight& w, int64_t first, const float* x, int64_t tokens, float* y) {
    alignas(64) float part[ROWS * SPAN];
    const Sixteen code = code_of(w);
    const int rows = int(std::min<int64_t>(ROWS, w.rows - first));
    const int64_t x_stride = padded(w.columns);
    for (int64_t t = 0; t < tokens; ++t)
        for (int r = 0; r < rows; ++r) y[t * w.rows + first + r] = 0;
    for (int64_t start = 0; start < w.columns; start += SPAN) {
        const int64_t stop = std::min(w.columns, start + SPAN), n = padded(stop - start);
        for (int r = 0; r < ROWS; ++r) {
            float* to = part + r * SPAN;
            int64_t at = (first + r) * w.columns;
            int64_t done = r < rows ? stop - start : 0;
            if (done) decode<float>(w, code, at + start, at + stop, to, FLOAT32);
            std::fill(to + done, to + n, 0.0f);
        }
        all_dots<TOKENS>(part, x + start, x_stride, n, y + first, w.rows, rows, tokens);
    }
}

// g[t][:] += sum over r < rows of dy[t][r] w[r][:], for VECTORS vectors.
template <int T>
void outer(const float* w, const float* dy, int64_t dy_stride, int rows, float* g, int64_t g_stride) {
    Vector a[T][VECTORS];
    for (int t = 0; t < T; ++t)
        for (int v = 0; v < VECTORS; ++v) a[t][v] = load(g + t * g_stride + v * LANES);
    for (int r = 0; r < rows; ++r) {
        Vector part[VECTORS];
        for (int v = 0; v < VECTORS; ++v) part[v] = load(w + r * TILE + v * LANES);
        for (int t = 0; t < T; ++t) {
            Vector s = all(dy[t * dy_stride + r]);
            for (int v = 0; v < VECTORS; ++v) a[t][v] = fma(s, part[v], a[t][v]);
        }
    }
    for (int t = 0; t < T; ++t)
        for (int v = 0; v < VECTORS; ++v) store(g + t * g_stride + v * LANES, a[t][v]);
}

template <int T>
void all_outer(const float* w, const float* dy, int64_t dy_stride, int rows, float* g, int64_t g_stride, int64_t n,
               int64_t tokens) {
    for (; tokens >= T; tokens -= T, dy += T * dy_stride, g += T * g_stride)
        for (int64_t k = 0; k < n; k += VECTORS * LANES) outer<T>(w + k, dy, dy_stride, rows, g + k, g_stride);
    if constexpr (T > 1) all_outer<T / 2>(w, dy, dy_stride, rows, g, g_stride, n, tokens);
}

// g (tokens, TILE) = dy[:, rows first .. last] W[rows, columns start .. stop], the rest of it zero.
void gradient_tile(const Weight& w, int64_t first, int64_t last, int64_t start, int64_t stop, const float* dy,
                   int64_t tokens, float* g, int64_t g_stride) {
    alignas(64) float part[DEPTH * TILE];
    const Sixteen code = code_of(w);
    constexpr int64_t step = VECTORS * LANES;
    const int64_t n = (stop - start + step - 1) / step * step;
    for (int64_t t = 0; t < tokens; ++t) std::fill(g + t * g_stride, g + t * g_stride + n, 0.0f);
    for (; first < last; first += DEPTH) {
        const int rows = int(std::min<int64_t>(DEPTH, last - first));
        for (int r = 0; r < rows; ++r) {
            int64_t at = (first + r) * w.columns;
            decode<float>(w, code, at + start, at + stop, part + r * TILE, FLOAT32);
            std::fill(part + r * TILE + stop - start, part + r * TILE + n, 0.0f);
        }
        all_outer<TOKENS>(part, dy + first, w.rows, rows, g, g_stride, n, tokens);
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

// --- what nf4.py calls -------------------------------------------------------------------------------------------

extern "C" {

// out (rows, columns) = the weight there, in `dtype`; threads >= 1.
void nf4_decode(const Weight* w, int64_t row, int64_t rows, int64_t column, int64_t columns, void* out, int32_t dtype,
                int32_t threads) {
    if (dtype == FLOAT32)
        decode_tile(*w, row, rows, column, columns, static_cast<float*>(out), dtype, threads);
    else
        decode_tile(*w, row, rows, column, columns, static_cast<uint16_t*>(out), dtype, threads);
}

// y (tokens, w.rows) = x W'; x (tokens, w.columns padded to 16 with zeros).  Each element is summed by one thread, in
// an order that its shape fixes.
void nf4_product(const Weight* w, const float* x, int64_t tokens, float* y, int32_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t first = 0; first < w->rows; first += ROWS) product_rows(*w, first, x, tokens, y);
}

// Columns of a row of `parts`, below.
int64_t nf4_gradient_stride(int64_t columns) { return (columns + TILE - 1) / TILE * TILE; }

// dx (tokens, w.columns) = dy W; dy (tokens, w.rows).  `parts` (ceil(w.rows / depth), tokens, stride) holds a sum for
// each `depth` rows of the weight, which are added in their order: the same for any number of threads.
void nf4_input_gradient(const Weight* w, const float* dy, int64_t tokens, int64_t depth, float* parts, float* dx,
                        int32_t threads) {
    const int64_t stride = nf4_gradient_stride(w->columns), tiles = stride / TILE;
    const int64_t count = (w->rows + depth - 1) / depth;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < tiles * count; ++i) {
        const int64_t part = i / tiles, start = i % tiles * TILE;
        gradient_tile(*w, part * depth, std::min(w->rows, (part + 1) * depth), start,
                      std::min(w->columns, start + TILE), dy, tokens, parts + part * tokens * stride + start, stride);
    }
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < tokens * tiles; ++i) {
        const int64_t token = i / tiles, start = i % tiles * TILE, stop = std::min(w->columns, start + TILE);
        for (int64_t k = start; k < stop; ++k) {
            float total = 0;
            for (int64_t part = 0; part < count; ++part) total += parts[(part * tokens + token) * stride + k];
            dx[token * w->columns + k] = total;
        }
    }
}

}  // extern "C"
