/* The vector operations of answer_step.c, for AVX-512 with VNNI (16 numbers of 32 bits in a register) and for AVX2 with
   FMA and F16C (8), there with AVX-VNNI or without. Which one it is follows from what the compiler compiles for; LANES
   may be given as 8, to try the narrow form of a wider CPU. */

#ifndef SIMD_H
#define SIMD_H

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__) && defined(__AVX512VNNI__)
#define WIDEST 16
#else
#define WIDEST 8
#endif
#ifndef LANES
#define LANES WIDEST
#endif
#if WIDEST == 16 || defined(__AVXVNNI__)
#define INT8_UNITS 1
#else
#define INT8_UNITS 0
#endif
#if LANES == 16 && defined(__AVX512BF16__)
#define BF16_UNITS 1
#else
#define BF16_UNITS 0
#endif

#define SIMD static inline __attribute__((always_inline))

#if LANES == 16
typedef __m512 Floats;
typedef __m512i Ints;
typedef __m256i Halves; /* 16 bits each */
typedef __m128i Bytes;
#define WIDE(operation) _mm512_##operation
#define WHOLE(operation) _mm512_##operation##_si512
#else
typedef __m256 Floats;
typedef __m256i Ints;
typedef __m128i Halves;
typedef __m128i Bytes; /* the lower 8 */
#define WIDE(operation) _mm256_##operation
#define WHOLE(operation) _mm256_##operation##_si256
#endif

/* --- What differs in nothing but the width ----------------------------------------------------------------------- */

SIMD Floats load(const float *p) { return WIDE(loadu_ps)(p); }
SIMD void store(float *p, Floats x) { WIDE(storeu_ps)(p, x); }
SIMD Floats every(float x) { return WIDE(set1_ps)(x); }
SIMD Floats zeros(void) { return WIDE(setzero_ps)(); }
SIMD Floats plus(Floats a, Floats b) { return WIDE(add_ps)(a, b); }
SIMD Floats minus(Floats a, Floats b) { return WIDE(sub_ps)(a, b); }
SIMD Floats times(Floats a, Floats b) { return WIDE(mul_ps)(a, b); }
SIMD Floats over(Floats a, Floats b) { return WIDE(div_ps)(a, b); }
SIMD Floats times_plus(Floats a, Floats b, Floats c) { return WIDE(fmadd_ps)(a, b, c); } /* a b + c */
SIMD Floats larger(Floats a, Floats b) { return WIDE(max_ps)(a, b); } /* b where either is NaN */
SIMD Floats smaller(Floats a, Floats b) { return WIDE(min_ps)(a, b); }
SIMD Floats from_ints(Ints x) { return WIDE(cvtepi32_ps)(x); }
SIMD Ints to_ints(Floats x) { return WIDE(cvtps_epi32)(x); } /* to the nearest, ties to even */

SIMD Ints load_bytes(const void *p) { return WHOLE(loadu)((const void *)p); } /* as many as a register holds */
SIMD Ints every_int(int32_t x) { return WIDE(set1_epi32)(x); }
SIMD Ints no_ints(void) { return WHOLE(setzero)(); }
SIMD Ints plus_ints(Ints a, Ints b) { return WIDE(add_epi32)(a, b); }
SIMD Ints both_bits(Ints a, Ints b) { return WHOLE(and)(a, b); }
SIMD Ints either_bits(Ints a, Ints b) { return WHOLE(or)(a, b); }
SIMD Ints shifted_left(Ints x, int bits) { return WIDE(slli_epi32)(x, bits); }
SIMD Ints shifted_right(Ints x, int bits) { return WIDE(srli_epi32)(x, bits); }

SIMD Ints from_halves(Halves x) { return WIDE(cvtepu16_epi32)(x); }

/* --- Registers of 16 --------------------------------------------------------------------------------------------- */

#if LANES == 16
SIMD Halves load_halves(const void *p) { return _mm256_loadu_si256(p); }
SIMD void store_halves(void *p, Ints x) { _mm256_storeu_si256(p, _mm512_cvtepi32_epi16(x)); } /* the lower 16 bits */
SIMD Ints from_bytes(const void *p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128(p)); }
SIMD void store_int8(int8_t *p, Ints x) { _mm_storeu_si128((__m128i *)p, _mm512_cvtsepi32_epi8(x)); } /* saturated */
SIMD Floats as_floats(Ints x) { return _mm512_castsi512_ps(x); }
SIMD Ints as_ints(Floats x) { return _mm512_castps_si512(x); }
SIMD Floats absolute(Floats x) { return _mm512_abs_ps(x); }
SIMD Floats rounded(Floats x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
SIMD Floats times_power_of_2(Floats x, Floats whole) { return _mm512_scalef_ps(x, whole); }
SIMD float sum_of(Floats x) { return _mm512_reduce_add_ps(x); }
SIMD float largest_of(Floats x) { return _mm512_reduce_max_ps(x); }

/* The sums of four vectors. */
SIMD __m128 sums_of(Floats a, Floats b, Floats c, Floats d) {
    __m512d ab = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)));
    __m512d cd = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d)));
    __m512d low = _mm512_unpacklo_pd(ab, cd), high = _mm512_unpackhi_pd(ab, cd);
    __m512 all = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

/* --- Registers of 8 ---------------------------------------------------------------------------------------------- */

