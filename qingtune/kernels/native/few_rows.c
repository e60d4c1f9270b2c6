/* Products of a few rows in bf16 with a weight as it lies in memory, for CPUs with units for bf16: y = x W^T and y = x W.

   Libraries lay a weight out for their units first, which for the 10 to 100 rows of an expert takes as long as the
   product. Sums along the rows of W need no layout: the units add products of neighbours. Sums along its columns need
   two rows of W interleaved, which is done once for all rows of x. Sums are in fp32, in one order whatever the number of
   threads.

   Shapes: T rows of x, K numbers that are summed over, N numbers of a row of y. */

#include "simd.h"

#include <omp.h>

#define ROWS 6     /* of x at a time: with 4 vectors of W, 24 of 32 registers hold sums */
#define OUTS 4     /* rows of W at a time */
#define PANEL 64   /* columns of W at a time */
#define PANELS 4   /* that lie together in memory: so much of a row of W is read at once */
#define DEPTH 256  /* numbers summed over between two visits of the sums: a panel has 32 kB */
#define MOST 96  /* rows of x whose sums are held */

typedef uint16_t Half;

SIMD __m512bh halves(const Half *p) { return (__m512bh)_mm512_loadu_si512(p); }

/* --- y = x W^T ---------------------------------------------------------------------------------------------------- */

/* y [count, OUTS] (+)= x [count, K] w [OUTS, K]^T; meanwhile `ahead` rows at `next` are asked for. */
SIMD void dots(const int count, const Half *x, int64_t x_stride, const Half *w, int64_t deep, Half *y, int64_t y_stride,
               int add, const Half *next, int64_t ahead) {
    Floats sum[ROWS][OUTS];
    for (int r = 0; r < count; r++)
        for (int n = 0; n < OUTS; n++) sum[r][n] = zeros();
    for (int64_t k = 0; k < deep; k += 32) {
        __m512bh weights[OUTS];
        for (int n = 0; n < OUTS; n++) weights[n] = halves(w + n * deep + k);
        for (int64_t n = 0; n < ahead; n++) _mm_prefetch((const char *)(next + n * deep + k), _MM_HINT_T1);
        for (int r = 0; r < count; r++) {
            const __m512bh same = halves(x + r * x_stride + k);
            for (int n = 0; n < OUTS; n++) sum[r][n] = _mm512_dpbf16_ps(sum[r][n], same, weights[n]);
        }
    }
    for (int r = 0; r < count; r++) {
        __m128 four = sums_of(sum[r][0], sum[r][1], sum[r][2], sum[r][3]);
        Half *place = y + r * y_stride;
        if (add) four = _mm_add_ps(four, _mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(_mm_loadu_si64(place)), 16)));
        _mm_storeu_si64(place, (__m128i)_mm_cvtneps_pbh(four));
    }
}

#define CASE(n) \
    case n: dots(n, x, x_stride, w, deep, y, y_stride, add, next, ahead); return

static void some_dots(int64_t count, const Half *x, int64_t x_stride, const Half *w, int64_t deep, Half *y,
                      int64_t y_stride, int add, const Half *next, int64_t ahead) {
    switch (count) { CASE(6); CASE(5); CASE(4); CASE(3); CASE(2); CASE(1); }
}

#undef CASE

/* The numbers of y from .. to, by rows of W. */
static void by_rows(const Half *x, int64_t x_stride, int64_t rows, const Half *weight, int64_t deep, int64_t from,
                    int64_t to, Half *y, int64_t y_stride, int add) {
    const int64_t blocks = (rows + ROWS - 1) / ROWS;
    for (int64_t n = from; n < to; n += OUTS) {
        const Half *w = weight + n * deep, *next = w + OUTS * deep;
        for (int64_t b = 0; b < blocks; b++) {
            const int64_t first = rows * b / blocks, asked = OUTS * b / blocks, last = OUTS * (b + 1) / blocks;
            some_dots(rows * (b + 1) / blocks - first, x + first * x_stride, x_stride, w, deep,
                      y + first * y_stride + n, y_stride, add, next + asked * deep,
                      n + OUTS < to ? last - asked : 0);
        }
    }
}

/* --- y = x W ------------------------------------------------------------------------------------------------------ */

/* PANEL columns of `depth` rows of W, neighbours of two rows side by side: [depth / 2, 4, 32]. Each 8 columns are in
   two vectors, 4 in one and 4 in the other, as in_order has it. */
static void lay_out(const Half *w, int64_t stride, int64_t depth, Half *panel) {
    for (int64_t k = 0; k < depth; k += 2, panel += 2 * PANEL)
        for (int part = 0; part < 2; part++) {
            const Ints one = load_bytes(w + k * stride + 32 * part), two = load_bytes(w + (k + 1) * stride + 32 * part);
            _mm512_storeu_si512(panel + 64 * part, _mm512_unpacklo_epi16(one, two));
            _mm512_storeu_si512(panel + 64 * part + 32, _mm512_unpackhi_epi16(one, two));
        }
}

