/* One new token of each of several sequences through a Qwen2, Qwen3 or Llama decoder, on a CPU with AVX-512 and VNNI.

   A step reads all weights once; everything else stays in the caches. All threads go through the whole step together
   and meet at barriers, five a layer; each owns a range of every matrix's rows. Activations are fp32. For weights in 8
   and 4 bits they are rounded to int8, 32 at a time with a scale each, and multiplied by the int8 units. Dense weights
   are widened to fp32 in registers, so that a CPU without units for 16 bits reads no more of them than one that has.

   Shapes: T sequences, D hidden size, I inner size, H query heads, G key-value heads, d head size, V vocabulary. */

#include <immintrin.h>
#include <math.h>
#include <omp.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define GROUP 32 /* activations, and weights in 4 bits, that share a scale */
#define AHEAD 8192 /* bytes of weights asked for before they are needed: the CPU itself stops at the end of each page */
#define BLOCK 16 /* rows of a matrix that a thread takes at a time */
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

static inline __m512 from_bf16(const uint16_t *p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16));
}

static inline void to_bf16(uint16_t *p, __m512 x) { /* to the nearest, ties to even */
    __m512i bits = _mm512_castps_si512(x);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    bits = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16)));
}

/* exp(x) for x <= 0 or little above; by a polynomial for 2^f, f in [-0.5, 0.5], to 2e-7 of the value. */
static inline __m512 exponential(__m512 x) {
    __m512 y = _mm512_mul_ps(_mm512_max_ps(x, _mm512_set1_ps(-87.0f)), _mm512_set1_ps(1.44269504f));
    __m512 whole = _mm512_roundscale_ps(y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 f = _mm512_sub_ps(y, whole);
    __m512 p = _mm512_set1_ps(1.54035304e-4f); /* ln(2)^n / n! */
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.33335581e-3f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.61812911e-3f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.55041087e-2f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.40226507e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.93147181e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, whole);
}

/* --- Activations ------------------------------------------------------------------------------------------------- */

/* RMSNorm (Zhang & Sennrich 2019) of n numbers, a multiple of 16; in place is fine. */
static void normalise(const float *x, const float *weight, float epsilon, int64_t n, float *out) {
    __m512 squares = _mm512_setzero_ps();
    for (int64_t i = 0; i < n; i += 16) {
        __m512 v = _mm512_loadu_ps(x + i);
        squares = _mm512_fmadd_ps(v, v, squares);
    }
    __m512 rate = _mm512_set1_ps(1.0f / sqrtf(_mm512_reduce_add_ps(squares) / (float)n + epsilon));
    for (int64_t i = 0; i < n; i += 16) {
        __m512 v = _mm512_mul_ps(_mm512_loadu_ps(x + i), rate);
        _mm512_storeu_ps(out + i, _mm512_mul_ps(v, _mm512_loadu_ps(weight + i)));
    }
}

/* Round rows->x to int8, a group at a time. Where a group holds what is not finite, its scale is NaN. */
static void round_rows(Rows *rows, int64_t from, int64_t until, int64_t columns) {
    for (int64_t t = from; t < until; t++) {
        const float *x = rows->x + t * columns;
        float total = 0;
        for (int64_t g = 0; g < columns / GROUP; g++) {
            __m512 one = _mm512_loadu_ps(x + g * GROUP), two = _mm512_loadu_ps(x + g * GROUP + 16);
            float largest = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(one), _mm512_abs_ps(two)));
            __m512 zeros = _mm512_mul_ps(_mm512_add_ps(one, two), _mm512_setzero_ps());
            float scale = largest / 127.0f + _mm512_reduce_add_ps(zeros);
            __m512 by = _mm512_set1_ps(scale > 0 ? 1.0f / scale : 0.0f);
            __m512i a = _mm512_cvtps_epi32(_mm512_mul_ps(one, by)), b = _mm512_cvtps_epi32(_mm512_mul_ps(two, by));
            int8_t *q = rows->q + t * columns + g * GROUP;
            _mm_storeu_si128((__m128i *)q, _mm512_cvtsepi32_epi8(a));
            _mm_storeu_si128((__m128i *)(q + 16), _mm512_cvtsepi32_epi8(b));
            float sum = scale * (float)_mm512_reduce_add_epi32(_mm512_add_epi32(a, b));
            rows->scale[t * (columns / GROUP) + g] = scale;
            rows->sum[t * (columns / GROUP) + g] = sum;
            total += sum;
        }
        rows->total[t] = total;
    }
}

