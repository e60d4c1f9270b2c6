/* The vector operations of the kernels in C, for CPUs with AVX-512 (16 numbers of 32 bits in a register) and for those
   with AVX2, FMA and F16C (8), both with units for products of bytes (VNNI) or without. Which it is follows from what the
   compiler compiles for; LANES may be given as 8, to try the narrow form of a wider CPU. */

#ifndef SIMD_H
#define SIMD_H

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#ifndef LANES
#if defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define LANES 16
#else
#define LANES 8
#endif
#endif
#if defined(__AVX512VNNI__) || (LANES == 8 && defined(__AVXVNNI__))
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

/* --- What differs between the widths ------------------------------------------------------------------------------ */

#if LANES == 16
typedef __m512 Floats;
typedef __m512i Ints;
typedef __m512d Pairs;  /* two numbers each */
typedef __m256i Halves; /* 16 bits each */
#define WIDE(operation) _mm512_##operation
#define WHOLE(operation) _mm512_##operation##_si512
SIMD Floats as_floats(Ints x) { return _mm512_castsi512_ps(x); }
SIMD Ints as_ints(Floats x) { return _mm512_castps_si512(x); }
SIMD Halves load_halves(const void *p) { return _mm256_loadu_si256(p); }
SIMD void store_halves(void *p, Ints x) { _mm256_storeu_si256(p, _mm512_cvtepi32_epi16(x)); } /* the lower 16 bits */
SIMD Ints from_bytes(const void *p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128(p)); }
SIMD void store_int8(int8_t *p, Ints x) { _mm_storeu_si128((__m128i *)p, _mm512_cvtsepi32_epi8(x)); } /* saturated */
SIMD Ints with_sign_of(Ints weights, Ints x) { /* bytes of x, negated where the weight is negative */
    return _mm512_mask_sub_epi8(x, _mm512_movepi8_mask(weights), _mm512_setzero_si512(), x);
}
SIMD void transpose_lanes(Floats v[16]) { /* those of 128 bits, of rows 0, 4, 8, 12, of 1, 5, 9, 13 and so on */
    Floats t[16];
    for (int i = 0; i < 16; i += 8)
        for (int j = 0; j < 4; j++) {
            t[i + j] = _mm512_shuffle_f32x4(v[i + j], v[i + j + 4], 0x88);
            t[i + j + 4] = _mm512_shuffle_f32x4(v[i + j], v[i + j + 4], 0xdd);
        }
    for (int j = 0; j < 8; j++) {
        v[j] = _mm512_shuffle_f32x4(t[j], t[j + 8], 0x88);
        v[j + 8] = _mm512_shuffle_f32x4(t[j], t[j + 8], 0xdd);
    }
}
/* An operation on the 128-bit lanes of x, down to one lane. */
#define FOLDED(operation, x)                                                                                       \
    const __m256 half = _mm256_##operation(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));               \
    const __m128 four = _mm_##operation(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1))
#else
typedef __m256 Floats;
typedef __m256i Ints;
typedef __m256d Pairs;
typedef __m128i Halves;
#define WIDE(operation) _mm256_##operation
#define WHOLE(operation) _mm256_##operation##_si256
SIMD Floats as_floats(Ints x) { return _mm256_castsi256_ps(x); }
SIMD Ints as_ints(Floats x) { return _mm256_castps_si256(x); }
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
SIMD Ints with_sign_of(Ints weights, Ints x) { return _mm256_sign_epi8(x, weights); } /* bytes of x; 0 where it is 0 */
SIMD void transpose_lanes(Floats v[8]) {
    for (int j = 0; j < 4; j++) {
        const Floats low = v[j], high = v[j + 4];
        v[j] = _mm256_permute2f128_ps(low, high, 0x20);
        v[j + 4] = _mm256_permute2f128_ps(low, high, 0x31);
    }
}
#define FOLDED(operation, x) \
    const __m128 four = _mm_##operation(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1))
#endif

/* --- Numbers ----------------------------------------------------------------------------------------------------- */

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
SIMD Floats absolute(Floats x) { return WIDE(andnot_ps)(every(-0.0f), x); }
SIMD Floats from_ints(Ints x) { return WIDE(cvtepi32_ps)(x); }
SIMD Ints to_ints(Floats x) { return WIDE(cvtps_epi32)(x); } /* to the nearest, ties to even */
SIMD Pairs as_pairs(Floats x) { return WIDE(castps_pd)(x); }

