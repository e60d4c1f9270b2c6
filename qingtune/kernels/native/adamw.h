/* AdamW with moments in 8 bits, a part of elementwise.c. */

#ifndef ADAMW_H
#define ADAMW_H

#include "numbers.h"

/* beta1 and beta2, 1 - beta^step of both, epsilon, the factor of the weight decay, the learning rate. */
typedef struct {
    float beta1, beta2, seen1, seen2, epsilon, decay, rate;
} Adam;

enum { BLOCK = 256 };

/* A block of up to 256 weights, as in training/adamw8bit.py; noise is uniform in [0, 1), of the first moment, the second
   and the weights. */
INLINE void adamw_block(void *weights, const void *grads, int8_t *first_code, float *first_largest,
                        uint8_t *second_code, float *second_largest, const float *noise_first,
                        const float *noise_second, const float *noise, int64_t count, const Adam *a, int kind) {
    const float least = 1.17549435e-38f, kept1 = 1.0f - a->beta1, kept2 = 1.0f - a->beta2;
    float first[BLOCK], rooted[BLOCK], grad[BLOCK] = {0}; /* of the second moment its square root, all that is used of it */
    for (int64_t i = 0; i < count; i++) grad[i] = get(grads, i, kind);
    const float scale1 = *first_largest, scale2 = *second_largest;
    float largest1 = 0.0f, largest2 = 0.0f;
#pragma omp simd reduction(max : largest1, largest2)
    for (int64_t i = 0; i < BLOCK; i++) {
        const float root = (float)first_code[i] * (1.0f / 127.0f), square = (float)second_code[i] * (1.0f / 255.0f);
        const float old = root * fabsf(root) * scale1;
        first[i] = old + kept1 * (grad[i] - old);
        const float second = square * square * (square * square) * scale2 * a->beta2 + kept2 * grad[i] * grad[i];
        rooted[i] = sqrtf(second);
        largest1 = fabsf(first[i]) > largest1 ? fabsf(first[i]) : largest1;
        largest2 = second > largest2 ? second : largest2;
    }
    *first_largest = largest1;
    *second_largest = largest2;
    const float bound1 = largest1 < least ? least : largest1, bound2 = largest2 < least ? least : largest2;
    const float inverse2 = 1.0f / sqrtf(bound2), seen = 1.0f / sqrtf(a->seen2), pace = a->rate / a->seen1;
#pragma omp simd
    for (int64_t i = 0; i < BLOCK; i++) {
        const float share = fabsf(first[i] / bound1) * 16129.0f, below = floorf(sqrtf(share));
        const float up = noise_first[i] * (2.0f * below + 1.0f) < share - below * below ? 1.0f : 0.0f;
        const float code = below + up > 127.0f ? 127.0f : below + up;
        first_code[i] = (int8_t)(int32_t)(first[i] < 0.0f ? -code : code);
        const float root = sqrtf(rooted[i] * inverse2) * 255.0f, rounded = floorf(root + noise_second[i]);
        const float positive = root > 0.0f && rounded < 1.0f ? 1.0f : rounded;
        second_code[i] = (uint8_t)(int32_t)(positive > 255.0f ? 255.0f : positive);
    }
#pragma omp simd
    for (int64_t i = 0; i < count; i++) {
        const float move = first[i] / (rooted[i] * seen + a->epsilon);
        const float moved = get(weights, i, kind) * a->decay - pace * move;
        if (kind == FP32) ((float *)weights)[i] = moved;
        else ((uint16_t *)weights)[i] = (uint16_t)((to_bits(moved) + (uint32_t)(int32_t)(noise[i] * 65536.0f)) >> 16);
    }
}

/* Update weights by their gradients; codes [blocks, 256], largest [blocks]; the last block may be longer than what is
   left of the weights. */
void adamw8bit(char *weights, const char *grads, int8_t *first_code, float *first_largest, uint8_t *second_code,
               float *second_largest, const float *noise_first, const float *noise_second, const float *noise,
               int64_t count, float beta1, float beta2, float seen1, float seen2, float epsilon, float decay, float rate,
               int64_t kind, int64_t threads) {
    const Adam a = {beta1, beta2, seen1, seen2, epsilon, decay, rate};
    PARALLEL
    for (int64_t start = 0; start < count; start += BLOCK) {
        const int64_t place = bytes(1, start, kind), left = count - start < BLOCK ? count - start : BLOCK;
        BY_KIND(adamw_block, kind, weights + place, grads + place, first_code + start, first_largest + start / BLOCK,
                second_code + start, second_largest + start / BLOCK, noise_first + start, noise_second + start,
                noise + start, left, &a);
    }
}

#endif
