/* Products of a few rows of fp32 by a matrix as it is kept: dense, or in 8 or 4 bits.

   For weights in 8 and 4 bits activations are rounded to int8, 32 at a time with a scale each, for products of bytes.
   Dense weights are widened to fp32 in registers, so that a CPU without units for 16 bits reads no more of them than one
   that has.

   Shapes: T rows of activations, or sequences, K columns of a matrix. */

#ifndef MATRICES_H
#define MATRICES_H

#include <math.h>
#include <stdint.h>

#include "simd.h"

#define GROUP 32 /* activations, and weights in 4 bits, that share a scale */
/* Bytes of weights asked for before they are needed, as the CPU itself stops at the end of each page: faster with all
   threads of the CPUs with AVX-512 that were tried, slower in one with AVX2. */
#ifndef AHEAD
#define AHEAD (LANES == 16 ? 8192 : 0)
#endif
#define BLOCK 16 /* rows of a matrix that a thread takes at a time */
#define PARTS (BLOCK / LANES) /* registers that hold a number of each */
#define TILE (LANES == 16 ? 6 : 3) /* sequences by which 4 dense rows are multiplied at a time, for want of registers */
#define PANEL 64 /* rows of a matrix that many sequences go through together, so that the L2 cache holds them */
#define DEPTH 1024 /* columns of a panel that is widened to fp32: 256 kB */
#define MANY 48 /* sequences from which on rows are better widened once, into a panel, than in registers each time */
/* Of 16 rows by 32 columns; in 4 bits scales and offsets come first, then numbers, two in a byte. */
#define SCALES_OF_INT4 64
#define BYTES_OF_INT4 320
#define BYTES_OF_INT8 512
#define BYTES_OF_24_BITS 96 /* of 32 columns: first their upper 16 bits, then the next 8 of each */

/* The exact ones are multiplied by fp32 as they are; beside OF_BF16, many sequences are rounded to bf16. */
enum { OF_BF16, OF_INT8, OF_INT4, EXACT_BF16, EXACT_FP16, EXACT_24_BITS, OF_FP32 /* of a panel */ };

typedef struct {
    const void *weight; /* [rows, columns], or blocks [rows / 16, columns / 32] */
    const float *scale; /* OF_INT8: [rows] */
    const float *bias;  /* [rows], or NULL */
    int64_t kind, rows, columns;
} Matrix;

/* Activations as matrices want them, each thread its own. */
typedef struct {
    float *x;     /* [T, K] */
    int8_t *q;    /* [T, K], rounded to int8; or bf16 */
    float *scale; /* [T, K / 32] */
    float *sum;   /* [T, K / 32]: of a group's rounded numbers, scaled */
    float *total; /* [T]: of all of them */
    float *panel; /* [PANEL, DEPTH]: weights, widened */
} Rows;

/* --- Activations ------------------------------------------------------------------------------------------------- */

/* Round 32 numbers to int8; gives their scale, NaN where one of them is not finite, and the sum of the rounded ones. */
static inline float round_group(const float *x, int8_t *q, float *sum) {
    Floats most = zeros(), all = zeros(), whole = zeros();
    for (int i = 0; i < GROUP; i += LANES) {
        most = larger(absolute(load(x + i)), most);
        all = plus(all, load(x + i));
    }
    const float scale = largest_of(most) / 127.0f + sum_of(times(all, zeros()));
    const Floats by = every(scale > 0 ? 1.0f / scale : 0.0f);
    for (int i = 0; i < GROUP; i += LANES) {
        const Ints number = to_ints(times(load(x + i), by));
        store_int8(q + i, number);
        whole = plus(whole, from_ints(number));
    }
    *sum = sum_of(whole);
    return scale;
}