/* sums [count, PANEL] (+)= x [count, depth] panel; meanwhile the rows at `next` are asked for, a line of each. */
SIMD void outer(const int count, const Half *x, int64_t x_stride, const Half *panel, int64_t depth, float *sums,
                int more, const Half *next, int64_t stride) {
    Floats sum[ROWS][4];
    for (int r = 0; r < count; r++)
        for (int n = 0; n < 4; n++) sum[r][n] = more ? load(sums + r * PANEL * PANELS + n * LANES) : zeros();
    for (int64_t k = 0; k < depth; k += 2, panel += 2 * PANEL) {
        __m512bh weights[4];
        for (int n = 0; n < 4; n++) weights[n] = halves(panel + 32 * n);
        if (next) {
            _mm_prefetch((const char *)(next + k * stride), _MM_HINT_T1);
            _mm_prefetch((const char *)(next + (k + 1) * stride), _MM_HINT_T1);
        }
        for (int r = 0; r < count; r++) {
            int32_t pair;
            memcpy(&pair, x + r * x_stride + k, sizeof pair);
            const __m512bh same = (__m512bh)every_int(pair);
            for (int n = 0; n < 4; n++) sum[r][n] = _mm512_dpbf16_ps(sum[r][n], same, weights[n]);
        }
    }
    for (int r = 0; r < count; r++)
        for (int n = 0; n < 4; n++) store(sums + r * PANEL * PANELS + n * LANES, sum[r][n]);
}

#define CASE(n) \
    case n: outer(n, x, x_stride, panel, depth, sums, more, next, stride); return

static void some_outer(int64_t count, const Half *x, int64_t x_stride, const Half *panel, int64_t depth, float *sums,
                       int more, const Half *next, int64_t stride) {
    switch (count) { CASE(6); CASE(5); CASE(4); CASE(3); CASE(2); CASE(1); }
}

/* Sums of a row of a panel become numbers of y. */
static void finish(const float *sums, Half *y, int add) {
    const Ints first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    for (int part = 0; part < 2; part++, sums += 32, y += 32) {
        const Floats low = load(sums), high = load(sums + LANES);
        Floats one = _mm512_permutex2var_ps(low, first, high);
        Floats two = _mm512_permutex2var_ps(low, plus_ints(first, every_int(8)), high);
        if (add) {
            one = plus(one, from_bf16(y));
            two = plus(two, from_bf16(y + LANES));
        }
        _mm512_storeu_si512(y, (__m512i)_mm512_cvtne2ps_pbh(two, one));
    }
}

/* The numbers of y from .. to, by columns of W: PANELS panels at most. */
static void by_columns(const Half *x, int64_t x_stride, int64_t rows, const Half *w, int64_t wide, int64_t deep,
                       int64_t from, int64_t to, Half *y, int64_t y_stride, int add) {
    static _Thread_local float sums[MOST * PANEL * PANELS] __attribute__((aligned(64)));
    static _Thread_local Half panel[DEPTH * PANEL] __attribute__((aligned(64)));
    const int64_t blocks = (rows + ROWS - 1) / ROWS;
    for (int64_t k = 0; k < deep; k += DEPTH) {
        const int64_t depth = deep - k < DEPTH ? deep - k : DEPTH;
        for (int64_t n = from; n < to; n += PANEL) {
            lay_out(w + k * wide + n, wide, depth, panel);
            const Half *ahead = n + PANEL < to ? w + k * wide + n + PANEL : w + (k + DEPTH) * wide + from;
            const int there = n + PANEL < to || k + 2 * DEPTH <= deep;
            for (int64_t b = 0; b < blocks; b++) {
                const int64_t first = rows * b / blocks;
                some_outer(rows * (b + 1) / blocks - first, x + first * x_stride + k, x_stride, panel, depth,
                           sums + first * PANEL * PANELS + n - from, k > 0, there && b < 2 ? ahead + 32 * b : 0, wide);
            }
        }
    }
    for (int64_t r = 0; r < rows; r++)
        for (int64_t n = from; n < to; n += PANEL) finish(sums + r * PANEL * PANELS + n - from, y + r * y_stride + n, add);
}

/* --- Entry -------------------------------------------------------------------------------------------------------- */

/* y [T, N] (+)= x [T, K] by a weight [N, K] (rows_of_weight; N a multiple of 4, K of 32) or [K, N] (N of 64, K of 2); T
   up to MOST; strides of x and y in numbers. */
void few_rows(const Half *x, int64_t x_stride, int64_t rows, const Half *weight, int64_t rows_of_weight, int64_t wide,
              int64_t deep, Half *y, int64_t y_stride, int64_t add, int64_t threads) {
    const int64_t step = rows_of_weight ? OUTS : PANEL, steps = wide / step;
#pragma omp parallel num_threads(threads)
    {
        const int64_t me = omp_get_thread_num(), all = omp_get_num_threads();
        const int64_t first = steps * me / all * step, last = steps * (me + 1) / all * step;
        if (rows_of_weight) by_rows(x, x_stride, rows, weight, deep, first, last, y, y_stride, (int)add);
        else
            for (int64_t n = first; n < last; n += PANEL * PANELS)
                by_columns(x, x_stride, rows, weight, wide, deep, n, n + PANEL * PANELS < last ? n + PANEL * PANELS : last,
                           y, y_stride, (int)add);
    }
}
