// Masks of dropout on a CPU, computed where they are used: Philox4x32 as `codegen/masks.py` defines them.
//
// Counters sit in lanes of 64 bits, so that a round is two multiplications, two shifts and two xors of vectors: the
// upper halves of lanes hold what is left of products, which the multiplications do not read.  Of two lanes, the even
// one has a call of the first half of its vector and the odd one of the second (`calls`), so that interleaving their
// words gives calls in order.
#pragma once

#include "vectors.h"

namespace {

constexpr int ROUNDS = 7, COLUMNS = 8;  // columns that share a call of the generator
constexpr uint64_t M0 = 0xD2511F53, M1 = 0xCD9E8D57;
constexpr uint32_t W0 = 0x9E3779B9, W1 = 0xBB67AE85;
constexpr int CHAINS = 4;  // vectors of counters at a time: one alone would wait for its multiplications

#if defined(CPU_AVX512)
typedef __m512i Words;
constexpr int CALLS = 8;
inline Words same(uint64_t x) { return _mm512_set1_epi64(x); }
inline Words calls() { return _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7); }
inline Words plus(Words a, Words b) { return _mm512_add_epi64(a, b); }
inline Words times(Words a, Words b) { return _mm512_mul_epu32(a, b); }
inline Words upper(Words a) { return _mm512_srli_epi64(a, 32); }
inline Words exclusive(Words a, Words b, Words c) { return _mm512_ternarylogic_epi64(a, b, c, 0x96); }
inline Words joined(Words low, Words high) {  // the lower halves of both, as lanes of 64 bits
    return _mm512_mask_blend_epi32(0xAAAA, low, _mm512_slli_epi64(high, 32));
}
inline Words firsts(Words a, Words b) { return _mm512_unpacklo_epi64(a, b); }
inline Words seconds(Words a, Words b) { return _mm512_unpackhi_epi64(a, b); }
#elif defined(CPU_AVX2)
typedef __m256i Words;
constexpr int CALLS = 4;
inline Words same(uint64_t x) { return _mm256_set1_epi64x(x); }
inline Words calls() { return _mm256_setr_epi64x(0, 2, 1, 3); }
inline Words plus(Words a, Words b) { return _mm256_add_epi64(a, b); }
inline Words times(Words a, Words b) { return _mm256_mul_epu32(a, b); }
inline Words upper(Words a) { return _mm256_srli_epi64(a, 32); }
inline Words exclusive(Words a, Words b, Words c) { return _mm256_xor_si256(_mm256_xor_si256(a, b), c); }
inline Words joined(Words low, Words high) { return _mm256_blend_epi32(low, _mm256_slli_epi64(high, 32), 0xAA); }
inline Words firsts(Words a, Words b) { return _mm256_unpacklo_epi64(a, b); }
inline Words seconds(Words a, Words b) { return _mm256_unpackhi_epi64(a, b); }
#else
typedef uint64_t Words __attribute__((vector_size(16)));
constexpr int CALLS = 2;
constexpr uint64_t LOW = 0xFFFFFFFF;
inline Words same(uint64_t x) { return Words{x, x}; }
inline Words calls() { return Words{0, 1}; }
inline Words plus(Words a, Words b) { return a + b; }
inline Words times(Words a, Words b) { return (a & LOW) * (b & LOW); }
inline Words upper(Words a) { return a >> 32; }
inline Words exclusive(Words a, Words b, Words c) { return a ^ b ^ c; }
inline Words joined(Words low, Words high) { return (low & LOW) | (high << 32); }
inline Words firsts(Words a, Words b) { return Words{a[0], b[0]}; }
inline Words seconds(Words a, Words b) { return Words{a[1], b[1]}; }
#endif

constexpr int SPAN = CHAINS * CALLS * COLUMNS;  // columns whose numbers are computed at a time

struct Site {
    uint32_t key[2];
    uint16_t threshold;
    Site(const int64_t* seed, int32_t threshold) : threshold(static_cast<uint16_t>(threshold)) {
        const uint64_t value = static_cast<uint64_t>(*seed);
        key[0] = static_cast<uint32_t>(value);
        key[1] = static_cast<uint32_t>(value >> 32);
    }
};

