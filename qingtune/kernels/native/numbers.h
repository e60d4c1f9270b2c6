/* Numbers of the kernels in C, fp32 or bf16 in memory as `kind` says, and fp32 in between. */

#ifndef NUMBERS_H
#define NUMBERS_H

#include <math.h>
#include <stdint.h>
#include <string.h>

enum { FP32, BF16 };

#define INLINE static inline __attribute__((always_inline))
/* A call with its last argument, the kind, as a constant: inside of a parallel region, where none passes from without. */
#define BY_KIND(function, kind, ...) \
    do { \
        if ((kind) == FP32) function(__VA_ARGS__, FP32); \
        else function(__VA_ARGS__, BF16); \
    } while (0)
#define PARALLEL _Pragma("omp parallel for num_threads((int)threads)")

INLINE float of_bits(uint32_t bits) {
    float number;
    memcpy(&number, &bits, 4);
    return number;
}

INLINE uint32_t to_bits(float number) {
    uint32_t bits;
    memcpy(&bits, &number, 4);
    return bits;
}

INLINE float get(const void *numbers, int64_t i, int kind) {
    return kind == FP32 ? ((const float *)numbers)[i] : of_bits((uint32_t)((const uint16_t *)numbers)[i] << 16);
}

INLINE void put(void *numbers, int64_t i, float number, int kind) {
    const uint32_t bits = to_bits(number), nearest_even = bits + 0x7fffu + (bits >> 16 & 1);
    if (kind == FP32) ((float *)numbers)[i] = number;
    else ((uint16_t *)numbers)[i] = (uint16_t)((number != number ? 0x7fc00000u : nearest_even) >> 16);
}

/* Where a row begins. */
INLINE int64_t bytes(int64_t row, int64_t width, int64_t kind) { return row * width * (kind == FP32 ? 4 : 2); }

/* e^x for x <= 0 to 2 units in the last place, 0 where it is below the least normal number; polynomial of Cephes' expf on
   [-log(2) / 2, log(2) / 2]. */
INLINE float exponential(float x) {
    const float shift = 12583039.0f; /* 1.5 * 2^23 + 127: what is added to it becomes an integer, in the lowest bits */
    const float shifted = x * 1.44269504f + shift, n = shifted - shift;
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + (r + 1.0f);
    const float power = p * of_bits(to_bits(shifted) << 23);
    return x < -87.3f ? 0.0f : power; /* where 2^n has no bits */
}

/* The factor of RMSNorm on a row. */
INLINE float inverse_length(const void *x, int64_t width, float epsilon, int kind) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < width; i++) sum += get(x, i, kind) * get(x, i, kind);
    return 1.0f / sqrtf(sum / (float)width + epsilon);
}

#endif