#else
SIMD Halves load_halves(const void *p) { return _mm_loadu_si128(p); }
SIMD void store_halves(void *p, Ints x) { /* the lower 16 bits */
    const __m256i low = _mm256_and_si256(x, _mm256_set1_epi32(0xffff)); /* so that nothing is saturated */
    _mm_storeu_si128(p, _mm_packus_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1)));
}
SIMD Ints from_bytes(const void *p) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64(p)); }
SIMD void store_int8(int8_t *p, Ints x) { /* saturated */
    const __m128i halves = _mm_packs_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    _mm_storel_epi64((__m128i *)p, _mm_packs_epi16(halves, halves));
}
SIMD Floats as_floats(Ints x) { return _mm256_castsi256_ps(x); }
SIMD Ints as_ints(Floats x) { return _mm256_castps_si256(x); }
SIMD Floats absolute(Floats x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x); }
SIMD Floats rounded(Floats x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
SIMD Floats times_power_of_2(Floats x, Floats whole) { /* of -126 to 127 */
    return times(x, as_floats(shifted_left(plus_ints(to_ints(whole), every_int(127)), 23)));
}

/* The sums of four vectors. */
SIMD __m128 sums_of(Floats a, Floats b, Floats c, Floats d) {
    const __m256 all = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    return _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
}

SIMD float sum_of(Floats x) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

SIMD float largest_of(Floats x) {
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
#endif

/* --- Formats of 16 and 24 bits ----------------------------------------------------------------------------------- */

SIMD Floats from_bf16(const void *p) { return as_floats(shifted_left(from_halves(load_halves(p)), 16)); }
SIMD Floats from_fp16(const void *p) { return WIDE(cvtph_ps)(load_halves(p)); }

SIMD void to_bf16(uint16_t *p, Floats x) { /* to the nearest, ties to even */
    const Ints bits = as_ints(x), odd = both_bits(shifted_right(bits, 16), every_int(1));
    store_halves(p, shifted_right(plus_ints(bits, plus_ints(odd, every_int(0x7fff))), 16));
}

/* Numbers of 24 bits from their upper 16 and their next 8. */
SIMD Floats from_24_bits(const void *upper, const void *next) {
    const Ints high = shifted_left(from_halves(load_halves(upper)), 16);
    return as_floats(either_bits(high, shifted_left(from_bytes(next), 8)));
}

/* exp(x) for x in [-87, 87], and exp(-87) below; by a polynomial for 2^f, f in [-0.5, 0.5], to 2e-7 of the value. */
SIMD Floats exponential(Floats x) {
    const Floats y = times(larger(x, every(-87.0f)), every(1.44269504f)), whole = rounded(y), f = minus(y, whole);
    Floats p = every(1.54035304e-4f); /* ln(2)^n / n! */
    p = times_plus(p, f, every(1.33335581e-3f));
    p = times_plus(p, f, every(9.61812911e-3f));
    p = times_plus(p, f, every(5.55041087e-2f));
    p = times_plus(p, f, every(2.40226507e-1f));
    p = times_plus(p, f, every(6.93147181e-1f));
    p = times_plus(p, f, every(1.0f));
    return times_power_of_2(p, whole);
}

/* --- Products of bytes ------------------------------------------------------------------------------------------- */

SIMD Ints four_bytes(const int8_t *p) { /* in every lane */
    int32_t four;
    memcpy(&four, p, 4);
    return every_int(four);
}

/* Weights of 8 bits are kept as 128 more than they are. INT8_UNITS take them so, and give 128 times the sum of x more
   than the product, which the caller takes off; without them nothing is to be taken off. */
#define INT8_OFFSET (INT8_UNITS ? 128.0f : 0.0f)

/* 32 columns of as many rows as there are lanes by 32 bytes of x: exact sums. Weights: vector i holds columns 4 i to
   4 i + 3 of a row in each lane, in 4 bits 0 to 15, in 8 bits as above. x: -127 to 127. */
#if INT8_UNITS
SIMD Ints products_of(const Ints weights[8], const int8_t *x, const int bits) {
    (void)bits;
    Ints one = no_ints(), two = no_ints(); /* apart, as each waits for its last */
    for (int i = 0; i < 4; i++) {
        one = WIDE(dpbusd_epi32)(one, weights[i], four_bytes(x + 4 * i));
        two = WIDE(dpbusd_epi32)(two, weights[i + 4], four_bytes(x + 4 * i + 16));
    }
    return plus_ints(one, two);
}
#else
/* Sums of two products have 16 bits. In 4 bits eight of them do too: at most 8 * 2 * 15 * 128 = 30,720. In 8 bits
   already two would not; one does, of what x's sign has been given to: at most 2 * 127 * 128 = 32,512. */
SIMD Ints products_of(const Ints weights[8], const int8_t *x, const int bits) {
    const __m256i ones = _mm256_set1_epi16(1);
    if (bits == 4) {
        __m256i one = _mm256_setzero_si256(), two = one;
        for (int i = 0; i < 4; i++) {
            one = _mm256_add_epi16(one, _mm256_maddubs_epi16(weights[i], four_bytes(x + 4 * i)));
            two = _mm256_add_epi16(two, _mm256_maddubs_epi16(weights[i + 4], four_bytes(x + 4 * i + 16)));
        }
        return _mm256_madd_epi16(_mm256_add_epi16(one, two), ones);
    }
    Ints sum = no_ints();
    for (int i = 0; i < 8; i++) {
        const __m256i weight = _mm256_xor_si256(weights[i], _mm256_set1_epi8(-128));
        const __m256i four = _mm256_sign_epi8(four_bytes(x + 4 * i), weight);
        sum = plus_ints(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_abs_epi8(weight), four), ones));
    }
    return sum;
}
#endif

#endif