// Masks of 16 bits, all ones where an element is kept, of SPAN columns of a row from a multiple of COLUMNS on.
void span_of_masks(const Site& site, uint32_t row, uint32_t block, uint16_t* out) {
    Words c0[CHAINS], c1[CHAINS], c2[CHAINS], c3[CHAINS];
    for (int j = 0; j < CHAINS; ++j) {
        c0[j] = plus(calls(), same(block + j * CALLS));
        c1[j] = same(row);
        c2[j] = c3[j] = same(0);
    }
    const Words m0 = same(M0), m1 = same(M1);
    uint32_t k0 = site.key[0], k1 = site.key[1];
#pragma GCC unroll 7
    for (int round = 0; round < ROUNDS; ++round, k0 += W0, k1 += W1) {
        const Words key0 = same(k0), key1 = same(k1);
#pragma GCC unroll 4
        for (int j = 0; j < CHAINS; ++j) {
            const Words first = times(c0[j], m0), second = times(c2[j], m1);
            c0[j] = exclusive(upper(second), c1[j], key0);
            c2[j] = exclusive(upper(first), c3[j], key1);
            c1[j] = second;
            c3[j] = first;
        }
    }
    for (int j = 0; j < CHAINS; ++j) {
        const Words low = joined(c0[j], c1[j]), high = joined(c2[j], c3[j]);
        const Words halves[2] = {firsts(low, high), seconds(low, high)};
        std::memcpy(out + j * CALLS * COLUMNS, halves, sizeof halves);
    }
    for (int i = 0; i < SPAN; ++i) out[i] = out[i] >= site.threshold ? 0xFFFF : 0;
}

constexpr int WIDTH = 256;  // columns of a block

// Of one row and the columns of a block; what is beyond them is defined too.
void masks(const Site& site, int64_t row, int64_t column, int width, uint16_t* out) {
    for (int at = 0; at < width; at += SPAN)
        span_of_masks(site, static_cast<uint32_t>(row), static_cast<uint32_t>((column + at) / COLUMNS), out + at);
}

template <class Bits>
inline Bits bits_of(uint16_t mask) {
    return static_cast<Bits>(static_cast<int64_t>(static_cast<int16_t>(mask)));
}

template <class Bits>
void copy(const Bits* x, Bits* y, const uint16_t* mask, int width) {
    for (int i = 0; i < width; ++i) y[i] = x[i] & bits_of<Bits>(mask[i]);
}

template <class Bits>
void copy_matrix(const void* x, int64_t x_row, void* y, int64_t y_row, int64_t rows, int64_t columns, const Site& site,
                 int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
        alignas(64) uint16_t mask[WIDTH];
        for (int64_t at = 0; at < columns; at += WIDTH) {
            const int width = static_cast<int>(std::min<int64_t>(WIDTH, columns - at));
            masks(site, row, at, width, mask);
            copy(static_cast<const Bits*>(x) + row * x_row + at, static_cast<Bits*>(y) + row * y_row + at, mask, width);
        }
    }
}

// x where the masks of its columns are all ones, 0 elsewhere.
inline Vector kept(Vector x, const uint16_t* mask) {
    typedef int16_t Shorts __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
    typedef int32_t Wide __attribute__((vector_size(4 * LANES)));
    return (Vector)((Wide)x & __builtin_convertvector(*reinterpret_cast<const Shorts*>(mask), Wide));
}

// y = x where it is kept, 0 elsewhere: elements of `size` bytes; the strides are of rows, in elements.
void dropped(const void* x, int64_t x_row, void* y, int64_t y_row, int64_t rows, int64_t columns,
             const int64_t* seed, int32_t threshold, int64_t size, int threads) {
    const auto step = size == 2 ? copy_matrix<uint16_t> : size == 4 ? copy_matrix<uint32_t> : copy_matrix<uint64_t>;
    step(x, x_row, y, y_row, rows, columns, Site(seed, threshold), threads);
}

}  // namespace