/* Round rows->x to int8, a group at a time. */
static void round_rows(Rows *rows, int64_t from, int64_t until, int64_t columns) {
    for (int64_t t = from; t < until; t++) {
        float total = 0;
        for (int64_t g = 0; g < columns / GROUP; g++) {
            const int64_t first = t * columns + g * GROUP, at = first / GROUP;
            float sum;
            rows->scale[at] = round_group(rows->x + first, rows->q + first, &sum);
            rows->sum[at] = rows->scale[at] * sum;
            total += rows->sum[at];
        }
        rows->total[t] = total;
    }
}

/* --- Products ---------------------------------------------------------------------------------------------------- */

SIMD void ask_ahead(const char *weights) {
    if (AHEAD) _mm_prefetch(weights + AHEAD, _MM_HINT_T0);
}

/* Where products go: y[t * stride + row], added to what is there or not. */
typedef struct {
    float *y;
    int64_t stride;
    int add;
} Target;

/* Whether activations beside bf16 weights are rounded to bf16 too: many sequences are bound by arithmetic, of which the
   bf16 units do twice as much; a few by memory, and lose nothing by fp32. */
static inline int rounds_to_bf16(int64_t count) {
    return BF16_UNITS && count >= 4;
}

static inline void put_dense(const Matrix *m, const Target *to, int64_t row, int64_t t, Floats sum) {
    float *y = to->y + t * to->stride + row;
    *y = sum_of(sum) + (m->bias ? m->bias[row] : 0.0f) + (to->add ? *y : 0.0f);
}

static inline int64_t bytes_of(int64_t kind) { return kind == EXACT_24_BITS ? 3 : kind == OF_FP32 ? 4 : 2; }

/* Where a row of dense weights begins. */
static inline const char *dense_at(const Matrix *m, int64_t row) {
    return (const char *)m->weight + row * m->columns * bytes_of(m->kind);
}

/* Dense weights of a row from column k on, which is a multiple of LANES. */
SIMD Floats widened(const char *row, int64_t k, const int64_t kind) {
    if (kind == OF_FP32) return load((const float *)row + k);
    if (kind == EXACT_FP16) return from_fp16(row + 2 * k);
    if (kind != EXACT_24_BITS) return from_bf16(row + 2 * k);
    const char *block = row + k / GROUP * BYTES_OF_24_BITS;
    return from_24_bits(block + k % GROUP * 2, block + GROUP * 2 + k % GROUP);
}

/* A row by a sequence in fp32, in one stream of memory. */
SIMD void dense_row(const Matrix *m, const Rows *rows, const Target *to, int64_t row, int64_t t, const int64_t kind) {
    const char *w = dense_at(m, row);
    const float *x = rows->x + t * m->columns;
    Floats sum[32 / LANES]; /* apart, as each waits for its last */
    for (int i = 0; i < 32 / LANES; i++) sum[i] = zeros();
    for (int64_t k = 0; k < m->columns; k += 32) {
        ask_ahead(w + bytes_of(kind) * k);
        for (int i = 0; i < 32 / LANES; i++)
            sum[i] = times_plus(widened(w, k + i * LANES, kind), load(x + k + i * LANES), sum[i]);
    }
    for (int i = 16 / LANES; i; i /= 2)
        for (int j = 0; j < i; j++) sum[j] = plus(sum[j], sum[j + i]);
    put_dense(m, to, row, t, sum[0]);
}

#if BF16_UNITS
/* 4 rows of bf16 by up to 4 sequences in bf16. */
SIMD void dense_tile(const Matrix *m, const Rows *rows, const Target *to, int64_t row, int64_t first, const int count) {
    const int64_t n = m->columns;
    const uint16_t *w = (const uint16_t *)m->weight + row * n, *x = (const uint16_t *)rows->q + first * n;
    __m512 sum[4][4];
    for (int r = 0; r < 4; r++)
        for (int t = 0; t < count; t++) sum[r][t] = _mm512_setzero_ps();
    for (int64_t k = 0; k < n; k += 32)
        for (int t = 0; t < count; t++) {
            __m512bh right = (__m512bh)_mm512_loadu_si512(x + t * n + k);
            for (int r = 0; r < 4; r++)
                sum[r][t] = _mm512_dpbf16_ps(sum[r][t], (__m512bh)_mm512_loadu_si512(w + r * n + k), right);
        }
    for (int r = 0; r < 4; r++)
        for (int t = 0; t < count; t++) put_dense(m, to, row + r, first + t, sum[r][t]);
}
#endif

