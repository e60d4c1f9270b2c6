/* One new token of each of several sequences through a Qwen2, Qwen3 or Llama decoder, on a CPU with AVX2 or AVX-512.

   A step reads all weights once; everything else stays in the caches. All threads go through the whole step together
   and meet at barriers, five a layer; each owns a range of every matrix's rows. Activations are fp32. For weights in 8
   and 4 bits they are rounded to int8, 32 at a time with a scale each, for products of bytes. Dense weights are widened
   to fp32 in registers, so that a CPU without units for 16 bits reads no more of them than one that has.

   Shapes: T sequences, D hidden size, I inner size, H query heads, G key-value heads, d head size, V vocabulary. */

#include <math.h>
#include <omp.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

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

/* The exact ones are multiplied by fp32 as they are; beside BF16, many sequences are rounded to bf16. */
enum { BF16, INT8, INT4, EXACT_BF16, EXACT_FP16, EXACT_24_BITS, FP32 /* of a panel */ };

typedef struct {
    const void *weight; /* [rows, columns], or blocks [rows / 16, columns / 32] */
    const float *scale; /* INT8: [rows] */
    const float *bias;  /* [rows], or NULL */
    int64_t kind, rows, columns;
} Matrix;

typedef struct {
    Matrix qkv, o, gate_up, down;
    const float *input_norm, *q_norm, *k_norm, *mlp_norm; /* those of heads may be NULL */
} Layer;

typedef struct {
    const Layer *layers;
    Matrix head;
    const float *norm;
    const float *cos, *sin; /* [context, d / 2] */
    int64_t count, hidden, inner, queries, keys, size;
    float scale, epsilon, head_epsilon;
} Model;

typedef struct {
    void *keys, *values;       /* bf16 or fp32 [layers, slots, G, capacity, d] */
    int64_t wide;              /* whether they are fp32 */
    int64_t slots, capacity;
    const int64_t *places;     /* [T]: tokens that each of the first slots holds */
} Cache;

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

/* RMSNorm (Zhang & Sennrich 2019) of n numbers, a multiple of 16; in place is fine. */
static void normalise(const float *x, const float *weight, float epsilon, int64_t n, float *out) {
    Floats squares = zeros();
    for (int64_t i = 0; i < n; i += LANES) squares = times_plus(load(x + i), load(x + i), squares);
    const Floats rate = every(1.0f / sqrtf(sum_of(squares) / (float)n + epsilon));
    for (int64_t i = 0; i < n; i += LANES) store(out + i, times(times(load(x + i), rate), load(weight + i)));
}

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

static inline int64_t bytes_of(int64_t kind) { return kind == EXACT_24_BITS ? 3 : kind == FP32 ? 4 : 2; }

/* Where a row of dense weights begins. */
static inline const char *dense_at(const Matrix *m, int64_t row) {
    return (const char *)m->weight + row * m->columns * bytes_of(m->kind);
}

/* Dense weights of a row from column k on, which is a multiple of LANES. */
SIMD Floats widened(const char *row, int64_t k, const int64_t kind) {
    if (kind == FP32) return load((const float *)row + k);
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
            for (int64_t r = row; r < row + BLOCK; r++) dense_row(m, rows, to, r, t, BF16);
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
            if (kind != FP32) _mm_prefetch(w + (r + 4) * bytes + k * bytes_of(kind), _MM_HINT_T0); /* the next 4 rows */
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
        for (int64_t r = row; r < until; r += 4, w += 4 * depth * bytes_of(FP32)) {
            __m128 sums[6];
            exact_tiles(w, depth * bytes_of(FP32), depth, rows->x + t * n + from, n, end - t, FP32, sums);
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
        case INT4: packed_panel(m, rows, &to, row, end, count, 4); break;
        case INT8: packed_panel(m, rows, &to, row, end, count, 8); break;
        case BF16: bf16_panel(m, rows, &to, row, end, count); break;
        case EXACT_BF16: exact_rows(m, rows, &to, row, end, count, EXACT_BF16); break;
        case EXACT_FP16: exact_rows(m, rows, &to, row, end, count, EXACT_FP16); break;
        default: exact_rows(m, rows, &to, row, end, count, EXACT_24_BITS);
        }
    }
}

