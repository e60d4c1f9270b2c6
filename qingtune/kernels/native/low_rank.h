/* What the products of low_rank.c are made of: factors laid out in words, and tiles of sums in registers. */

#ifndef LOW_RANK_H
#define LOW_RANK_H

#include "numbers.h"
#include "simd.h"

/* Of the left factor at a time: with 2 vectors of the right one, 14 rows take 28 of 32 registers, 6 rows 12 of 16. */
#define ROWS (LANES == 16 ? 14 : 6)
#define PANEL (2 * LANES)

SIMD int64_t numbers_in(int64_t kind) { return kind == FP32 ? 1 : 2; } /* a word */

SIMD int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* --- Matrices in parts -------------------------------------------------------------------------------------------- */

/* Matrices of one width below one another; rows of each lie without gaps. */
typedef struct {
    float *const *parts;
    const int64_t *heights;
    int64_t count, width;
} Stack;

SIMD float *row_of(const Stack *stack, int64_t row) {
    int64_t part = 0;
    for (; part < stack->count && row >= stack->heights[part]; part++) row -= stack->heights[part];
    return part < stack->count ? stack->parts[part] + row * stack->width : NULL;
}

SIMD int64_t height_of(const Stack *stack) {
    int64_t sum = 0;
    for (int64_t part = 0; part < stack->count; part++) sum += stack->heights[part];
    return sum;
}

/* The right factor of a product: a stack's rows are the columns of the result (by_rows), or are summed over; times a
   scale. */
typedef struct {
    Stack stack;
    int64_t by_rows;
    float scale;
} Weight;

/* --- Layouts: a panel is [depth words, PANEL] --------------------------------------------------------------------- */

SIMD Floats load_some(const float *p, int64_t count) { /* 0 beyond `count` */
#if LANES == 16
    return _mm512_maskz_loadu_ps((__mmask16)((1u << count) - 1), p);
#else
    const Ints lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_maskload_ps(p, _mm256_cmpgt_epi32(every_int((int32_t)count), lanes));
#endif
}

SIMD Floats load_up_to(const float *p, int64_t count) {
    return count >= LANES ? load(p) : count > 0 ? load_some(p, count) : zeros();
}

#if BF16_UNITS
SIMD Floats rounded(Floats low, Floats high) { return (Floats)_mm512_cvtne2ps_pbh(high, low); }

/* Pairs of a number of each row, rounded: the upper half of a word is the second row's. */
SIMD Floats pairs_of(Floats first, Floats second) {
    const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(first));
    const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(second));
    return as_floats(either_bits(low, shifted_left(high, 16)));
}

SIMD __m512i load_bf16(const uint16_t *p, int64_t count) { /* 32 of them, 0 beyond `count` */
    return count >= 32 ? load_bytes(p) : _mm512_maskz_loadu_epi16((__mmask32)((1u << count) - 1), p);
}
#endif

/* The words of LANES rows that start at `row`, transposed; rows beyond the last one are 0. */
SIMD void lay_out_rows(const Weight *w, int64_t row, int64_t from, int64_t depth, float *panel, const int kind) {
    const Floats scale = every(w->scale);
    const float *rows[LANES];
    const int64_t numbers = depth * numbers_in(kind);
    for (int i = 0; i < LANES; i++) rows[i] = row_of(&w->stack, row + i);
    for (int64_t k = 0; k < depth; k += LANES) {
        Floats v[LANES];
        for (int i = 0; i < LANES; i++) {
            const int64_t at = k * numbers_in(kind), left = numbers - at;
            const float *p = rows[i] + from + at;
#if BF16_UNITS
            if (kind == BF16) {
                const Floats next = rows[i] ? load_up_to(p + LANES, left - LANES) : zeros();
                v[i] = rounded(times(rows[i] ? load_up_to(p, left) : zeros(), scale), times(next, scale));
                continue;
            }
#endif
            v[i] = times(rows[i] ? load_up_to(p, left) : zeros(), scale);
        }
        transpose(v);
        for (int i = 0; i < least(LANES, depth - k); i++) store(panel + (k + i) * PANEL, v[i]);
    }
}

/* The words of a panel of columns. */
SIMD void lay_out_columns(const Weight *w, int64_t column, int64_t from, int64_t depth, float *panel, const int kind) {
    const int64_t each = numbers_in(kind), count = w->stack.width - column;
    const Floats scale = every(w->scale);
    for (int64_t k = 0; k < depth; k++, panel += PANEL) {
        const float *first = row_of(&w->stack, from + k * each) + column;
#if BF16_UNITS
        if (kind == BF16) {
            const float *second = row_of(&w->stack, from + k * each + 1) + column;
            for (int i = 0; i < PANEL; i += LANES)
                store(panel + i, pairs_of(times(load_up_to(first + i, count - i), scale),
                                          times(load_up_to(second + i, count - i), scale)));
            continue;
        }
#endif
        for (int i = 0; i < PANEL; i += LANES) store(panel + i, times(load_up_to(first + i, count - i), scale));
    }
}

SIMD int64_t wide(const Weight *w) { return w->by_rows ? height_of(&w->stack) : w->stack.width; }
SIMD int64_t deep(const Weight *w) { return w->by_rows ? w->stack.width : height_of(&w->stack); }

/* Words `k` to `k + depth` of a panel that starts at column `n` of the result. */
SIMD void lay_out_kind(const Weight *w, int64_t n, int64_t k, int64_t depth, float *panel, const int kind) {
    const int64_t from = k * numbers_in(kind);
    if (!w->by_rows) lay_out_columns(w, n, from, depth, panel, kind);
    else
        for (int64_t i = 0; i < PANEL; i += LANES) lay_out_rows(w, n + i, from, depth, panel + i, kind);
}