/* Some rows of bf16 by all sequences, with the CPU's units for bf16 where there are enough of them. */
static void bf16_panel(const Matrix *m, const Rows *rows, const Target *to, int64_t row, int64_t until, int64_t count) {
#if BF16_UNITS
    if (rounds_to_bf16(count)) {
        for (; row < until; row += BLOCK) {
            int64_t t = 0;
            for (; t + 4 <= count; t += 4)
                for (int64_t r = row; r < row + BLOCK; r += 4) dense_tile(m, rows, to, r, t, 4);
            for (; t < count; t++)
                for (int64_t r = row; r < row + BLOCK; r += 4) dense_tile(m, rows, to, r, t, 1);
        }
        return;
    }
#endif
    for (; row < until; row += BLOCK)
        for (int64_t t = 0; t < count; t++)
            for (int64_t r = row; r < row + BLOCK; r++) dense_row(m, rows, to, r, t, OF_BF16);
}

/* 4 rows of w, `bytes` apart, by up to 6 sequences of x, `columns` apart, over `depth` columns; gives their sums. */
SIMD void exact_tile(const char *w, int64_t bytes, int64_t depth, const float *x, int64_t columns, const int count,
                     const int64_t kind, __m128 sums[6]) {
    Floats sum[4][6];
    for (int r = 0; r < 4; r++)
        for (int t = 0; t < count; t++) sum[r][t] = zeros();
    for (int64_t k = 0; k < depth; k += LANES) {
        Floats right[6];
        for (int t = 0; t < count; t++) {
            right[t] = load(x + t * columns + k);
            __asm__("" : "+v"(right[t])); /* stays in its register: compilers else load it again for each of the 4 */
        }
        for (int r = 0; r < 4; r++) {
            if (kind != OF_FP32) _mm_prefetch(w + (r + 4) * bytes + k * bytes_of(kind), _MM_HINT_T0); /* the next 4 rows */
            Floats left = widened(w + r * bytes, k, kind);
            __asm__("" : "+v"(left));
            for (int t = 0; t < count; t++) sum[r][t] = times_plus(left, right[t], sum[r][t]);
        }
    }
    for (int t = 0; t < count; t++) sums[t] = sums_of(sum[0][t], sum[1][t], sum[2][t], sum[3][t]);
}

SIMD void exact_tiles(const char *w, int64_t bytes, int64_t depth, const float *x, int64_t columns, int64_t count,
                      const int64_t kind, __m128 sums[6]) {
    switch (count) {
    case 1: exact_tile(w, bytes, depth, x, columns, 1, kind, sums); break;
    case 2: exact_tile(w, bytes, depth, x, columns, 2, kind, sums); break;
    case 3: exact_tile(w, bytes, depth, x, columns, 3, kind, sums); break;
    case 4: exact_tile(w, bytes, depth, x, columns, 4, kind, sums); break;
    case 5: exact_tile(w, bytes, depth, x, columns, 5, kind, sums); break;
    default: exact_tile(w, bytes, depth, x, columns, 6, kind, sums);
    }
}

/* Sums of 4 rows and some sequences from the t-th on; those of later columns are added to the first ones. */
static inline void put_sums(const Matrix *m, const Target *to, int64_t row, int64_t t, int64_t count, int first,
                            __m128 sums[6]) {
    for (int64_t i = 0; i < count; i++) {
        float *y = to->y + (t + i) * to->stride + row;
        if (m->bias && first) sums[i] = _mm_add_ps(sums[i], _mm_loadu_ps(m->bias + row));
        if (to->add || !first) sums[i] = _mm_add_ps(sums[i], _mm_loadu_ps(y));
        _mm_storeu_ps(y, sums[i]);
    }
}

