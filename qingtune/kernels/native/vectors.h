/* Vectors of fp32 numbers, 16 with AVX-512 and 8 with AVX2, for products of matrices. */

#ifndef VECTORS_H
#define VECTORS_H

#include <immintrin.h>
#include <stdint.h>

#define INLINE static inline __attribute__((always_inline))

#ifdef __AVX512F__
typedef __m512 Vector;
#define LANES 16
#define ROWS 14 /* of x at a time: with 2 vectors of W their sums take 28 of 32 registers, with 6 rows 12 of 16 */
#define LOAD _mm512_loadu_ps
#define STORE _mm512_storeu_ps
#define ALL _mm512_set1_ps
#define MULTIPLY_ADD _mm512_fmadd_ps
#define ZERO _mm512_setzero_ps()
#else
typedef __m256 Vector;
#define LANES 8
#define ROWS 6
#define LOAD _mm256_loadu_ps
#define STORE _mm256_storeu_ps
#define ALL _mm256_set1_ps
#define MULTIPLY_ADD _mm256_fmadd_ps
#define ZERO _mm256_setzero_ps()
#endif

/* Rows of a square of LANES x LANES numbers become its columns. */
#ifdef __AVX512F__
#define PAIRS(low_or_high, a, b) \
    _mm512_castpd_ps(_mm512_unpack##low_or_high##_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)))
INLINE void transpose(Vector *v) {
    Vector t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_ps(v[i], v[i + 1]);
        t[i + 1] = _mm512_unpackhi_ps(v[i], v[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            v[i + 2 * j] = PAIRS(lo, t[i + j], t[i + j + 2]);
            v[i + 2 * j + 1] = PAIRS(hi, t[i + j], t[i + j + 2]);
        }
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
#else
INLINE void transpose(Vector *v) {
    Vector t[8];
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_ps(v[i], v[i + 1]);
        t[i + 1] = _mm256_unpackhi_ps(v[i], v[i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; j++) {
            v[i + 2 * j] = _mm256_shuffle_ps(t[i + j], t[i + j + 2], 0x44);
            v[i + 2 * j + 1] = _mm256_shuffle_ps(t[i + j], t[i + j + 2], 0xee);
        }
    for (int j = 0; j < 4; j++) {
        t[j] = _mm256_permute2f128_ps(v[j], v[j + 4], 0x20);
        t[j + 4] = _mm256_permute2f128_ps(v[j], v[j + 4], 0x31);
    }
    for (int j = 0; j < 8; j++) v[j] = t[j];
}
#endif

#endif