/* --- Products ---------------------------------------------------------------------------------------------------- */

/* Where products go: y[t * stride + row], added to what is there or not. */
typedef struct {
    float *y;
    int64_t stride;
    int add;
} Target;

/* Whether activations beside bf16 weights are rounded to bf16 too: many sequences are bound by arithmetic, of which the
   bf16 units do twice as much; a few by memory, and lose nothing by fp32. */
static inline int rounds_to_bf16(int64_t count) {
#ifdef __AVX512BF16__
    return count >= 4;
#else
    (void)count;
    return 0;
#endif
}

static inline void put_dense(const Matrix *m, const Target *to, int64_t row, int64_t t, __m512 sum) {
    float *y = to->y + t * to->stride + row;
    *y = _mm512_reduce_add_ps(sum) + (m->bias ? m->bias[row] : 0.0f) + (to->add ? *y : 0.0f);
}

static inline int64_t bytes_of(int64_t kind) { return kind == EXACT_24_BITS ? 3 : kind == FP32 ? 4 : 2; }

/* Where a row of dense weights begins. */
static inline const char *dense_at(const Matrix *m, int64_t row) {
    return (const char *)m->weight + row * m->columns * bytes_of(m->kind);
}

/* 16 dense weights of a row from column k on, which is a multiple of 16. */
static inline __attribute__((always_inline)) __m512 widened(const char *row, int64_t k, const int64_t kind) {
    if (kind == FP32) return _mm512_loadu_ps((const float *)row + k);
    if (kind == EXACT_FP16) return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(row + 2 * k)));
    if (kind != EXACT_24_BITS) return from_bf16((const uint16_t *)(row + 2 * k));
    const char *block = row + k / GROUP * BYTES_OF_24_BITS;
    const __m256i upper = _mm256_loadu_si256((const __m256i *)(block + k % GROUP * 2));
    const __m128i next = _mm_loadu_si128((const __m128i *)(block + GROUP * 2 + k % GROUP));
    return _mm512_castsi512_ps(_mm512_or_si512(_mm512_slli_epi32(_mm512_cvtepu16_epi32(upper), 16),
                                               _mm512_slli_epi32(_mm512_cvtepu8_epi32(next), 8)));
}

/* A row by a sequence in fp32, in one stream of memory. */
static inline __attribute__((always_inline)) void dense_row(const Matrix *m, const Rows *rows, const Target *to,
                                                            int64_t row, int64_t t, const int64_t kind) {
    const char *w = dense_at(m, row);
    const float *x = rows->x + t * m->columns;
    __m512 one = _mm512_setzero_ps(), two = _mm512_setzero_ps(); /* apart, as each waits for its last */
    for (int64_t k = 0; k < m->columns; k += 32) {
        _mm_prefetch(w + bytes_of(kind) * k + AHEAD, _MM_HINT_T0);
        one = _mm512_fmadd_ps(widened(w, k, kind), _mm512_loadu_ps(x + k), one);
        two = _mm512_fmadd_ps(widened(w, k + 16, kind), _mm512_loadu_ps(x + k + 16), two);
    }
    put_dense(m, to, row, t, _mm512_add_ps(one, two));
}

#ifdef __AVX512BF16__
/* 4 rows of bf16 by up to 4 sequences in bf16. */
static inline __attribute__((always_inline)) void
dense_tile(const Matrix *m, const Rows *rows, const Target *to, int64_t row, int64_t first, const int count) {
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
#ifdef __AVX512BF16__
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

/* The sums of four vectors. */
static inline __m128 sums_of(__m512 a, __m512 b, __m512 c, __m512 d) {
    __m512d ab = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)));
    __m512d cd = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d)));
    __m512d low = _mm512_unpacklo_pd(ab, cd), high = _mm512_unpackhi_pd(ab, cd);
    __m512 all = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

