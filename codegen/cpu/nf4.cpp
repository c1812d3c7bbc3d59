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

// The upper half of the result is the bfloat16.  Not for a nan whose lower bits are set: they would carry over.
inline Bits bfloat16_of(Vector v) {
    Bits u = (Bits)v;
    return u + 0x7fff + ((u >> 16) & 1);
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
    if (dtype == BFLOAT16) return (Vector)(bfloat16_of(v) & 0xffff0000u);
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
#if defined(NF4_AVX512)
    __m512i values;  // twice

    Table(const Sixteen& v, int32_t dtype) {
        if (dtype == FLOAT16) {
            values = _mm512_broadcast_i64x4(float16_of(v.part[0]));
        } else {
            const __m512i odd = _mm512_set_epi64(0x001f001d001b0019, 0x0017001500130011, 0x000f000d000b0009, 0x0007000500030001,
                                                 0x001f001d001b0019, 0x0017001500130011, 0x000f000d000b0009, 0x0007000500030001);
            values = _mm512_permutexvar_epi16(odd, (__m512i)bfloat16_of(v.part[0]));
        }
    }
#else
    alignas(32) uint16_t values[16];

    Table(const Sixteen& v, int32_t dtype) {
        for (int i = 0; i < PARTS; ++i) {
            Halves halves;
            if (dtype == FLOAT16) {
                halves = float16_of(v.part[i]);
            } else {
                Bits upper = bfloat16_of(v.part[i]) >> 16;
#if defined(NF4_AVX2)
                __m256i both = _mm256_packus_epi32((__m256i)upper, (__m256i)upper);
                halves = _mm256_castsi256_si128(_mm256_permute4x64_epi64(both, 0x08));
#else
                for (int k = 0; k < LANES; ++k) halves.at[k] = uint16_t(upper[k]);
#endif
            }
            std::memcpy(values + i * LANES, &halves, sizeof halves);
        }
    }
#endif

    void run(const uint8_t* codes, int64_t n, uint16_t* out) const {
        int64_t i = 0;
#if defined(NF4_AVX512)
        // vpermw reads 5 bits of an index; the table stands there twice, so that the fifth, a neighbour's, is idle.
        for (; i + 32 <= n; i += 32) {
            __m512i byte = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i / 2)));
            __m512i index = _mm512_or_si512(_mm512_srli_epi32(byte, 4), _mm512_slli_epi32(byte, 16));
            _mm512_storeu_si512(out + i, _mm512_permutexvar_epi16(index, values));
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
        if (i == n) return;
        uint16_t value[16];
        std::memcpy(value, &values, sizeof value);
        for (; i < n; ++i) out[i] = value[i % 2 ? codes[i / 2] & 15 : codes[i / 2] >> 4];
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
    float scale;
    if (w.absmax) {
        scale = w.absmax[block];
    } else {
        scale = w.nested_code[w.absmax_codes[block]] * w.nested_absmax[block / 256];
        scale += *w.offset;
    }
    return scale == scale ? scale : bits<float>(0x7fc00000);
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
            values.part[i] = code.part[i] * scale;
            if (dtype != w.dtype) values.part[i] = rounded(values.part[i], w.dtype);
            if (dtype == FLOAT32 && w.product != w.dtype) values.part[i] = rounded(values.part[i], w.product);
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

#if defined(NF4_AVX512) && defined(__AVX512BF16__)
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

#if defined(NF4_PAIRS) && defined(__AMX_BF16__)
#define NF4_TILES

// bfloat16 in the processor's tiles: 16 x 32 times 32 x 16, added to 16 x 16 float32.  The left operand lies in memory
// row by row, the right one as pairs: the numbers 2 i and 2 i + 1 of each of its 16 columns side by side.
struct Tiles : Pairs {
    static constexpr int SIDE = 16, LONG = 32;
    static constexpr int BLOCK = LONG;
    static constexpr int DEPTH = 128;
    static constexpr int TILE = 256;
    static constexpr int HEIGHT = 32, WIDE = 512;  // of the weight that a product decodes at a time
    static constexpr int LEAST = 3, MOST = 256;    // tokens

