/* Products of int8 matrices with a scale a row of the left one and a column of the right one, by the CPU's units for
   bytes (VNNI) or, without them, as pairs of 16 bits: y (+)= scales (q W) columns.

   A block of the weight is laid out in panels that the L2 cache holds; all rows of q then go through it, a few at a time
   (Goto & van de Geijn 2008, Anatomy of high-performance matrix multiplication). Sums are exact integers, scaled as soon
   as they are whole, so that neither blocks nor threads change a result.

   The units multiply unsigned by signed bytes: weights have 128 added to each, and each sum starts at -128 times the sum
   of its row of q.

   Shapes: T rows of q, K numbers that are summed over, N numbers of a row of y. */

#include "simd.h"

#include <math.h>
#include <omp.h>
#include <string.h>

#if INT8_UNITS
typedef int8_t Number; /* of q and of weights, as they are multiplied */
#else
typedef int16_t Number;
#endif
#define GROUP (4 / (int64_t)sizeof(Number)) /* numbers of a sum that a lane multiplies at a time */
#define CHUNK (LANES * GROUP)               /* numbers of a row of q that lie side by side: as many as a register holds */
#define ROWS (LANES == 16 ? 14 : 6)         /* of q at a time; with 2 registers of weights their sums fill the registers */
#define PANEL (2 * LANES)                   /* numbers of a row of y that are summed at a time */
#define BLOCK 393216                        /* bytes of weights that all rows of q go through, if a panel is no larger */

enum { FP32, BF16 };

/* --- The units, or pairs of 16 bits ------------------------------------------------------------------------------ */

#if INT8_UNITS
SIMD Ints plus_products(Ints sum, Ints weights, Ints q) { return WIDE(dpbusd_epi32)(sum, weights, q); }
SIMD Ints from_row(const int8_t *p) { return load_bytes(p); }
SIMD Ints stored(Ints weights) { return WHOLE(xor)(weights, WIDE(set1_epi8)(-128)); }
#else
SIMD Ints plus_products(Ints sum, Ints weights, Ints q) { return plus_ints(sum, WIDE(madd_epi16)(weights, q)); }
SIMD Ints from_row(const int8_t *p) { return WIDE(cvtepi8_epi16)(load_halves(p)); }
SIMD Ints stored(Ints weights) { return weights; }
#endif

/* --- Weights ----------------------------------------------------------------------------------------------------- */

/* int8 [N, K] where its rows are the panels', else [K, N]. A panel is [K / GROUP, PANEL, GROUP]. */
typedef struct {
    const int8_t *numbers;
    int64_t by_rows, wide, deep;
} Weight;

/* A panel of the rows of W that start at w; what is beyond `count` rows is 0. */
static void lay_out_rows(const int8_t *w, int64_t stride, int64_t count, int64_t depth, Number *panel) {
    int8_t rest[CHUNK];
    for (int64_t half = 0; half < PANEL; half += LANES)
        for (int64_t k = 0; k < depth; k += CHUNK) {
            const int64_t left = depth - k, words = left < CHUNK ? (left + GROUP - 1) / GROUP : LANES;
            Floats v[LANES];
            for (int i = 0; i < LANES; i++) {
                const int8_t *from = w + (half + i) * stride + k;
                _mm_prefetch((const char *)from + LANES * stride, _MM_HINT_T0); /* of the next half, or panel */
                if (half + i < count && left >= CHUNK) {
                    v[i] = as_floats(from_row(from));
                    continue;
                }
                memset(rest, 0, sizeof rest);
                if (half + i < count) memcpy(rest, from, (size_t)left);
                v[i] = as_floats(from_row(rest));
            }
            transpose(v);
            for (int i = 0; i < words; i++)
                store((float *)(panel + ((k / GROUP + i) * PANEL + half) * GROUP), as_floats(stored(as_ints(v[i]))));
        }
}

