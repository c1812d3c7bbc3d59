// An NF4 weight as it is stored, and how it decodes: bit for bit `codegen/nf4.py`.
//
// Code x scale in float32 is rounded to nearest even.  Since sixteen values are all that can come out of a block, it is
// rounded as one table of sixteen, which its codes then index: by `vpermps` / `vpermw` on AVX-512, `vpermps` / `pshufb`
// on AVX2, one by one elsewhere.

#pragma once

#include "vectors.h"

namespace {

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
#if defined(CPU_AVX512)
        // A byte in each 64-bit lane, moved so that each 32-bit half ends in one of its codes; vpermps reads 4 bits.
        for (; i + 16 <= n; i += 16) {
            __m512i byte = _mm512_cvtepu8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + i / 2)));
            __m512i index = _mm512_or_si512(_mm512_srli_epi64(byte, 4), _mm512_slli_epi64(byte, 32));
            _mm512_storeu_ps(out + i, _mm512_permutexvar_ps(index, values.part[0]));
        }
#elif defined(CPU_AVX2)
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
#if defined(CPU_AVX512)
    __m512i values;  // twice

    Table(const Sixteen& v, int32_t dtype) {
        if (dtype == FLOAT16) {
            values = _mm512_broadcast_i64x4(float16_of(v.part[0]));
        } else {
            const __m512i odd = _mm512_broadcast_i64x4(_mm256_set_epi64x(
                0x001f001d001b0019, 0x0017001500130011, 0x000f000d000b0009, 0x0007000500030001));
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
#if defined(CPU_AVX2)
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
#if defined(CPU_AVX512)
        // vpermw reads 5 bits of an index; the table stands there twice, so that the fifth, a neighbour's, is idle.
        for (; i + 32 <= n; i += 32) {
            __m512i byte = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i / 2)));
            __m512i index = _mm512_or_si512(_mm512_srli_epi32(byte, 4), _mm512_slli_epi32(byte, 16));
            _mm512_storeu_si512(out + i, _mm512_permutexvar_epi16(index, values));
        }
#elif defined(CPU_AVX2)
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

#if defined(CPU_AVX2)
    // Sixteen words below 256 as bytes, in both halves.
    static __m256i bytes(__m256i words) {
        return _mm256_permute4x64_epi64(_mm256_packus_epi16(words, words), 0x88);
    }
#endif
};

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

}  // namespace
