// Dropout on a CPU: masks by Philox4x32 as `codegen/masks.py` defines them, applied where they are computed.
//
// A plain C interface without PyTorch's headers; `dropout.py` calls it.  Counters sit in lanes of 64 bits, so that a
// round is two multiplications, two shifts and two xors of vectors: the upper halves of lanes hold what is left of
// products, which the multiplications do not read.

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) && defined(__AVX512BW__)
#define DROPOUT_AVX512
#elif defined(__AVX2__)
#define DROPOUT_AVX2
#endif
#if defined(DROPOUT_AVX512) || defined(DROPOUT_AVX2)
#include <immintrin.h>
#endif

namespace {

constexpr int ROUNDS = 7, COLUMNS = 8;  // columns that share a call of the generator
constexpr uint64_t M0 = 0xD2511F53, M1 = 0xCD9E8D57;
constexpr uint32_t W0 = 0x9E3779B9, W1 = 0xBB67AE85;
constexpr int CHAINS = 4;  // vectors of counters at a time: one alone would wait for its multiplications

#if defined(DROPOUT_AVX512)
typedef __m512i Vector;
constexpr int LANES = 8;
inline Vector all(uint64_t x) { return _mm512_set1_epi64(x); }
inline Vector times(Vector a, Vector b) { return _mm512_mul_epu32(a, b); }
inline Vector upper(Vector a) { return _mm512_srli_epi64(a, 32); }
inline Vector exclusive(Vector a, Vector b, Vector c) { return _mm512_ternarylogic_epi64(a, b, c, 0x96); }
inline Vector joined(Vector low, Vector high) {  // the lower halves of both, as lanes of 64 bits
    return _mm512_mask_blend_epi32(0xAAAA, low, _mm512_slli_epi64(high, 32));
}
inline Vector firsts(Vector a, Vector b) { return _mm512_unpacklo_epi64(a, b); }
inline Vector seconds(Vector a, Vector b) { return _mm512_unpackhi_epi64(a, b); }
#elif defined(DROPOUT_AVX2)
typedef __m256i Vector;
constexpr int LANES = 4;
inline Vector all(uint64_t x) { return _mm256_set1_epi64x(x); }
inline Vector times(Vector a, Vector b) { return _mm256_mul_epu32(a, b); }
inline Vector upper(Vector a) { return _mm256_srli_epi64(a, 32); }
inline Vector exclusive(Vector a, Vector b, Vector c) { return _mm256_xor_si256(_mm256_xor_si256(a, b), c); }
inline Vector joined(Vector low, Vector high) { return _mm256_blend_epi32(low, _mm256_slli_epi64(high, 32), 0xAA); }
inline Vector firsts(Vector a, Vector b) { return _mm256_unpacklo_epi64(a, b); }
inline Vector seconds(Vector a, Vector b) { return _mm256_unpackhi_epi64(a, b); }
#else
typedef uint64_t Vector __attribute__((vector_size(16)));
constexpr int LANES = 2;
constexpr uint64_t LOW = 0xFFFFFFFF;
inline Vector all(uint64_t x) { return Vector{x, x}; }
inline Vector times(Vector a, Vector b) { return (a & LOW) * (b & LOW); }
inline Vector upper(Vector a) { return a >> 32; }
inline Vector exclusive(Vector a, Vector b, Vector c) { return a ^ b ^ c; }
inline Vector joined(Vector low, Vector high) { return (low & LOW) | (high << 32); }
inline Vector firsts(Vector a, Vector b) { return Vector{a[0], b[0]}; }
inline Vector seconds(Vector a, Vector b) { return Vector{a[1], b[1]}; }
#endif

constexpr int SPAN = CHAINS * LANES * COLUMNS;  // columns whose numbers are computed at a time

struct Site {
    uint32_t key[2];
    uint16_t threshold;
};

// Masks of 16 bits, all ones where an element is kept, of SPAN columns of a row from a multiple of COLUMNS on.
// Of two lanes, the even one has a call of the first half of its vector and the odd one of the second, so that
// interleaving words gives calls in order.
void masks(const Site& site, uint32_t row, uint32_t block, uint16_t* out) {
    Vector c0[CHAINS], c1[CHAINS], c2[CHAINS], c3[CHAINS];
    uint64_t calls[LANES];
    for (int i = 0; i < LANES; ++i) calls[i] = block + i / 2 + i % 2 * (LANES / 2);
    for (int j = 0; j < CHAINS; ++j) {
        std::memcpy(&c0[j], calls, sizeof calls);
        c1[j] = all(row);
        c2[j] = c3[j] = all(0);
        for (int i = 0; i < LANES; ++i) calls[i] += LANES;
    }
    const Vector m0 = all(M0), m1 = all(M1);
    uint32_t k0 = site.key[0], k1 = site.key[1];
#pragma GCC unroll 7
    for (int round = 0; round < ROUNDS; ++round, k0 += W0, k1 += W1) {
        const Vector key0 = all(k0), key1 = all(k1);
#pragma GCC unroll 4
        for (int j = 0; j < CHAINS; ++j) {
            const Vector first = times(c0[j], m0), second = times(c2[j], m1);
            c0[j] = exclusive(upper(second), c1[j], key0);
            c2[j] = exclusive(upper(first), c3[j], key1);
            c1[j] = second;
            c3[j] = first;
        }
    }
    for (int j = 0; j < CHAINS; ++j) {
        const Vector low = joined(c0[j], c1[j]), high = joined(c2[j], c3[j]);
        const Vector halves[2] = {firsts(low, high), seconds(low, high)};
        std::memcpy(out + j * LANES * COLUMNS, halves, sizeof halves);
    }
    for (int i = 0; i < SPAN; ++i) out[i] = out[i] >= site.threshold ? 0xFFFF : 0;
}

// Element i of a row of some of its columns, with all bits of its mask set or none.
template <class T>
inline T mask_of(uint16_t mask) {
    return static_cast<T>(static_cast<int64_t>(static_cast<int16_t>(mask)));
}

template <class Bits>
struct Copy {
    static void apply(const void* from, void* to, int64_t at, int count, const uint16_t* mask) {
        const Bits* x = static_cast<const Bits*>(from) + at;
        Bits* y = static_cast<Bits*>(to) + at;
        for (int i = 0; i < count; ++i) y[i] = x[i] & mask_of<Bits>(mask[i]);
    }
    static constexpr int size = sizeof(Bits);
};

struct Add {
    static void apply(const void* from, void* to, int64_t at, int count, const uint16_t* mask) {
        const uint32_t* x = static_cast<const uint32_t*>(from) + at;
        float* y = static_cast<float*>(to) + at;
        for (int i = 0; i < count; ++i) {
            const uint32_t bits = x[i] & mask_of<uint32_t>(mask[i]);
            float value;
            std::memcpy(&value, &bits, sizeof value);
            y[i] += value;
        }
    }
    static constexpr int size = 4;
};

template <class Step>
void walk(const void* x, int64_t x_stride, void* y, int64_t y_stride, int64_t rows, int64_t columns, const Site& site,
          int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
        const char* from = static_cast<const char*>(x) + row * x_stride * Step::size;
        char* to = static_cast<char*>(y) + row * y_stride * Step::size;
        alignas(64) uint16_t mask[SPAN];
        for (int64_t at = 0; at < columns; at += SPAN) {
            masks(site, static_cast<uint32_t>(row), static_cast<uint32_t>(at / COLUMNS), mask);
            if (columns - at >= SPAN)
                Step::apply(from, to, at, SPAN, mask);
            else
                Step::apply(from, to, at, static_cast<int>(columns - at), mask);
        }
    }
}

}  // namespace

extern "C" {

// y = x where it is kept, 0 elsewhere: elements of `size` bytes; the strides are of rows, in elements.
void dropout_copy(const void* x, int64_t x_stride, void* y, int64_t y_stride, int64_t rows, int64_t columns,
                  const int64_t* seed, int32_t threshold, int32_t size, int32_t threads) {
    const uint64_t key = static_cast<uint64_t>(*seed);
    const Site site{{static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32)}, static_cast<uint16_t>(threshold)};
    const auto step = size == 2 ? walk<Copy<uint16_t>> : size == 4 ? walk<Copy<uint32_t>> : walk<Copy<uint64_t>>;
    step(x, x_stride, y, y_stride, rows, columns, site, threads);
}

// y += x where it is kept, float32.
void dropout_add(const void* x, int64_t x_stride, void* y, int64_t y_stride, int64_t rows, int64_t columns,
                 const int64_t* seed, int32_t threshold, int32_t threads) {
    const uint64_t key = static_cast<uint64_t>(*seed);
    const Site site{{static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32)}, static_cast<uint16_t>(threshold)};
    walk<Add>(x, x_stride, y, y_stride, rows, columns, site, threads);
}
}