static void lay_out(const Weight *w, int64_t n, int64_t k, int64_t depth, float *panel, int64_t kind) {
    BY_KIND(lay_out_kind, kind, w, n, k, depth, panel);
}

/* A panel of activations that are summed over their rows, of which there are none beyond `rows`; columns beyond `count`
   are 0. */
SIMD void interleave_kind(const char *x, int64_t stride, int64_t rows, int64_t count, int64_t depth, float *panel,
                          const int kind) {
#if BF16_UNITS
    if (kind == BF16) {
        const __m512i lower = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6,
                                               37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
        const __m512i upper = _mm512_add_epi16(lower, _mm512_set1_epi16(16));
        for (int64_t k = 0; k < depth; k++, panel += PANEL) {
            const uint16_t *row = (const uint16_t *)x + 2 * k * stride;
            const __m512i one = load_bf16(row, count);
            const __m512i two = 2 * k + 1 < rows ? load_bf16(row + stride, count) : no_ints();
            store(panel, as_floats(_mm512_permutex2var_epi16(one, lower, two)));
            store(panel + LANES, as_floats(_mm512_permutex2var_epi16(one, upper, two)));
        }
        return;
    }
#endif
    (void)rows, (void)kind;
    for (int64_t k = 0; k < depth; k++, panel += PANEL)
        for (int i = 0; i < PANEL; i += LANES) store(panel + i, load_up_to((const float *)x + k * stride + i, count - i));
}

static void interleave(const char *x, int64_t stride, int64_t rows, int64_t count, int64_t depth, float *panel,
                       int64_t kind) {
    BY_KIND(interleave_kind, kind, x, stride, rows, count, depth, panel);
}

/* --- Tiles -------------------------------------------------------------------------------------------------------- */

/* Words that a product takes one by one: those of a row follow one another, or those of a place that is summed over. */
typedef struct {
    const float *words;
    int64_t stride; /* of rows, or of places */
} Left;

/* What becomes of sums: y = sum or y = y + sum. */
enum { PUT, ADD };

SIMD Floats dots(Floats sum, Floats left, Floats right, const int kind) {
#if BF16_UNITS
    if (kind == BF16) return _mm512_dpbf16_ps(sum, (__m512bh)left, (__m512bh)right);
#endif
    (void)kind;
    return times_plus(left, right, sum);
}

/* What is added to bf16 starts the sums, and is on its way from memory while the tile before is finished; in fp32 it is
   added last, since each step would round it. */
SIMD Floats first_of(const char *y, int64_t i, const int what, const int kind) {
    return what == ADD && kind == BF16 ? from_bf16((const uint16_t *)y + i) : zeros();
}

SIMD void finish(char *y, const Floats *sum, float scale, const int vectors, const int what, const int kind) {
#if BF16_UNITS
    if (kind == BF16) {
        if (vectors == 2) _mm512_storeu_si512(y, (__m512i)_mm512_cvtne2ps_pbh(sum[1], sum[0]));
        else _mm256_storeu_si256((__m256i *)y, (__m256i)_mm512_cvtneps_pbh(sum[0]));
        return;
    }
#endif
    (void)kind;
    for (int v = 0; v < vectors; v++) {
        float *to = (float *)y + v * LANES;
        store(to, what == ADD ? times_plus(sum[v], every(scale), load(to)) : sum[v]);
    }
}

/* The rows of y that start at `to` (+)= the sums of a panel; those in fp32 are scaled before they are added. across: words
   of a place follow one another. */
SIMD void tile(const int count, const int vectors, Left left, const float *panel, int64_t depth, float scale,
               char *const *to, const int across, const int what, const int y_kind, const int kind) {
    Floats sum[ROWS][2];
    const float *at[(ROWS + 2) / 3]; /* every third row: an address holds no more than twice the stride */
    for (int i = 0; i < (count + 2) / 3; i++) at[i] = left.words + (across ? 0 : 3 * i * left.stride);
    for (int r = 0; r < count; r++)
        for (int v = 0; v < vectors; v++) sum[r][v] = first_of(to[r], v * LANES, what, y_kind);
    for (int64_t k = 0; k < depth; k++, panel += PANEL) {
        Floats right[2]; /* loads are kept apart from what uses them: a compiler would repeat each in its two products */
        for (int v = 0; v < vectors; v++) {
            right[v] = load(panel + v * LANES);
            __asm__("" : "+v"(right[v]));
        }
#pragma GCC unroll 16
        for (int r = 0; r < count; r++) {
            Floats same = every(across ? at[0][r] : at[r / 3][r % 3 * left.stride]);
            __asm__("" : "+v"(same));
            for (int v = 0; v < vectors; v++) sum[r][v] = dots(sum[r][v], same, right[v], kind);
        }
        for (int i = 0; i < (count + 2) / 3; i++) at[i] += across ? left.stride : 1;
    }
    for (int r = 0; r < count; r++) finish(to[r], sum[r], scale, vectors, what, y_kind);
}

#define CASE(n)                                                                                  \
    case n:                                                                                      \
        if (vectors == 2) tile(n, 2, left, panel, depth, scale, to, across, what, y_kind, kind); \
        else tile(n, 1, left, panel, depth, scale, to, across, what, y_kind, kind);     \
        return

SIMD void whole_tile(int64_t count, int64_t vectors, Left left, const float *panel, int64_t depth, float scale,
                     char *const *to, const int across, const int what, const int y_kind, const int kind) {
    switch (count) {
#if LANES == 16
        CASE(14); CASE(13); CASE(12); CASE(11); CASE(10); CASE(9); CASE(8); CASE(7);
#endif
        CASE(6); CASE(5); CASE(4); CASE(3); CASE(2); CASE(1);
    }
}

#endif