/* Have sequences [from, until) of count as a matrix wants them. */
static void prepare(const Matrix *m, Rows *rows, int64_t from, int64_t until, int64_t count) {
    const int64_t n = m->columns;
    if (m->kind == INT8 || m->kind == INT4)
        round_rows(rows, from, until, n);
    else if (m->kind == BF16 && rounds_to_bf16(count))
        for (int64_t i = from * n; i < until * n; i += LANES)
            to_bf16((uint16_t *)rows->q + i, load(rows->x + i));
}

static inline int64_t share(int64_t rows, int64_t thread, int64_t threads) { return rows / BLOCK * thread / threads; }

/* Memory that is handed out from its beginning on; without any, what would be handed out is counted. */
typedef struct {
    char *memory;
    int64_t used;
} Scratch;

static float *take(Scratch *scratch, int64_t count) {
    float *here = scratch->memory ? (float *)(scratch->memory + scratch->used) : NULL;
    scratch->used += (count * 4 + 63) / 64 * 64;
    return here;
}

/* Room for count rows in every form but their own. */
static void take_rows(Scratch *from, Rows *rows, int64_t count, int64_t columns) {
    rows->q = (int8_t *)take(from, count * columns / 2);
    rows->scale = take(from, count * columns / GROUP);
    rows->sum = take(from, count * columns / GROUP);
    rows->total = take(from, count);
}

/* Bytes of scratch for a product of rows. */
int64_t product_scratch_bytes(const Matrix *m, int64_t count, int64_t threads) {
    Scratch scratch = {NULL, 0};
    Rows rows;
    take_rows(&scratch, &rows, count, m->columns);
    for (int64_t i = 0; i < threads; i++) take(&scratch, PANEL * DEPTH);
    return scratch.used;
}

/* Rows x [T, K] by a matrix, with its bias: y [T, N]. */
void multiply_rows(const Matrix *m, float *x, int64_t count, int64_t most_threads, char *memory, float *y) {
    Scratch shared = {memory, 0};
    Rows all = {.x = x};
    take_rows(&shared, &all, count, m->columns);
#pragma omp parallel num_threads((int)most_threads)
    {
        const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
        Rows rows = all;
        Scratch own = shared;
        for (int64_t i = 0; i <= thread; i++) rows.panel = take(&own, PANEL * DEPTH);
        prepare(m, &rows, count * thread / threads, count * (thread + 1) / threads, count);
#pragma omp barrier
        multiply(m, &rows, count, share(m->rows, thread, threads), share(m->rows, thread + 1, threads),
                 (Target){y, m->rows, 0});
    }
}

/* fp32 numbers, 32 at a time, to their upper 24 bits, rounded to the nearest, ties to even: 2^-16 at most is lost. */
void to_24_bits(const float *x, uint8_t *out, int64_t count, int64_t threads) {
#pragma omp parallel for num_threads((int)threads)
    for (int64_t i = 0; i < count; i += GROUP) {
        uint8_t *block = out + i / GROUP * BYTES_OF_24_BITS;
        uint32_t bits[GROUP];
        uint16_t upper[GROUP];
        memcpy(bits, x + i, sizeof(bits));
        for (int k = 0; k < GROUP; k++) {
            const uint32_t size = bits[k] & 0x7fffffff, infinite = 0x7f800000;
            uint32_t number = size < infinite ? bits[k] + 0x7f + (bits[k] >> 8 & 1) : bits[k];
            number |= size > infinite ? 0x400000 : 0; /* NaN, when cut */
            upper[k] = (uint16_t)(number >> 16);
            block[GROUP * 2 + k] = (uint8_t)(number >> 8);
        }
        memcpy(block, upper, sizeof(upper));
    }
}