/* 16 columns of GROUP rows, of which `count` are there, side by side; rows begin `stride` numbers apart. */
SIMD void lay_out_group(const int8_t *w, int64_t stride, int64_t rows, int64_t count, Number *to) {
    __m128i row[GROUP];
    for (int i = 0; i < GROUP; i++) {
        row[i] = _mm_setzero_si128();
        if (i >= rows || count <= 0) continue;
        if (count >= 16) row[i] = _mm_loadu_si128((const __m128i *)(w + i * stride));
        else memcpy(&row[i], w + i * stride, (size_t)count);
    }
    const __m128i low = _mm_unpacklo_epi8(row[0], row[1]), high = _mm_unpackhi_epi8(row[0], row[1]);
#if INT8_UNITS
    const __m128i next = _mm_unpacklo_epi8(row[2], row[3]), last = _mm_unpackhi_epi8(row[2], row[3]);
    const __m128i words[4] = {_mm_unpacklo_epi16(low, next), _mm_unpackhi_epi16(low, next),
                              _mm_unpacklo_epi16(high, last), _mm_unpackhi_epi16(high, last)};
    for (int i = 0; i < 4; i++)
        _mm_storeu_si128((__m128i *)to + i, _mm_xor_si128(words[i], _mm_set1_epi8(-128)));
#else
    _mm256_storeu_si256((__m256i *)to, _mm256_cvtepi8_epi16(low));
    _mm256_storeu_si256((__m256i *)to + 1, _mm256_cvtepi8_epi16(high));
#endif
}

/* Panels of the columns of W that start at w, `size` numbers each; a row goes to all of them, so that it is read once. */
static void lay_out_columns(const int8_t *w, int64_t stride, int64_t count, int64_t depth, int64_t panels, int64_t size,
                            Number *to) {
    for (int64_t k = 0; k < depth; k += GROUP)
        for (int64_t first = 0; first < panels * PANEL; first += 16) {
            if (first % 64 == 0)
                for (int i = 0; i < GROUP; i++)
                    _mm_prefetch((const char *)w + (k + 4 * GROUP + i) * stride + first, _MM_HINT_T0);
            lay_out_group(w + k * stride + first, stride, depth - k, count - first,
                          to + first / PANEL * size + k * PANEL + first % PANEL * GROUP);
        }
}

/* Panels [p, end), `size` numbers each. */
static void lay_out(const Weight *w, int64_t p, int64_t end, int64_t size, Number *to) {
    if (!w->by_rows) lay_out_columns(w->numbers + p * PANEL, w->wide, w->wide - p * PANEL, w->deep, end - p, size, to);
    for (; w->by_rows && p < end; p++, to += size)
        lay_out_rows(w->numbers + p * PANEL * w->deep, w->deep, w->wide - p * PANEL, w->deep, to);
}

/* --- Rows -------------------------------------------------------------------------------------------------------- */

/* Rows of q as they are multiplied. */
typedef struct {
    Number *numbers; /* [T / ROWS, K / CHUNK, ROWS, CHUNK], zeros after those of a row */
    int32_t *starts; /* [T], what sums start at */
    int64_t count, deep;
} Rows;

SIMD int64_t chunks(int64_t deep) { return (deep + CHUNK - 1) / CHUNK; }
SIMD Number *tile_of(const Rows *rows, int64_t t) { return rows->numbers + t / ROWS * ROWS * chunks(rows->deep) * CHUNK; }

static void take_row(const int8_t *q, const Rows *rows, int64_t t) {
    Number *to = tile_of(rows, t) + t % ROWS * CHUNK;
    Ints sum = no_ints();
    for (int64_t k = 0; k < rows->deep; k += CHUNK, to += ROWS * CHUNK) {
        const int64_t left = rows->deep - k;
        int8_t rest[CHUNK] = {0};
        if (left < CHUNK) memcpy(rest, q + k, (size_t)left);
        const Ints numbers = from_row(left < CHUNK ? rest : q + k);
        store((float *)to, as_floats(numbers));
        if (INT8_UNITS) sum = plus_products(sum, WIDE(set1_epi8)(1), numbers);
    }
    rows->starts[t] = INT8_UNITS ? -128 * (int32_t)sum_of(from_ints(sum)) : 0;
}

/* --- Products ---------------------------------------------------------------------------------------------------- */

#define EACH_ROW _Pragma("GCC unroll 16") for (int r = 0; r < count; r++)
/* Both sums += products. Nothing moves over a barrier: registers are all in use. */
SIMD void two_products(Ints *one, Ints *two, Ints left, Ints right, Ints q) {
#if !INT8_UNITS && LANES == 8
    Ints product; /* with only 16 registers */
    __asm__("vpmaddwd %4, %2, %3\n\tvpaddd %3, %0, %0\n\tvpmaddwd %5, %2, %2\n\tvpaddd %2, %1, %1"
            : "+x"(*one), "+x"(*two), "+x"(q), "=&x"(product)
            : "x"(left), "x"(right));
#else
    *one = plus_products(*one, left, q);
    *two = plus_products(*two, right, q);
#endif
    __asm__ volatile("" : "+v"(*one), "+v"(*two));
}