    struct alignas(64) Shapes {
        uint8_t palette = 1, start = 0, reserved[14] = {};
        uint16_t bytes[16] = {};
        uint8_t rows[16] = {};
    };

    struct Session {  // the tiles of this thread
        Session() {
            Shapes shapes;
            for (int i = 0; i < 8; ++i) shapes.bytes[i] = 4 * SIDE, shapes.rows[i] = SIDE;
            _tile_loadconfig(&shapes);
        }
        ~Session() { _tile_release(); }
    };

    static Number* row(Number*, Number* two, int64_t r) { return two + r % 2 * TILE; }
    static void decoded(Number* part, const Number* two, int64_t r, int64_t n) {
        if (r % 2) interleave(two, two + TILE, part + (r - 1) * TILE, n);
    }
};

// Where a matrix of tiles lies: from one row to the next, from one tile to the next along the sum, and across it.
struct Stride {
    int64_t row, along, across;
};

// c[i][j] += a[i] b[j], i < I, j < J, sums of n numbers.
template <int I, int J>
void tiles(const uint16_t* a, Stride as, const uint16_t* b, Stride bs, int64_t n, float* c, Stride cs) {
    _tile_loadd(0, c, 4 * cs.row);
    if constexpr (I > 1) _tile_loadd(1, c + cs.along, 4 * cs.row);
    if constexpr (J > 1) _tile_loadd(2, c + cs.across, 4 * cs.row);
    if constexpr (I > 1 && J > 1) _tile_loadd(3, c + cs.along + cs.across, 4 * cs.row);
    for (int64_t k = 0; k < n; k += Tiles::LONG, a += as.along, b += bs.along) {
        _tile_loadd(4, a, 2 * as.row);
        _tile_loadd(6, b, 2 * bs.row);
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (I > 1) {
            _tile_loadd(5, a + as.across, 2 * as.row);
            _tile_dpbf16ps(1, 5, 6);
        }
        if constexpr (J > 1) {
            _tile_loadd(7, b + bs.across, 2 * bs.row);
            _tile_dpbf16ps(2, 4, 7);
        }
        if constexpr (I > 1 && J > 1) _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, 4 * cs.row);
    if constexpr (I > 1) _tile_stored(1, c + cs.along, 4 * cs.row);
    if constexpr (J > 1) _tile_stored(2, c + cs.across, 4 * cs.row);
    if constexpr (I > 1 && J > 1) _tile_stored(3, c + cs.along + cs.across, 4 * cs.row);
}

// Here x lies in groups of 16 tokens, each (padded columns / 2, 16 tokens, 2).
void product_rows(const Weight& w, int64_t first, const uint16_t* x, int64_t tokens, float* y, Tiles) {
    alignas(64) uint16_t part[Tiles::HEIGHT * Tiles::WIDE];
    alignas(64) float sums[Tiles::HEIGHT * Tiles::MOST];
    const Sixteen code = code_of(w);
    const int64_t rows = std::min<int64_t>(Tiles::HEIGHT, w.rows - first);
    const int64_t group = Tiles::SIDE * up(w.columns, 32), held = up(tokens, Tiles::SIDE);
    const Stride as = {Tiles::WIDE, Tiles::LONG, Tiles::SIDE * Tiles::WIDE};
    const Stride bs = {2 * Tiles::SIDE, Tiles::SIDE * Tiles::LONG, group};
    const Stride cs = {held, Tiles::SIDE * held, Tiles::SIDE};
    std::fill(sums, sums + Tiles::HEIGHT * held, 0.0f);
    for (int64_t start = 0; start < w.columns; start += Tiles::WIDE) {
        const int64_t stop = std::min(w.columns, start + Tiles::WIDE), n = up(stop - start, Tiles::LONG);
        for (int64_t r = 0; r < Tiles::HEIGHT; ++r) {
            const int64_t at = (first + r) * w.columns, done = r < rows ? stop - start : 0;
            if (done) decode(w, code, at + start, at + stop, part + r * Tiles::WIDE, BFLOAT16);
            std::fill(part + r * Tiles::WIDE + done, part + r * Tiles::WIDE + n, uint16_t(0));
        }
        int64_t t = 0;
        const uint16_t* b = x + start * Tiles::SIDE;
        for (; t + Tiles::SIDE < held; t += 2 * Tiles::SIDE, b += 2 * group)
            tiles<2, 2>(part, as, b, bs, n, sums + t, cs);
        if (t < held) tiles<2, 1>(part, as, b, bs, n, sums + t, cs);
    }
    for (int64_t t = 0; t < tokens; ++t)
        for (int64_t r = 0; r < rows; ++r) y[t * w.rows + first + r] = sums[r * held + t];
}