/* A packed matrix as bf16 [columns, rows], for products of many rows. */
void unpack(const Matrix *m, uint16_t *out, int64_t threads) {
    const int64_t groups = m->columns / GROUP, bytes = m->kind == INT8 ? BYTES_OF_INT8 : BYTES_OF_INT4;
#pragma omp parallel for num_threads((int)threads)
    for (int64_t row = 0; row < m->rows; row += LANES) {
        const int part = (int)(row % BLOCK / LANES);
        const uint8_t *block = (const uint8_t *)m->weight + row / BLOCK * groups * bytes;
        for (int64_t g = 0; g < groups; g++, block += bytes) {
            Ints weights[8];
            Floats scale, offset;
            if (m->kind == INT8) {
                numbers_of(block, part, 8, weights);
                scale = load(m->scale + row);
                offset = times(scale, every(-128.0f));
            } else {
                numbers_of(block + SCALES_OF_INT4, part, 4, weights);
                scale = from_bf16(block + part * 2 * LANES);
                offset = from_bf16(block + SCALES_OF_INT4 / 2 + part * 2 * LANES);
            }
            for (int k = 0; k < GROUP; k++) {
                const Ints number = both_bits(shifted_right(weights[k / 4], 8 * (k % 4)), every_int(255));
                to_bf16(out + (g * GROUP + k) * m->rows + row, times_plus(from_ints(number), scale, offset));
            }
        }
    }
}

/* --- Attention --------------------------------------------------------------------------------------------------- */

/* A head's norm, where there is one, and its rotary position (Su et al. 2021), the halves of a head as coordinates. */
static void place_head(const Model *model, const float *head, const float *norm, float epsilon, int64_t place,
                       float *out) {
    const int64_t half = model->size / 2;
    const float *cos = model->cos + place * half, *sin = model->sin + place * half;
    float normed[model->size];
    if (norm) normalise(head, norm, epsilon, model->size, normed);
    else memcpy(normed, head, sizeof(normed));
    for (int64_t i = 0; i < half; i++) {
        out[i] = normed[i] * cos[i] - normed[i + half] * sin[i];
        out[i + half] = normed[i + half] * cos[i] + normed[i] * sin[i];
    }
}

/* Kept numbers, from the i-th on. */
SIMD Floats kept(const void *numbers, int64_t i, const int wide) {
    return wide ? load((const float *)numbers + i) : from_bf16((const uint16_t *)numbers + i);
}

/* Keep numbers from the i-th on; where that rounds them, they become what is kept. */
static void keep(void *numbers, int64_t i, float *x, int64_t size, int wide, int writes) {
    if (wide) {
        if (writes) memcpy((float *)numbers + i, x, (size_t)size * sizeof(float));
        return;
    }
    for (int64_t j = 0; j < size; j += LANES) {
        uint16_t narrow[LANES];
        to_bf16(narrow, load(x + j));
        store(x + j, from_bf16(narrow));
        if (writes) memcpy((uint16_t *)numbers + i + j, narrow, sizeof(narrow));
    }
}

SIMD float dot_with_key(const float *q, const void *keys, int64_t at, int64_t size, const int wide) {
    Floats sum = zeros();
    for (int64_t i = 0; i < size; i += LANES) sum = times_plus(kept(keys, at + i, wide), load(q + i), sum);
    return sum_of(sum);
}

/* Scores of n keys as shares; gives one over their sum. Up to 15 places behind them are written to. */
static float exponentials(float *scores, int64_t n) {
    Floats most = every(-INFINITY), sum = zeros();
    for (int64_t i = n; i % LANES; i++) scores[i] = -INFINITY; /* as shares 2e-38, which no sum feels */
    for (int64_t i = 0; i < n; i += LANES) most = larger(most, load(scores + i));
    most = every(largest_of(most));
    for (int64_t i = 0; i < n; i += LANES) {
        const Floats shares = exponential(minus(load(scores + i), most));
        store(scores + i, shares);
        sum = plus(sum, shares);
    }
    return 1.0f / sum_of(sum);
}

