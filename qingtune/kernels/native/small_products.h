/* Products of matrices that lie in the caches, of fp32 numbers or of numbers rounded to bf16, with sums in fp32.

   Both factors are laid out in words, one row for each place that is summed over, or with bf16 for each two: a word is a
   number, or a pair of numbers that a dot product of two takes. So one product serves all four kinds of transposition,
   and a factor that is laid out once may stand on both sides.

   All sizes are multiples of 16. */

#ifndef SMALL_PRODUCTS_H
#define SMALL_PRODUCTS_H

#include "numbers.h"
#include "simd.h"

#if BF16_UNITS
#define DOTS(sum, left, right) _mm512_dpbf16_ps(sum, (__m512bh)(left), (__m512bh)(right))
#else
#define DOTS(sum, left, right) times_plus(left, right, sum)
#endif
/* Rows of a tile, by 2 vectors of each: as many sums as keep the units busy. One at a diagonal divides 16. */
#if LANES == 16
#define TALL 8
#define TALLEST 8
#else
#define TALL 4
#define TALLEST 6
#endif

/* Words, and how many there are from one row of them to the next. */
typedef struct {
    const float *words;
    int64_t stride;
} Factor;

/* Which entries count: of the left factor those on one side of its diagonal, or of the result those on the lower one. */
typedef enum { ALL_ENTRIES, LEFT_LOWER, LEFT_UPPER, RESULT_LOWER } Shape;

/* --- Layouts ------------------------------------------------------------------------------------------------------ */

#if BF16_UNITS
/* 16 numbers each of two rows -> 16 pairs. */
INLINE __m512i paired(Floats first, Floats second) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(second, first));
}

static void pair_columns(const float *x, int64_t rows, int64_t width, float *to) {
    for (int64_t c = 0; c < width; c += 32)
        for (int64_t r = 0; r < rows; r += 16) {
            const int whole = width - c >= 32;
            Floats v[16];
            for (int i = 0; i < 16; i++) {
                const float *from = x + (r + i) * width + c;
                v[i] = (Floats)_mm512_cvtne2ps_pbh(whole ? load(from + 16) : zeros(), load(from));
            }
            transpose(v);
            for (int i = 0; i < (whole ? 16 : 8); i++) store(to + (c / 2 + i) * rows + r, v[i]);
        }
}
#endif

/* x [rows, width] as a factor that is summed over its rows; in fp32 x itself. */
static Factor by_rows(const float *x, int64_t rows, int64_t width, float *to, int narrow) {
#if BF16_UNITS
    if (narrow) {
        for (int64_t r = 0; r < rows; r += 2)
            for (int64_t c = 0; c < width; c += 16)
                store(to + r / 2 * width + c,
                      (Floats)paired(load(x + r * width + c), load(x + (r + 1) * width + c)));
        return (Factor){to, width};
    }
#endif
    (void)rows, (void)to, (void)narrow;
    return (Factor){x, width};
}

/* The same, to be summed over its columns. */
static Factor by_columns(const float *x, int64_t rows, int64_t width, float *to, int narrow) {
#if BF16_UNITS
    if (narrow) {
        pair_columns(x, rows, width, to);
        return (Factor){to, rows};
    }
#endif
    (void)narrow;
    for (int64_t c = 0; c < width; c += LANES)
        for (int64_t r = 0; r < rows; r += LANES) {
            Floats v[LANES];
            for (int i = 0; i < LANES; i++) v[i] = load(x + (r + i) * width + c);
            transpose(v);
            for (int i = 0; i < LANES; i++) store(to + (c + i) * rows + r, v[i]);
        }
    return (Factor){to, rows};
}

/* --- Products ----------------------------------------------------------------------------------------------------- */

/* y [rows, vectors] (+)= what words `from` to `to` of both sum up to. */
INLINE void small_tile(Factor left, Factor right, int64_t from, int64_t to, float *y, int64_t y_stride, int add,
                       const int rows, const int vectors, const int narrow) {
    Floats sum[TALLEST][2];
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++) sum[r][v] = add ? load(y + r * y_stride + v * LANES) : zeros();
    for (int64_t k = from; k < to; k++) {
        const float *column = left.words + k * left.stride, *row = right.words + k * right.stride;
        Floats words[2];
        for (int v = 0; v < vectors; v++) words[v] = load(row + v * LANES);
        for (int r = 0; r < rows; r++) {
            const Floats same = every(column[r]);
            for (int v = 0; v < vectors; v++)
                sum[r][v] = narrow ? DOTS(sum[r][v], same, words[v]) : times_plus(same, words[v], sum[r][v]);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++) store(y + r * y_stride + v * LANES, sum[r][v]);
}

/* A tile of as many vectors as y has left. */
INLINE void edge_tile(Factor left, Factor right, int64_t from, int64_t to, float *y, int64_t y_stride, int add,
                      const int rows, int64_t width, const int narrow) {
    if (width >= 2 * LANES) small_tile(left, right, from, to, y, y_stride, add, rows, 2, narrow);
    else small_tile(left, right, from, to, y, y_stride, add, rows, 1, narrow);
}

INLINE void small_product(Factor left, Factor right, int64_t rows, int64_t width, int64_t depth, float *y, int add,
                          Shape shape, const int narrow) {
    const int64_t each = narrow ? 2 : 1;
    for (int64_t c = 0; c < width; c += 2 * LANES) {
        const Factor wide = {right.words + c, right.stride};
        int64_t r = 0;
        for (; shape == ALL_ENTRIES && r + TALLEST <= rows; r += TALLEST)
            edge_tile((Factor){left.words + r, left.stride}, wide, 0, depth / each, y + r * width + c, width, add, TALLEST,
                      width - c, narrow);
        for (; r + TALL <= rows; r += TALL) {
            if (shape == RESULT_LOWER && c >= r + TALL) continue;
            const int64_t from = shape == LEFT_UPPER ? r / each : 0;
            const int64_t to = (shape == LEFT_LOWER ? r + TALL : depth) / each;
            edge_tile((Factor){left.words + r, left.stride}, wide, from, to, y + r * width + c, width, add, TALL, width - c,
                      narrow);
        }
        if (r < rows) /* 6 and 4 leave 2 */
            edge_tile((Factor){left.words + r, left.stride}, wide, 0, depth / each, y + r * width + c, width, add, 2,
                      width - c, narrow);
    }
}

/* y [rows, width] (+)= the sum of the products of both factors over `depth` places. */
static void product(Factor left, Factor right, int64_t rows, int64_t width, int64_t depth, float *y, int add,
                    Shape shape, int narrow) {
    if (BF16_UNITS && narrow) small_product(left, right, rows, width, depth, y, add, shape, 1);
    else small_product(left, right, rows, width, depth, y, add, shape, 0);
}

#endif