#define STEP(j)                                                                                        \
    do {                                                                                               \
        Ints left = load_bytes(panel + (j) * PANEL * GROUP);                                           \
        Ints right = load_bytes(panel + ((j) * PANEL + LANES) * GROUP);                                \
        __asm__ volatile("" : "+v"(left), "+v"(right)); /* loaded once, not again by each product */            \
        EACH_ROW {                                                                                     \
            Ints same = four_bytes((const int8_t *)(q + r * CHUNK + (j) * GROUP));                    \
            two_products(&sum[r][0], &sum[r][1], left, right, same);                                   \
        }                                                                                              \
    } while (0)

/* sums [count, PANEL] = q by a panel of so many groups. */
SIMD void tile(const int count, const Number *rows, const int32_t *starts, const Number *panel, int64_t groups,
               int32_t *sums) {
    Ints sum[ROWS][2];
    EACH_ROW sum[r][0] = sum[r][1] = every_int(starts[r]);
    for (; groups > 0; groups -= LANES, rows += ROWS * CHUNK) {
        const Number *q = rows;
        int64_t steps = groups < LANES ? groups : LANES;
        for (; steps >= 4; steps -= 4, panel += 4 * PANEL * GROUP, q += 4 * GROUP) {
            STEP(0);
            STEP(1);
            STEP(2);
            STEP(3);
        }
        for (; steps > 0; steps--, panel += PANEL * GROUP, q += GROUP) STEP(0);
    }
    EACH_ROW {
        store((float *)(sums + r * PANEL), as_floats(sum[r][0]));
        store((float *)(sums + r * PANEL + LANES), as_floats(sum[r][1]));
    }
}

#define CASE(n) \
    case n: tile(n, rows, starts, panel, groups, sums); return

static void any_tile(int64_t count, const Number *rows, const int32_t *starts, const Number *panel, int64_t groups,
                     int32_t *sums) {
    switch (count) {
#if LANES == 16
        CASE(14); CASE(13); CASE(12); CASE(11); CASE(10); CASE(9); CASE(8); CASE(7);
#endif
        CASE(6); CASE(5); CASE(4); CASE(3); CASE(2); CASE(1);
    }
}

/* y [T, N], rows `stride` numbers apart. */
typedef struct {
    char *y;
    int64_t stride, kind, add;
    const float *scales, *columns; /* [T], and [N] or NULL */
} Target;

/* Scale as many sums as there are lanes, and put or add them from y on. */
SIMD void finish_lanes(const int32_t *sums, float scale, const float *columns, void *y, int add, const int kind) {
    Floats value = from_ints(load_bytes(sums));
    if (columns) value = times(value, load(columns));
    if (add) value = times_plus(value, every(scale), kind == FP32 ? load(y) : from_bf16(y));
    else value = times(value, every(scale));
    if (kind == FP32) store(y, value);
    else to_bf16(y, value);
}

/* The same of the first `width` sums of a row. */
SIMD void finish_row(const int32_t *sums, float scale, const float *columns, char *y, int64_t width, int add,
                     const int kind) {
    const int64_t size = kind == FP32 ? 4 : 2;
    int64_t i = 0;
    for (; i + LANES <= width; i += LANES)
        finish_lanes(sums + i, scale, columns ? columns + i : 0, y + i * size, add, kind);
    if (i == width) return;
    const size_t some = (size_t)(width - i);
    float by[LANES] = {0}, held[LANES] = {0};
    if (columns) memcpy(by, columns + i, some * 4);
    memcpy(held, y + i * size, some * (size_t)size);
    finish_lanes(sums + i, scale, columns ? by : 0, held, add, kind);
    memcpy(y + i * size, held, some * (size_t)size);
}

/* The first `width` numbers of rows from t on, from their sums [count, PANEL]. */
static void finish(const int32_t *sums, int64_t count, const Target *to, int64_t t, int64_t n, int64_t width) {
    const float *columns = to->columns ? to->columns + n : 0;
    for (int64_t r = 0; r < count; r++, sums += PANEL) {
        const float scale = isnan(to->scales[t + r]) ? NAN : to->scales[t + r]; /* to_bf16 would round other NaNs up */
        char *y = to->y + ((t + r) * to->stride + n) * (to->kind == FP32 ? 4 : 2);
        if (to->kind == FP32) finish_row(sums, scale, columns, y, width, (int)to->add, FP32);
        else finish_row(sums, scale, columns, y, width, (int)to->add, BF16);
    }
}