/* 4 rows of w, `bytes` apart, by up to 6 sequences of x, `columns` apart, over `depth` columns; gives their sums. */
static inline __attribute__((always_inline)) void exact_tile(const char *w, int64_t bytes, int64_t depth,
                                                             const float *x, int64_t columns, const int count,
                                                             const int64_t kind, __m128 sums[6]) {
    __m512 sum[4][6];
    for (int r = 0; r < 4; r++)
        for (int t = 0; t < count; t++) sum[r][t] = _mm512_setzero_ps();
    for (int64_t k = 0; k < depth; k += 16) {
        __m512 part[4];
        for (int r = 0; r < 4; r++) {
            if (kind != FP32) _mm_prefetch(w + (r + 4) * bytes + k * bytes_of(kind), _MM_HINT_T0); /* the next 4 rows */
            part[r] = widened(w + r * bytes, k, kind);
        }
        for (int t = 0; t < count; t++) {
            __m512 right = _mm512_loadu_ps(x + t * columns + k);
            __asm__("" : "+v"(right)); /* stays in its register: compilers else load it again for each of the 4 */
            for (int r = 0; r < 4; r++) sum[r][t] = _mm512_fmadd_ps(part[r], right, sum[r][t]);
        }
    }
    for (int t = 0; t < count; t++) sums[t] = sums_of(sum[0][t], sum[1][t], sum[2][t], sum[3][t]);
}

static inline __attribute__((always_inline)) void exact_tiles(const char *w, int64_t bytes, int64_t depth,
                                                              const float *x, int64_t columns, int64_t count,
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
static inline __attribute__((always_inline)) void widen(const Matrix *m, int64_t row, int64_t until, int64_t from,
                                                        int64_t depth, float *out, const int64_t kind) {
    for (; row < until; row++, out += depth)
        for (int64_t k = 0; k < depth; k += 16) _mm512_storeu_ps(out + k, widened(dense_at(m, row), from + k, kind));
}

/* Widened rows [row, until) by all sequences, over `depth` columns from `from` on. */
static void panel_rows(const Matrix *m, const Rows *rows, const Target *to, int64_t row, int64_t until, int64_t count,
                       int64_t from, int64_t depth) {
    const int64_t n = m->columns, tiles = (count + 5) / 6;
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
static inline __attribute__((always_inline)) void exact_rows(const Matrix *m, const Rows *rows, const Target *to,
                                                             int64_t row, int64_t until, int64_t count,
                                                             const int64_t kind) {
    const int64_t n = m->columns, tiles = (count + 5) / 6;
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

/* 16 rows and 32 columns of a packed weight: bytes by 4 columns in each lane, a lane a row. */
static inline __attribute__((always_inline)) void numbers_of(const uint8_t *block, const int bits, __m512i part[8]) {
    const __m512i low = _mm512_set1_epi8(15);
    for (int i = 0; i < 8; i++)
        if (bits == 8) {
            part[i] = _mm512_loadu_si512(block + 64 * i);
        } else {
            __m512i pairs = _mm512_loadu_si512(block + 64 * (i % 4));
            part[i] = _mm512_and_si512(i < 4 ? pairs : _mm512_srli_epi16(pairs, 4), low);
        }
}

/* 16 rows in 4 or 8 bits by a few sequences. 4 bits: weight = scale * number + offset, both of 32 columns. 8 bits:
   weight = scale * (number - 128), of the row. */
static inline __attribute__((always_inline)) void packed_tile(const Matrix *m, const Rows *rows, const Target *to,
                                                              int64_t row, int64_t first, const int count,
                                                              const int bits) {
    const int64_t n = m->columns, groups = n / GROUP, bytes = bits == 8 ? BYTES_OF_INT8 : BYTES_OF_INT4;
    const uint8_t *block = (const uint8_t *)m->weight + row / BLOCK * groups * bytes;
    __m512 sum[8];
    for (int t = 0; t < count; t++) sum[t] = _mm512_setzero_ps();
    for (int64_t g = 0; g < groups; g++, block += bytes) {
        __m512i part[8];
        __m512 scale, offset;
        for (int i = 0; i < bytes; i += 64) _mm_prefetch((const char *)block + AHEAD + i, _MM_HINT_T0);
        numbers_of(bits == 8 ? block : block + SCALES_OF_INT4, bits, part);
        if (bits == 4) {
            scale = from_bf16((const uint16_t *)block);
            offset = from_bf16((const uint16_t *)(block + SCALES_OF_INT4 / 2));
        }
        for (int t = 0; t < count; t++) {
            const int8_t *x = rows->q + (first + t) * n + g * GROUP;
            __m512i one = _mm512_setzero_si512(), two = _mm512_setzero_si512(); /* apart, as each waits for its last */
            for (int i = 0; i < 4; i++) {
                int32_t a, b;
                memcpy(&a, x + 4 * i, 4);
                memcpy(&b, x + 4 * i + 16, 4);
                one = _mm512_dpbusd_epi32(one, part[i], _mm512_set1_epi32(a));
                two = _mm512_dpbusd_epi32(two, part[i + 4], _mm512_set1_epi32(b));
            }
            const int64_t at = (first + t) * groups + g;
            __m512 dots = _mm512_cvtepi32_ps(_mm512_add_epi32(one, two)), by = _mm512_set1_ps(rows->scale[at]);
            sum[t] = _mm512_fmadd_ps(dots, bits == 4 ? _mm512_mul_ps(scale, by) : by, sum[t]);
            if (bits == 4) sum[t] = _mm512_fmadd_ps(offset, _mm512_set1_ps(rows->sum[at]), sum[t]);
        }
    }
    for (int t = 0; t < count; t++) {
        float *y = to->y + (first + t) * to->stride + row;
        if (bits == 8) {
            sum[t] = _mm512_fmadd_ps(_mm512_set1_ps(-128.0f), _mm512_set1_ps(rows->total[first + t]), sum[t]);
            sum[t] = _mm512_mul_ps(sum[t], _mm512_loadu_ps(m->scale + row));
        }
        if (m->bias) sum[t] = _mm512_add_ps(sum[t], _mm512_loadu_ps(m->bias + row));
        if (to->add) sum[t] = _mm512_add_ps(sum[t], _mm512_loadu_ps(y));
        _mm512_storeu_ps(y, sum[t]);
    }
}

/* Some packed rows by all sequences. */
static inline __attribute__((always_inline)) void packed_panel(const Matrix *m, const Rows *rows, const Target *to,
                                                               int64_t row, int64_t until, int64_t count,
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
        for (int64_t i = from * n; i < until * n; i += 16)
            to_bf16((uint16_t *)rows->q + i, _mm512_loadu_ps(rows->x + i));
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
    for (int64_t i = 0; i < count; i += 16) {
        const __m512 number = _mm512_loadu_ps(x + i);
        const __m512i bits = _mm512_castps_si512(number);
        const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 8), _mm512_set1_epi32(1));
        __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7f)));
        rounded = _mm512_mask_mov_epi32(rounded, _mm512_fpclass_ps_mask(number, 0x99), bits); /* NaN and infinity */
        rounded = _mm512_mask_or_epi32(rounded, _mm512_fpclass_ps_mask(number, 0x81), rounded, /* NaN, when cut */
                                       _mm512_set1_epi32(0x400000));
        uint8_t *block = out + i / GROUP * BYTES_OF_24_BITS;
        const __m256i upper = _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
        const __m128i next = _mm512_cvtepi32_epi8(_mm512_srli_epi32(rounded, 8));
        _mm256_storeu_si256((__m256i *)(block + i % GROUP * 2), upper);
        _mm_storeu_si128((__m128i *)(block + GROUP * 2 + i % GROUP), next);
    }
}