SIMD Ints load_bytes(const void *p) { return WHOLE(loadu)((const void *)p); } /* as many as a register holds */
SIMD Ints every_int(int32_t x) { return WIDE(set1_epi32)(x); }
SIMD Ints no_ints(void) { return WHOLE(setzero)(); }
SIMD Ints plus_ints(Ints a, Ints b) { return WIDE(add_epi32)(a, b); }
SIMD Ints both_bits(Ints a, Ints b) { return WHOLE(and)(a, b); }
SIMD Ints either_bits(Ints a, Ints b) { return WHOLE(or)(a, b); }
SIMD Ints shifted_left(Ints x, int bits) { return WIDE(slli_epi32)(x, bits); }
SIMD Ints shifted_right(Ints x, int bits) { return WIDE(srli_epi32)(x, bits); }
SIMD Ints from_halves(Halves x) { return WIDE(cvtepu16_epi32)(x); }

SIMD float sum_of(Floats x) {
    FOLDED(add_ps, x);
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

SIMD float largest_of(Floats x) {
    FOLDED(max_ps, x);
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

/* The sums of four vectors. */
SIMD __m128 sums_of(Floats a, Floats b, Floats c, Floats d) {
    const Pairs ab = as_pairs(plus(WIDE(unpacklo_ps)(a, b), WIDE(unpackhi_ps)(a, b)));
    const Pairs cd = as_pairs(plus(WIDE(unpacklo_ps)(c, d), WIDE(unpackhi_ps)(c, d)));
    const Floats all = plus(WIDE(castpd_ps)(WIDE(unpacklo_pd)(ab, cd)), WIDE(castpd_ps)(WIDE(unpackhi_pd)(ab, cd)));
    FOLDED(add_ps, all);
    return four;
}

/* Rows of a square of LANES x LANES numbers become its columns. */
SIMD void transpose(Floats *v) {
    Floats t[LANES];
    for (int i = 0; i < LANES; i += 2) {
        t[i] = WIDE(unpacklo_ps)(v[i], v[i + 1]);
        t[i + 1] = WIDE(unpackhi_ps)(v[i], v[i + 1]);
    }
    for (int i = 0; i < LANES; i += 4)
        for (int j = 0; j < 2; j++) {
            const Pairs low = as_pairs(t[i + j]), high = as_pairs(t[i + j + 2]);
            v[i + 2 * j] = WIDE(castpd_ps)(WIDE(unpacklo_pd)(low, high));
            v[i + 2 * j + 1] = WIDE(castpd_ps)(WIDE(unpackhi_pd)(low, high));
        }
    transpose_lanes(v);
}

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

/* 2^y for y in [-127, 127], 0 at -127; by a polynomial for 2^f, f in [-0.5, 0.5], to 2e-7 of the value. */
SIMD Floats power_of_two(Floats y) {
    const Ints whole = to_ints(y);
    const Floats f = minus(y, from_ints(whole));
    Floats p = every(1.54035304e-4f); /* ln(2)^n / n! */
    p = times_plus(p, f, every(1.33335581e-3f));
    p = times_plus(p, f, every(9.61812911e-3f));
    p = times_plus(p, f, every(5.55041087e-2f));
    p = times_plus(p, f, every(2.40226507e-1f));
    p = times_plus(p, f, every(6.93147181e-1f));
    p = times_plus(p, f, every(1.0f));
    return times(p, as_floats(shifted_left(plus_ints(whole, every_int(127)), 23)));
}

/* exp(x) for x in [-87, 87], and exp(-87) below. */
SIMD Floats exponential_of(Floats x) { return power_of_two(times(larger(x, every(-87.0f)), every(1.44269504f))); }

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
    const Ints ones = WIDE(set1_epi16)(1);
    if (bits == 4) {
        Ints one = no_ints(), two = no_ints();
        for (int i = 0; i < 4; i++) {
            one = WIDE(add_epi16)(one, WIDE(maddubs_epi16)(weights[i], four_bytes(x + 4 * i)));
            two = WIDE(add_epi16)(two, WIDE(maddubs_epi16)(weights[i + 4], four_bytes(x + 4 * i + 16)));
        }
        return WIDE(madd_epi16)(WIDE(add_epi16)(one, two), ones);
    }
    Ints sum = no_ints();
    for (int i = 0; i < 8; i++) {
        const Ints weight = WHOLE(xor)(weights[i], WIDE(set1_epi8)(-128));
        const Ints four = with_sign_of(weight, four_bytes(x + 4 * i));
        sum = plus_ints(sum, WIDE(madd_epi16)(WIDE(maddubs_epi16)(WIDE(abs_epi8)(weight), four), ones));
    }
    return sum;
}
#endif

#endif