/* Shares of n kept values, from the at-th number on, and of a new one: out [d]. */
SIMD void weigh(const float *scores, int64_t n, float rate, const void *values, int64_t at, const float *newest,
                int64_t size, float *out, const int wide) {
    for (int64_t part = 0; part < size; part += 64) {
        const int64_t width = size - part < 64 ? size - part : 64;
        Floats sum[64 / LANES];
        for (int64_t j = 0; j < width / LANES; j++) sum[j] = times(every(scores[n]), load(newest + part + LANES * j));
        for (int64_t i = 0; i < n; i++) {
            const Floats share = every(scores[i]);
            for (int64_t j = 0; j < width / LANES; j++)
                sum[j] = times_plus(share, kept(values, at + i * size + part + LANES * j, wide), sum[j]);
        }
        for (int64_t j = 0; j < width / LANES; j++) store(out + part + LANES * j, times(sum[j], every(rate)));
    }
}

/* One head of one sequence attends to all that its slot holds and to the new token, whose key and value the first head
   of a group puts into the cache. heads: the sequence's queries, keys and values; out: [d]. */
SIMD void attend_in(const Model *model, const Layer *layer, const Cache *cache, int64_t number, int64_t slot, int64_t h,
                    const float *heads, float *scores, float *out, const int wide) {
    const int64_t size = model->size, shared = model->queries / model->keys, g = h / shared;
    const int64_t n = cache->places[slot];
    const int64_t at = (((number * cache->slots) + slot) * model->keys + g) * cache->capacity * size;
    const int writes = h == g * shared; /* no other thread reads this place in this step */
    float q[size], key[size], value[size];
    place_head(model, heads + h * size, layer->q_norm, model->head_epsilon, n, q);
    place_head(model, heads + (model->queries + g) * size, layer->k_norm, model->head_epsilon, n, key);
    memcpy(value, heads + (model->queries + model->keys + g) * size, sizeof(value));
    keep(cache->keys, at + n * size, key, size, wide, writes);
    keep(cache->values, at + n * size, value, size, wide, writes);
    for (int64_t i = 0; i < n; i++)
        scores[i] = model->scale * dot_with_key(q, cache->keys, at + i * size, size, wide);
    scores[n] = model->scale * dot_with_key(q, key, 0, size, 1);
    weigh(scores, n, exponentials(scores, n + 1), cache->values, at, value, size, out, wide);
}

static void attend(const Model *model, const Layer *layer, const Cache *cache, int64_t number, int64_t slot, int64_t h,
                   const float *heads, float *scores, float *out) {
    if (cache->wide) attend_in(model, layer, cache, number, slot, h, heads, scores, out, 1);
    else attend_in(model, layer, cache, number, slot, h, heads, scores, out, 0);
}

/* --- A step ------------------------------------------------------------------------------------------------------ */

static int64_t more_of(int64_t a, int64_t b) { return a > b ? a : b; }

static int64_t widest(const Model *model) {
    return more_of(more_of(model->hidden, model->inner), model->queries * model->size);
}

/* What a thread has for itself; gives room for scores. */
static float *take_own(Scratch *from, const Model *model, const Cache *cache, Rows *rows, int64_t count) {
    rows->x = take(from, count * widest(model));
    rows->panel = take(from, PANEL * DEPTH);
    take_rows(from, rows, count, widest(model));
    return take(from, cache->capacity + 16);
}

/* Bytes of scratch for steps of T sequences. */
int64_t scratch_bytes(const Model *model, const Cache *cache, int64_t count, int64_t threads) {
    Scratch scratch = {NULL, 0};
    Rows rows;
    for (int64_t i = 0; i < threads; i++) take_own(&scratch, model, cache, &rows, count);
    take(&scratch, count * (model->queries + 2 * model->keys) * model->size);
    take(&scratch, count * model->queries * model->size);
    take(&scratch, count * 2 * model->inner);
    return scratch.used;
}