/* Rows [row, until) of a matrix, columns [from, from + depth), as fp32. */
SIMD void widen(const Matrix *m, int64_t row, int64_t until, int64_t from, int64_t depth, float *out,
                const int64_t kind) {
    for (; row < until; row++, out += depth)
        for (int64_t k = 0; k < depth; k += LANES) store(out + k, widened(dense_at(m, row), from + k, kind));
}

/* Widened rows [row, until) by all sequences, over `depth` columns from `from` on. */
static void panel_rows(const Matrix *m, const Rows *rows, const Target *to, int64_t row, int64_t until, int64_t count,
                       int64_t from, int64_t depth) {
    const int64_t n = m->columns, tiles = (count + TILE - 1) / TILE;
    for (int64_t tile = 0, t = 0, end; tile < tiles; tile++, t = end) {
        end = count * (tile + 1) / tiles;
        const char *w = (const char *)rows->panel;
        for (int64_t r = row; r < until; r += 4, w += 4 * depth * bytes_of(OF_FP32)) {
            __m128 sums[6];
            exact_tiles(w, depth * bytes_of(OF_FP32), depth, rows->x + t * n + from, n, end - t, OF_FP32, sums);
            put_sums(m, to, r, t, end - t, from == 0, sums);
        }
    }
}

/* Some dense rows by all sequences in fp32. */
SIMD void exact_rows(const Matrix *m, const Rows *rows, const Target *to, int64_t row, int64_t until, int64_t count,
                     const int64_t kind) {
    const int64_t n = m->columns, tiles = (count + TILE - 1) / TILE;
    if (count >= MANY) {
        for (int64_t from = 0, depth; from < n; from += depth) {
            depth = n - from < DEPTH ? n - from : DEPTH;
            widen(m, row, until, from, depth, rows->panel, kind);
            panel_rows(m, rows, to, row, until, count, from, depth);
        }
        return;
    }
    if (count == 1) {
        for (; row < until; row++) dense_row(m, rows, to, row, 0, kind);
        return;
    }
    for (; row < until; row += 4)
        for (int64_t tile = 0, t = 0, end; tile < tiles; tile++, t = end) {
            __m128 sums[6];
            end = count * (tile + 1) / tiles;
            exact_tiles(dense_at(m, row), n * bytes_of(kind), n, rows->x + t * n, n, end - t, kind, sums);
            put_sums(m, to, row, t, end - t, 1, sums);
        }
}

/* As many rows of a packed block as there are lanes, of its 32 columns: 4 in each lane, a lane a row. */
SIMD void numbers_of(const uint8_t *numbers, int part, const int bits, Ints weights[8]) {
    const uint8_t *here = numbers + part * 4 * LANES;
    for (int i = 0; i < 8; i++)
        if (bits == 8) {
            weights[i] = load_bytes(here + 64 * i);
        } else {
            const Ints pairs = load_bytes(here + 64 * (i % 4));
            weights[i] = both_bits(i < 4 ? pairs : shifted_right(pairs, 4), every_int(0x0f0f0f0f));
        }
}

/* 16 rows in 4 or 8 bits by a few sequences. 4 bits: weight = scale * number + offset, both of 32 columns. 8 bits:
   weight = scale * (number - 128), of the row. */
