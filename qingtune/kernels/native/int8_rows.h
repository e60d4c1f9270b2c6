/* Rows rounded to int8, sums of int8 products scaled, and int8 weights widened: a part of elementwise.c. */

#ifndef INT8_ROWS_H
#define INT8_ROWS_H

#include "numbers.h"

/* Round a row, times its columns if it is scaled, to int8 with the largest at 127. A row with a number that is not finite
   gets no number as its scale, so that products show it. */
INLINE void quantize_row(const void *x, const float *columns, int8_t *packed, float *scale, int64_t width, int scaled,
                         int kind) {
    const float least = 1.17549435e-38f;
    float largest = 0.0f, poison = 0.0f;
#pragma omp simd reduction(max : largest) reduction(+ : poison)
    for (int64_t i = 0; i < width; i++) {
        const float number = get(x, i, kind) * (scaled ? columns[i] : 1.0f);
        largest = fabsf(number) > largest ? fabsf(number) : largest;
        poison += number * 0.0f;
    }
    const float step = largest / 127.0f + poison;
    *scale = step < least ? least : step;
    const float inverse = 1.0f / *scale;
#pragma omp simd
    for (int64_t i = 0; i < width; i++) {
        const float number = get(x, i, kind) * (scaled ? columns[i] : 1.0f);
        packed[i] = (int8_t)(int32_t)rintf(number * inverse);
    }
}

/* x [rows, width], columns fp32 [width] or none -> packed [rows, width] and scales [rows]. */
void quantize_rows(const char *x, const float *columns, int8_t *packed, float *scales, int64_t rows, int64_t width,
                   int64_t kind, int64_t threads) {
    PARALLEL
    for (int64_t t = 0; t < rows; t++) {
        const char *from = x + bytes(t, width, kind);
        int8_t *to = packed + t * width;
        if (columns) BY_KIND(quantize_row, kind, from, columns, to, scales + t, width, 1);
        else BY_KIND(quantize_row, kind, from, columns, to, scales + t, width, 0);
    }
}

INLINE void scale_row(const int32_t *sums, float scale, const float *columns, void *out, int64_t width, int scaled,
                      int add, int kind) {
#pragma omp simd
    for (int64_t i = 0; i < width; i++) {
        const float number = (float)sums[i] * (scaled ? columns[i] : 1.0f) * scale;
        put(out, i, add ? get(out, i, kind) + number : number, kind);
    }
}

/* out (+)= sums * scales * columns; sums and out [rows, width], scales fp32 [rows], columns fp32 [width] or none. */
void scale_sums(const int32_t *sums, const float *scales, const float *columns, char *out, int64_t rows, int64_t width,
                int64_t add, int64_t kind, int64_t threads) {
    PARALLEL
    for (int64_t t = 0; t < rows; t++) {
        const int32_t *from = sums + t * width;
        char *to = out + bytes(t, width, kind);
        if (columns && add) BY_KIND(scale_row, kind, from, scales[t], columns, to, width, 1, 1);
        else if (columns) BY_KIND(scale_row, kind, from, scales[t], columns, to, width, 1, 0);
        else if (add) BY_KIND(scale_row, kind, from, scales[t], columns, to, width, 0, 1);
        else BY_KIND(scale_row, kind, from, scales[t], columns, to, width, 0, 0);
    }
}

/* out = packed * scales: an int8 weight, [rows, width], as it is multiplied in another format. */
INLINE void widen_row(const int8_t *packed, float scale, void *out, int64_t width, int kind) {
#pragma omp simd
    for (int64_t i = 0; i < width; i++) put(out, i, (float)packed[i] * scale, kind);
}

void widen(const int8_t *packed, const float *scales, char *out, int64_t rows, int64_t width, int64_t kind,
           int64_t threads) {
    PARALLEL
    for (int64_t t = 0; t < rows; t++)
        BY_KIND(widen_row, kind, packed + t * width, scales[t], out + bytes(t, width, kind), width);
}

#endif