/* gate and up of a thread's rows, then silu(gate) * up in gate's place. */
static void gated(const Matrix *m, const Rows *rows, int64_t count, int64_t inner, int64_t thread, int64_t threads,
                  float *both) {
    const int64_t from = share(inner, thread, threads), until = share(inner, thread + 1, threads);
    const Target to = {both, 2 * inner, 0};
    multiply(m, rows, count, from, until, to);
    multiply(m, rows, count, from + inner / BLOCK, until + inner / BLOCK, to);
    for (int64_t t = 0; t < count; t++)
        for (int64_t i = from * BLOCK; i < until * BLOCK; i += LANES) {
            float *gate = both + t * 2 * inner + i;
            const Floats g = load(gate), e = exponential(smaller(minus(zeros(), g), every(87.0f)));
            store(gate, times(over(g, plus(e, every(1.0f))), load(gate + inner)));
        }
}

/* x [T, D], the embeddings of new tokens, through all layers; logits [T, V]. */
void answer_step(const Model *model, const Cache *cache, float *x, int64_t count, int64_t most_threads, char *memory,
                 float *logits) {
    const int64_t hidden = model->hidden, inner = model->inner, width = model->queries * model->size;
    const int64_t all = (model->queries + 2 * model->keys) * model->size;
    Scratch shared = {memory, 0};
    float *heads = take(&shared, count * all), *seen = take(&shared, count * width);
    float *both = take(&shared, count * 2 * inner);
#pragma omp parallel num_threads((int)most_threads)
    {
        const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads(); /* not more than most_threads */
        Scratch own = shared;
        Rows rows;
        float *scores = NULL;
        for (int64_t i = 0; i <= thread; i++) scores = take_own(&own, model, cache, &rows, count);
        for (int64_t number = 0; number < model->count; number++) {
            const Layer *layer = model->layers + number;
            for (int64_t t = 0; t < count; t++)
                normalise(x + t * hidden, layer->input_norm, model->epsilon, hidden, rows.x + t * hidden);
            prepare(&layer->qkv, &rows, 0, count, count);
            multiply(&layer->qkv, &rows, count, share(all, thread, threads), share(all, thread + 1, threads),
                     (Target){heads, all, 0});
#pragma omp barrier
            const int64_t items = count * model->queries;
            for (int64_t item = items * thread / threads; item < items * (thread + 1) / threads; item++) {
                int64_t slot = item / model->queries, h = item % model->queries;
                attend(model, layer, cache, number, slot, h, heads + slot * all, scores,
                       seen + slot * width + h * model->size);
            }
#pragma omp barrier
            memcpy(rows.x, seen, (size_t)(count * width) * sizeof(float));
            prepare(&layer->o, &rows, 0, count, count);
            multiply(&layer->o, &rows, count, share(hidden, thread, threads), share(hidden, thread + 1, threads),
                     (Target){x, hidden, 1});
#pragma omp barrier
            for (int64_t t = 0; t < count; t++)
                normalise(x + t * hidden, layer->mlp_norm, model->epsilon, hidden, rows.x + t * hidden);
            prepare(&layer->gate_up, &rows, 0, count, count);
            gated(&layer->gate_up, &rows, count, inner, thread, threads, both);
#pragma omp barrier
            for (int64_t t = 0; t < count; t++)
                memcpy(rows.x + t * inner, both + t * 2 * inner, (size_t)inner * sizeof(float));
            prepare(&layer->down, &rows, 0, count, count);
            multiply(&layer->down, &rows, count, share(hidden, thread, threads), share(hidden, thread + 1, threads),
                     (Target){x, hidden, 1});
#pragma omp barrier
        }
        for (int64_t t = 0; t < count; t++)
            normalise(x + t * hidden, model->norm, model->epsilon, hidden, rows.x + t * hidden);
        prepare(&model->head, &rows, 0, count, count);
        const int64_t vocabulary = model->head.rows;
        multiply(&model->head, &rows, count, share(vocabulary, thread, threads),
                 share(vocabulary, thread + 1, threads), (Target){logits, vocabulary, 0});
    }
}