/* Panels [p, end) of rows [t, t_end). panels: place for the weights. */
static void block(const Weight *w, const Rows *q, const Target *to, int64_t t, int64_t t_end, int64_t p, int64_t end,
                  Number *panels) {
    int32_t sums[ROWS * PANEL] __attribute__((aligned(64)));
    const int64_t groups = (w->deep + GROUP - 1) / GROUP, size = groups * GROUP * PANEL;
    lay_out(w, p, end, size, panels);
    for (; t < t_end; t += ROWS)
        for (int64_t i = p; i < end; i++) {
            const int64_t count = t_end - t < ROWS ? t_end - t : ROWS, left = w->wide - i * PANEL;
            any_tile(count, tile_of(q, t), q->starts + t, panels + (i - p) * size, groups, sums);
            finish(sums, count, to, t, i * PANEL, left < PANEL ? left : PANEL);
        }
}

/* Into how many parts rows are cut among threads, where panels alone would leave some with less to do. */
static int64_t parts_of_rows(int64_t panels, int64_t count, int64_t threads) {
    int64_t best = 1, least = INT64_MAX;
    for (int64_t parts = 1; parts <= threads; parts++) {
        if (threads % parts) continue;
        const int64_t across = threads / parts, tiles = (count + ROWS - 1) / ROWS;
        const int64_t cost = (panels + across - 1) / across * ((tiles + parts - 1) / parts + 1);
        if (cost < least) least = cost, best = parts;
    }
    return best;
}

static int64_t bytes_of_panel(int64_t deep) { return chunks(deep) * CHUNK * PANEL * (int64_t)sizeof(Number); }

static int64_t panels_of_block(int64_t deep) { return BLOCK > bytes_of_panel(deep) ? BLOCK / bytes_of_panel(deep) : 1; }

static int64_t bytes_of_rows(int64_t count, int64_t deep) {
    return (count + ROWS - 1) / ROWS * ROWS * chunks(deep) * CHUNK * (int64_t)sizeof(Number);
}

/* Bytes of `room` for a product: rows, their starts, and a block of weights for each thread. */
int64_t room_bytes(int64_t count, int64_t deep, int64_t threads) {
    return bytes_of_rows(count, deep) + (count + 16) * 4 + threads * panels_of_block(deep) * bytes_of_panel(deep);
}

/* y [T, N] (+)= scales (q [T, K] by a weight [N, K] (by_rows) or [K, N]) columns; q and the weight without gaps. */
void multiply(const int8_t *q, const float *scales, int64_t count, const int8_t *weight, int64_t by_rows, int64_t wide,
              int64_t deep, const float *columns, char *y, int64_t stride, int64_t kind, int64_t add, char *room,
              int64_t threads) {
    const Weight w = {weight, by_rows, wide, deep};
    const Target to = {y, stride, kind, add, scales, columns};
    const int64_t most = panels_of_block(deep), bytes = most * bytes_of_panel(deep);
    char *after = room + threads * bytes;
    const Rows rows = {(Number *)after, (int32_t *)(after + bytes_of_rows(count, deep)), count, deep};
    const int64_t panels = (wide + PANEL - 1) / PANEL, down = parts_of_rows(panels, count, threads);
    const int64_t across = threads / down, tiles = (count + ROWS - 1) / ROWS;
#pragma omp parallel num_threads((int)threads)
    {
#pragma omp for
        for (int64_t t = 0; t < count; t++) take_row(q + t * deep, &rows, t);
#pragma omp for
        for (int64_t me = 0; me < threads; me++) {
            const int64_t row = me / across, column = me % across;
            const int64_t first = panels * column / across, mine = panels * (column + 1) / across - first;
            const int64_t t = tiles * row / down * ROWS, t_end = tiles * (row + 1) / down * ROWS;
            const int64_t blocks = (mine + most - 1) / most;
            for (int64_t b = 0; b < blocks; b++)
                block(&w, &rows, &to, t, t_end < count ? t_end : count, first + mine * b / blocks,
                      first + mine * (b + 1) / blocks, (Number *)(room + me * bytes));
        }
    }
}
