// Vectors of the widest kind that this is compiled for, and rounding to 16 bits, the same bits for all kinds.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "nf4_kernels.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define CPU_AVX512
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define CPU_AVX2
#endif
#if defined(CPU_AVX512) || defined(CPU_AVX2)
#include <immintrin.h>
#endif

namespace {

#if defined(CPU_AVX512)
constexpr int LANES = 16;
#elif defined(CPU_AVX2)
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
#if defined(CPU_AVX512)
    return _mm512_fmadd_ps(a, b, c);
#elif defined(CPU_AVX2)
    return _mm256_fmadd_ps(a, b, c);
#else
    return a * b + c;
#endif
}

inline float sum(Vector v) {
#if defined(CPU_AVX512)
    return _mm512_reduce_add_ps(v);
#else
    float total = 0;
    for (int i = 0; i < LANES; i += 4) total += (v[i] + v[i + 1]) + (v[i + 2] + v[i + 3]);
    return total;
#endif
}

// Rounding

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

#if defined(CPU_AVX512)
typedef __m256i Halves;  // as many float16 as a vector has floats
inline Halves float16_of(Vector v) { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Vector float32_of(Halves h) { return _mm512_cvtph_ps(h); }
#elif defined(CPU_AVX2)
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

}  // namespace