SIMD void packed_tile(const Matrix *m, const Rows *rows, const Target *to, int64_t row, int64_t first, const int count,
                      const int bits) {
    const int64_t n = m->columns, groups = n / GROUP, bytes = bits == 8 ? BYTES_OF_INT8 : BYTES_OF_INT4;
    const uint8_t *block = (const uint8_t *)m->weight + row / BLOCK * groups * bytes;
    Floats sum[8][PARTS];
    for (int t = 0; t < count; t++)
        for (int p = 0; p < PARTS; p++) sum[t][p] = zeros();
    for (int64_t g = 0; g < groups; g++, block += bytes) {
        for (int i = 0; i < bytes; i += 64) ask_ahead((const char *)block + i);
        for (int p = 0; p < PARTS; p++) {
            Ints weights[8];
            numbers_of(bits == 8 ? block : block + SCALES_OF_INT4, p, bits, weights);
            for (int t = 0; t < count; t++) {
                const int64_t at = (first + t) * groups + g;
                const Floats dots = from_ints(products_of(weights, rows->q + at * GROUP, bits));
                Floats scale = every(rows->scale[at]);
                if (bits == 4) {
                    const Floats offset = from_bf16(block + SCALES_OF_INT4 / 2 + p * 2 * LANES);
                    scale = times(scale, from_bf16(block + p * 2 * LANES));
                    sum[t][p] = times_plus(offset, every(rows->sum[at]), sum[t][p]);
                }
                sum[t][p] = times_plus(dots, scale, sum[t][p]);
            }
        }
    }
    for (int t = 0; t < count; t++)
        for (int p = 0; p < PARTS; p++) {
            const int64_t r = row + p * LANES;
            float *y = to->y + (first + t) * to->stride + r;
            if (bits == 8) {
                sum[t][p] = times_plus(every(-INT8_OFFSET), every(rows->total[first + t]), sum[t][p]);
                sum[t][p] = times(sum[t][p], load(m->scale + r));
            }
            if (m->bias) sum[t][p] = plus(sum[t][p], load(m->bias + r));
            if (to->add) sum[t][p] = plus(sum[t][p], load(y));
            store(y, sum[t][p]);
        }
}

/* Some packed rows by all sequences. */
SIMD void packed_panel(const Matrix *m, const Rows *rows, const Target *to, int64_t row, int64_t until, int64_t count,
                       const int bits) {
    int64_t t = 0;
    for (; t + 8 <= count; t += 8)
        for (int64_t r = row; r < until; r += BLOCK) packed_tile(m, rows, to, r, t, 8, bits);
    for (; t + 4 <= count; t += 4)
        for (int64_t r = row; r < until; r += BLOCK) packed_tile(m, rows, to, r, t, 4, bits);
    for (; t < count; t++)
        for (int64_t r = row; r < until; r += BLOCK) packed_tile(m, rows, to, r, t, 1, bits);
}

/* Blocks [from, until) of a matrix's rows. */
static void multiply(const Matrix *m, const Rows *rows, int64_t count, int64_t from, int64_t until, Target to) {
    for (int64_t row = from * BLOCK, end; row < until * BLOCK; row = end) {
        end = row + PANEL < until * BLOCK ? row + PANEL : until * BLOCK;
        switch (m->kind) {
        case OF_INT4: packed_panel(m, rows, &to, row, end, count, 4); break;
        case OF_INT8: packed_panel(m, rows, &to, row, end, count, 8); break;
        case OF_BF16: bf16_panel(m, rows, &to, row, end, count); break;
        case EXACT_BF16: exact_rows(m, rows, &to, row, end, count, EXACT_BF16); break;
        case EXACT_FP16: exact_rows(m, rows, &to, row, end, count, EXACT_FP16); break;
        default: exact_rows(m, rows, &to, row, end, count, EXACT_24_BITS);
        }
    }
}

/* Have sequences [from, until) of count as a matrix wants them. */
static void prepare(const Matrix *m, Rows *rows, int64_t from, int64_t until, int64_t count) {
    const int64_t n = m->columns;
    if (m->kind == OF_INT8 || m->kind == OF_INT4)
        round_rows(rows, from, until, n);
    else if (m->kind == OF_BF16 && rounds_to_bf16(count))
        for (int64_t i = from * n; i < until * n; i += LANES)
            to_bf16((uint16_t *)rows->q + i, load(rows->x + i));
}

static inline int64_t share(int64_t rows, int64_t thread, int64_t threads) { return rows / BLOCK * thread / threads; }

#endif