void all_outer(const uint16_t* w, const uint16_t* dy, int64_t dy_stride, int64_t rows, float* g, int64_t g_stride,
               int64_t n, int64_t tokens, Tiles) {
    const Stride as = {dy_stride, Tiles::LONG, Tiles::SIDE * dy_stride};
    const Stride bs = {2 * Tiles::TILE, Tiles::LONG * Tiles::TILE, 2 * Tiles::SIDE};
    const Stride cs = {g_stride, Tiles::SIDE * g_stride, Tiles::SIDE};
    for (; tokens > 0; tokens -= 2 * Tiles::SIDE, dy += 2 * as.across, g += 2 * cs.along)
        for (int64_t k = 0; k < n; k += 2 * Tiles::SIDE)
            if (tokens > Tiles::SIDE)
                tiles<2, 2>(dy, as, w + 2 * k, bs, rows, g + k, cs);
            else
                tiles<1, 2>(dy, as, w + 2 * k, bs, rows, g + k, cs);
}
#endif

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
#pragma omp for schedule(static)
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
#pragma omp for schedule(static)
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

// How products of a dtype with few tokens are given x and dy: 0 as float32, 1 as they are, or 2 as they are with the
// tokens padded to 16 and x as groups of 16 tokens, each (columns / 2, 16 tokens, 2).
int32_t nf4_layout([[maybe_unused]] int32_t dtype, [[maybe_unused]] int64_t tokens) {
#if defined(NF4_TILES)
    if (dtype == BFLOAT16 && tokens >= Tiles::LEAST) return 2;
#endif
#if defined(NF4_PAIRS)
    if (dtype == BFLOAT16) return 1;
#endif
    return 0;
}

// y (tokens, w.rows) = x W'; x (tokens, w.columns), both padded with zeros, the columns to 32.  Each element is summed
// by one thread, in an order that its shape fixes.
void nf4_product(const Weight* w, const void* x, int64_t tokens, float* y, int32_t threads) {
    const int32_t layout = nf4_layout(w->product, tokens);
#if defined(NF4_TILES)
    if (layout == 2) return product<Tiles>(*w, x, tokens, y, Tiles::HEIGHT, threads);
#endif
#if defined(NF4_PAIRS)
    if (layout == 1) return product<Pairs>(*w, x, tokens, y, ROWS, threads);
#endif
    if (layout == 0) product<Floats>(*w, x, tokens, y, ROWS, threads);
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
    if (layout == 2) sums = gradient_parts<Tiles>;
#endif
#if defined(NF4_PAIRS)
    if (layout == 1) sums = gradient_parts<Pairs>;
#endif
    sums(*w, dy, held, depth, parts, threads);
    const int64_t stride = up(w->columns, TILE), tiles = stride / TILE, count = up(w->rows, depth) / depth;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < tokens * tiles; ++i) {
        const int64_t token = i / tiles, start = i % tiles * TILE, stop = std::min(w->columns, start + TILE);
        for (int64_t k = start; k < stop; ++k) {
            float total = 0;
            for (int64_t part = 0; part < count; ++part) total += parts[(part * held + token) * stride + k];
            dx[token * w->columns + k] = total;
        }
    }
}

}  // extern "C"
