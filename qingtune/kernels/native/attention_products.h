/* Products of attention's tiles, of fp32 numbers or of bf16 ones in pairs, with sums in fp32.

   Factors are made of words: a number, or a pair of numbers that a dot product of two takes. W words hold the D numbers of
   a head, which are filled up with zeros to a multiple of 32. A tile has TILE rows. */

#ifndef ATTENTION_PRODUCTS_H
#define ATTENTION_PRODUCTS_H

#include "numbers.h"
#include "simd.h"

/* Rows of a product by 2 vectors of each, as many sums as keep the units busy; TILE is a multiple of both. */
#if LANES == 16
enum { STRIP = 8, TILE = 64 };
#else
enum { STRIP = 6, TILE = 48 };
#endif
enum { VECTORS = 2, COLUMNS = VECTORS * LANES };

#if BF16_UNITS
#define DOTS(sum, left, right) _mm512_dpbf16_ps(sum, (__m512bh)(left), (__m512bh)(right))
#else
#define DOTS(sum, left, right) times_plus(left, right, sum)
#endif

INLINE int64_t smallest(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t within(int64_t x, int64_t least, int64_t most) { return x < least ? least : smallest(x, most); }
INLINE int64_t filled(int64_t count, int64_t multiple) { return (count + multiple - 1) / multiple * multiple; }

/* --- Layouts ------------------------------------------------------------------------------------------------------ */

/* A row of `size` numbers of kind, filled up with zeros to `words`; none for no row. */
INLINE void copy_row(const char *row, int64_t size, int64_t words, float *to, int64_t kind) {
    const int64_t taken = row ? bytes(1, size, kind) : 0;
    if (taken) memcpy(to, row, (size_t)taken);
    memset((char *)to + taken, 0, (size_t)(words * 4 - taken));
}

/* [TILE, words] -> [words, TILE]; words are a multiple of 16. */
static void turn(const float *x, int64_t words, float *to) {
    for (int64_t c = 0; c < words; c += LANES)
        for (int64_t r = 0; r < TILE; r += LANES) {
            Floats v[LANES];
            for (int i = 0; i < LANES; i++) v[i] = load(x + (r + i) * words + c);
            transpose(v);
            for (int i = 0; i < LANES; i++) store(to + (c + i) * TILE + r, v[i]);
        }
}

#if BF16_UNITS
/* 16 numbers each of two rows -> 16 pairs. */
INLINE Floats paired(Floats first, Floats second) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return (Floats)_mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(second, first));
}

/* Rows of numbers, [TILE, words] of pairs along a row -> [TILE / 2, 2 words] of pairs of two rows. */
static void pair_rows(const float *x, int64_t words, float *to) {
    const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5,
                                         36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    for (int64_t r = 0; r < TILE; r += 2)
        for (int64_t c = 0; c < words; c += 16) {
            const __m512i one = as_ints(load(x + r * words + c)), two = as_ints(load(x + (r + 1) * words + c));
            store(to + r * words + 2 * c, as_floats(_mm512_permutex2var_epi16(one, low, two)));
            store(to + r * words + 2 * c + 16, as_floats(_mm512_permutex2var_epi16(one, high, two)));
        }
}
#endif

/* Rows [TILE, words] as a factor that is summed over its rows: [TILE, D] in fp32, [TILE / 2, D] in pairs. */
static void by_rows(const float *x, int64_t words, float *to, int narrow) {
#if BF16_UNITS
    if (narrow) {
        pair_rows(x, words, to);
        return;
    }
#endif
    (void)narrow;
    memcpy(to, x, (size_t)(TILE * words) * 4);
}

/* --- Products ----------------------------------------------------------------------------------------------------- */

/* y [rows <= STRIP, COLUMNS] (+)= what words `from` to `to` of both factors sum up to. Rows of the left factor lie
   `stride` apart, or are its columns (`across`), words of a row then lying so far apart. */
INLINE void strip_product(const float *left, int64_t stride, const int across, const float *right, int64_t right_stride,
                          int64_t from, int64_t to, float *y, int64_t y_stride, int64_t rows, int add,
                          const int narrow) {
    Floats sum[STRIP][VECTORS];
    for (int r = 0; r < STRIP; r++)
        for (int v = 0; v < VECTORS; v++) sum[r][v] = add && r < rows ? load(y + r * y_stride + v * LANES) : zeros();
    for (int64_t k = from; k < to; k++) {
        Floats words[VECTORS];
        for (int v = 0; v < VECTORS; v++) words[v] = load(right + k * right_stride + v * LANES);
        for (int r = 0; r < STRIP; r++) {
            const Floats same = every(across ? left[k * stride + r] : left[r * stride + k]);
            for (int v = 0; v < VECTORS; v++)
                sum[r][v] = narrow ? DOTS(sum[r][v], same, words[v]) : times_plus(same, words[v], sum[r][v]);
        }
    }
    for (int r = 0; r < STRIP; r++)
        for (int v = 0; v < VECTORS; v++)
            if (r < rows) store(y + r * y_stride + v * LANES, sum[r][v]);
}

#endif