/* A packed matrix as bf16 [columns, rows], for products of many rows. */
void unpack(const Matrix *m, uint16_t *out, int64_t threads) {
    const int64_t groups = m->columns / GROUP, bytes = m->kind == INT8 ? BYTES_OF_INT8 : BYTES_OF_INT4;
    const __m512i byte = _mm512_set1_epi32(255);
#pragma omp parallel for num_threads((int)threads)
    for (int64_t row = 0; row < m->rows; row += BLOCK) {
        const uint8_t *block = (const uint8_t *)m->weight + row / BLOCK * groups * bytes;
        for (int64_t g = 0; g < groups; g++, block += bytes) {
            __m512i part[8];
            __m512 scale, offset;
            if (m->kind == INT8) {
                numbers_of(block, 8, part);
                scale = _mm512_loadu_ps(m->scale + row);
                offset = _mm512_mul_ps(scale, _mm512_set1_ps(-128.0f));
            } else {
                numbers_of(block + SCALES_OF_INT4, 4, part);
                scale = from_bf16((const uint16_t *)block);
                offset = from_bf16((const uint16_t *)(block + SCALES_OF_INT4 / 2));
            }
            for (int k = 0; k < GROUP; k++) {
                __m512i number = _mm512_and_si512(_mm512_srli_epi32(part[k / 4], 8 * (k % 4)), byte);
                __m512 value = _mm512_fmadd_ps(_mm512_cvtepi32_ps(number), scale, offset);
                to_bf16(out + (g * GROUP + k) * m->rows + row, value);
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

/* 16 kept numbers, from the i-th on. */
static inline __attribute__((always_inline)) __m512 kept(const void *numbers, int64_t i, const int wide) {
    return wide ? _mm512_loadu_ps((const float *)numbers + i) : from_bf16((const uint16_t *)numbers + i);
}

/* Keep numbers from the i-th on; where that rounds them, they become what is kept. */
static void keep(void *numbers, int64_t i, float *x, int64_t size, int wide, int writes) {
    if (wide) {
        if (writes) memcpy((float *)numbers + i, x, (size_t)size * sizeof(float));
        return;
    }
    for (int64_t j = 0; j < size; j += 16) {
        uint16_t narrow[16];
        to_bf16(narrow, _mm512_loadu_ps(x + j));
        _mm512_storeu_ps(x + j, from_bf16(narrow));
        if (writes) memcpy((uint16_t *)numbers + i + j, narrow, sizeof(narrow));
    }
}

static inline __attribute__((always_inline)) float dot_with_key(const float *q, const void *keys, int64_t at,
                                                                int64_t size, const int wide) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < size; i += 16) sum = _mm512_fmadd_ps(kept(keys, at + i, wide), _mm512_loadu_ps(q + i), sum);
    return _mm512_reduce_add_ps(sum);
}

/* Scores of n keys as shares; gives one over their sum. */
static float exponentials(float *scores, int64_t n) {
    const __m512 least = _mm512_set1_ps(-INFINITY);
    __m512 most = least, sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < n; i += 16) {
        __mmask16 some = n - i >= 16 ? 0xffff : (__mmask16)((1u << (n - i)) - 1);
        most = _mm512_max_ps(most, _mm512_mask_loadu_ps(least, some, scores + i));
    }
    most = _mm512_set1_ps(_mm512_reduce_max_ps(most));
    for (int64_t i = 0; i < n; i += 16) {
        __mmask16 some = n - i >= 16 ? 0xffff : (__mmask16)((1u << (n - i)) - 1);
        __m512 e = exponential(_mm512_sub_ps(_mm512_maskz_loadu_ps(some, scores + i), most));
        _mm512_mask_storeu_ps(scores + i, some, e);
        sum = _mm512_mask_add_ps(sum, some, sum, e);
    }
    return 1.0f / _mm512_reduce_add_ps(sum);
}

/* Shares of n kept values, from the at-th number on, and of a new one: out [d]. */
static inline __attribute__((always_inline)) void
weigh(const float *scores, int64_t n, float rate, const void *values, int64_t at, const float *newest, int64_t size,
      float *out, const int wide) {
    for (int64_t part = 0; part < size; part += 64) {
        const int64_t width = size - part < 64 ? size - part : 64;
        __m512 sum[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
        for (int64_t i = 0; i < n; i++) {
            const __m512 share = _mm512_set1_ps(scores[i]);
            for (int64_t j = 0; j < width / 16; j++)
                sum[j] = _mm512_fmadd_ps(share, kept(values, at + i * size + part + 16 * j, wide), sum[j]);
        }
        for (int64_t j = 0; j < width / 16; j++) {
            const __m512 last = _mm512_loadu_ps(newest + part + 16 * j);
            sum[j] = _mm512_fmadd_ps(_mm512_set1_ps(scores[n]), last, sum[j]);
            _mm512_storeu_ps(out + part + 16 * j, _mm512_mul_ps(sum[j], _mm512_set1_ps(rate)));
        }
    }
}

/* One head of one sequence attends to all that its slot holds and to the new token, whose key and value the first head
   of a group puts into the cache. heads: the sequence's queries, keys and values; out: [d]. */
static inline __attribute__((always_inline)) void
attend_in(const Model *model, const Layer *layer, const Cache *cache, int64_t number, int64_t slot, int64_t h,
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

static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

static int64_t widest(const Model *model) {
    return larger(larger(model->hidden, model->inner), model->queries * model->size);
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
        for (int64_t i = from * BLOCK; i < until * BLOCK; i += 16) {
            float *gate = both + t * 2 * inner + i;
            __m512 g = _mm512_loadu_ps(gate), up = _mm512_loadu_ps(gate + inner);
            __m512 e = exponential(_mm512_min_ps(_mm512_sub_ps(_mm512_setzero_ps(), g), _mm512_set1_ps(87.0f)));
            __m512 silu = _mm512_div_ps(g, _mm512_add_ps(e, _mm512_set1_ps(1.0f)));
            _mm512_storeu_ps(gate, _mm512_mul_ps(silu, up));
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
