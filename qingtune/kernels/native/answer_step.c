/* One new token of each of several sequences through a Qwen2, Qwen3 or Llama decoder, on a CPU with AVX-512 and VNNI.

   A step reads all weights once; everything else stays in the caches. All threads go through the whole step together
   and meet at barriers, five a layer; each owns a range of every matrix's rows. Activations are fp32. For weights in 8
   and 4 bits they are rounded to int8, 32 at a time with a scale each, and multiplied by the int8 units.

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
/* Of 16 rows by 32 columns; in 4 bits scales and offsets come first, then numbers, two in a byte. */
#define SCALES_OF_INT4 64
#define BYTES_OF_INT4 320
#define BYTES_OF_INT8 512

enum { DENSE, INT8, INT4 };

typedef struct {
    const void *weight; /* bf16 [rows, columns], or blocks [rows / 16, columns / 32] */
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
    uint16_t *keys, *values;   /* bf16 [layers, slots, G, capacity, d] */
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
static void round_rows(Rows *rows, int64_t count, int64_t columns) {
    for (int64_t t = 0; t < count; t++) {
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

static inline void put(const Matrix *m, const Target *to, int64_t t, int64_t row, float value) {
    float *y = to->y + t * to->stride + row;
    *y = value + (m->bias ? m->bias[row] : 0.0f) + (to->add ? *y : 0.0f);
}

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

/* A row of bf16 by a sequence in fp32, in one stream of memory. */
static inline void dense_row(const Matrix *m, const Rows *rows, const Target *to, int64_t row, int64_t t) {
    const uint16_t *w = (const uint16_t *)m->weight + row * m->columns;
    const float *x = rows->x + t * m->columns;
    __m512 one = _mm512_setzero_ps(), two = _mm512_setzero_ps(); /* apart, as each waits for its last */
    for (int64_t k = 0; k < m->columns; k += 32) {
        _mm_prefetch((const char *)(w + k) + AHEAD, _MM_HINT_T0);
        one = _mm512_fmadd_ps(from_bf16(w + k), _mm512_loadu_ps(x + k), one);
        two = _mm512_fmadd_ps(from_bf16(w + k + 16), _mm512_loadu_ps(x + k + 16), two);
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

/* A block of rows of bf16 by all sequences. */
static void dense_block(const Matrix *m, const Rows *rows, const Target *to, int64_t row, int64_t count) {
#ifdef __AVX512BF16__
    if (rounds_to_bf16(count)) {
        int64_t t = 0;
        for (; t + 4 <= count; t += 4)
            for (int64_t r = row; r < row + BLOCK; r += 4) dense_tile(m, rows, to, r, t, 4);
        for (; t < count; t++)
            for (int64_t r = row; r < row + BLOCK; r += 4) dense_tile(m, rows, to, r, t, 1);
        return;
    }
#endif
    for (int64_t t = 0; t < count; t++)
        for (int64_t r = row; r < row + BLOCK; r++) dense_row(m, rows, to, r, t);
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

/* Blocks [from, until) of a matrix's rows. */
static void multiply(const Matrix *m, const Rows *rows, int64_t count, int64_t from, int64_t until, Target to) {
    for (int64_t row = from * BLOCK; row < until * BLOCK; row += BLOCK) {
        int64_t t = 0;
        if (m->kind == INT4) {
            for (; t + 8 <= count; t += 8) packed_tile(m, rows, &to, row, t, 8, 4);
            for (; t + 4 <= count; t += 4) packed_tile(m, rows, &to, row, t, 4, 4);
            for (; t < count; t++) packed_tile(m, rows, &to, row, t, 1, 4);
        } else if (m->kind == INT8) {
            for (; t + 8 <= count; t += 8) packed_tile(m, rows, &to, row, t, 8, 8);
            for (; t + 4 <= count; t += 4) packed_tile(m, rows, &to, row, t, 4, 8);
            for (; t < count; t++) packed_tile(m, rows, &to, row, t, 1, 8);
        } else {
            dense_block(m, rows, &to, row, count);
        }
    }
}

static void prepare(const Matrix *m, Rows *rows, int64_t count) {
    if (m->kind != DENSE)
        round_rows(rows, count, m->columns);
    else if (rounds_to_bf16(count))
        for (int64_t i = 0; i < count * m->columns; i += 16) to_bf16((uint16_t *)rows->q + i, _mm512_loadu_ps(rows->x + i));
}

static inline int64_t share(int64_t rows, int64_t thread, int64_t threads) { return rows / BLOCK * thread / threads; }

static float *take(char **from, int64_t count) {
    float *here = (float *)*from;
    *from += (count * 4 + 63) / 64 * 64;
    return here;
}

static void take_rows(char **from, Rows *rows, int64_t count, int64_t columns) {
    rows->x = take(from, count * columns);
    rows->q = (int8_t *)take(from, count * columns / 2);
    rows->scale = take(from, count * columns / GROUP);
    rows->sum = take(from, count * columns / GROUP);
    rows->total = take(from, count);
}

/* Bytes of scratch for a product of a few rows. */
int64_t product_scratch_bytes(const Matrix *m, int64_t count) {
    char *end = NULL;
    Rows rows;
    take_rows(&end, &rows, count, m->columns);
    return (int64_t)(end - (char *)NULL);
}

/* A few rows x [T, K] by a matrix, with its bias: y [T, N]. */
void multiply_rows(const Matrix *m, const float *x, int64_t count, int64_t most_threads, char *scratch, float *y) {
    Rows rows;
    take_rows(&scratch, &rows, count, m->columns);
    memcpy(rows.x, x, (size_t)(count * m->columns) * sizeof(float));
    prepare(m, &rows, count);
#pragma omp parallel num_threads((int)most_threads)
    {
        const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
        multiply(m, &rows, count, share(m->rows, thread, threads), share(m->rows, thread + 1, threads),
                 (Target){y, m->rows, 0});
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

static float dot_with_key(const float *q, const uint16_t *key, int64_t size) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < size; i += 16) sum = _mm512_fmadd_ps(from_bf16(key + i), _mm512_loadu_ps(q + i), sum);
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

/* One head of one sequence attends to all that its slot holds and to the new token, whose key and value the first head
   of a group puts into the cache. heads: the sequence's queries, keys and values; out: [d]. */
static void attend(const Model *model, const Layer *layer, const Cache *cache, int64_t number, int64_t slot, int64_t h,
                   const float *heads, float *scores, float *out) {
    const int64_t size = model->size, shared = model->queries / model->keys, g = h / shared;
    const int64_t n = cache->places[slot];
    const int64_t at = (((number * cache->slots) + slot) * model->keys + g) * cache->capacity * size;
    uint16_t *keys = cache->keys + at, *values = cache->values + at;
    float q[size], k[size];
    uint16_t key[size], value[size];
    place_head(model, heads + h * size, layer->q_norm, model->head_epsilon, n, q);
    place_head(model, heads + (model->queries + g) * size, layer->k_norm, model->head_epsilon, n, k);
    const float *v = heads + (model->queries + model->keys + g) * size;
    for (int64_t i = 0; i < size; i += 16) {
        to_bf16(key + i, _mm512_loadu_ps(k + i));
        to_bf16(value + i, _mm512_loadu_ps(v + i));
    }
    if (h == g * shared) { /* no other thread reads this place in this step */
        memcpy(keys + n * size, key, sizeof(key));
        memcpy(values + n * size, value, sizeof(value));
    }
    for (int64_t i = 0; i <= n; i++)
        scores[i] = model->scale * dot_with_key(q, i < n ? keys + i * size : key, size);
    __m512 rate = _mm512_set1_ps(exponentials(scores, n + 1));
    for (int64_t part = 0; part < size; part += 64) {
        const int64_t width = size - part < 64 ? size - part : 64;
        __m512 sum[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
        for (int64_t i = 0; i <= n; i++) {
            const uint16_t *row = (i < n ? values + i * size : value) + part;
            __m512 share = _mm512_set1_ps(scores[i]);
            for (int64_t j = 0; j < width / 16; j++)
                sum[j] = _mm512_fmadd_ps(share, from_bf16(row + 16 * j), sum[j]);
        }
        for (int64_t j = 0; j < width / 16; j++) _mm512_storeu_ps(out + part + 16 * j, _mm512_mul_ps(sum[j], rate));
    }
}

/* --- A step ------------------------------------------------------------------------------------------------------ */

static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

static int64_t widest(const Model *model) {
    return larger(larger(model->hidden, model->inner), model->queries * model->size);
}

/* Bytes of scratch for steps of T sequences. */
int64_t scratch_bytes(const Model *model, const Cache *cache, int64_t count, int64_t threads) {
    char *end = NULL;
    Rows rows;
    for (int64_t i = 0; i < threads; i++) {
        take_rows(&end, &rows, count, widest(model));
        take(&end, cache->capacity + 16);
    }
    take(&end, count * (model->queries + 2 * model->keys) * model->size);
    take(&end, count * model->queries * model->size);
    take(&end, count * 2 * model->inner);
    return (int64_t)(end - (char *)NULL);
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
void answer_step(const Model *model, const Cache *cache, float *x, int64_t count, int64_t most_threads, char *scratch,
                 float *logits) {
    const int64_t hidden = model->hidden, inner = model->inner, width = model->queries * model->size;
    const int64_t all = (model->queries + 2 * model->keys) * model->size;
    float *heads = take(&scratch, count * all), *seen = take(&scratch, count * width);
    float *both = take(&scratch, count * 2 * inner);
    char *private = scratch;
#pragma omp parallel num_threads((int)most_threads)
    {
        const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads(); /* not more than most_threads */
        char *own = private;
        Rows rows;
        float *scores = NULL;
        for (int64_t i = 0; i <= thread; i++) {
            take_rows(&own, &rows, count, widest(model));
            scores = take(&own, cache->capacity + 16);
        }
        for (int64_t number = 0; number < model->count; number++) {
            const Layer *layer = model->layers + number;
            for (int64_t t = 0; t < count; t++)
                normalise(x + t * hidden, layer->input_norm, model->epsilon, hidden, rows.x + t * hidden);
            prepare(&layer->qkv, &rows, count);
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
            prepare(&layer->o, &rows, count);
            multiply(&layer->o, &rows, count, share(hidden, thread, threads), share(hidden, thread + 1, threads),
                     (Target){x, hidden, 1});
#pragma omp barrier
            for (int64_t t = 0; t < count; t++)
                normalise(x + t * hidden, layer->mlp_norm, model->epsilon, hidden, rows.x + t * hidden);
            prepare(&layer->gate_up, &rows, count);
            gated(&layer->gate_up, &rows, count, inner, thread, threads, both);
#pragma omp barrier
            for (int64_t t = 0; t < count; t++)
                memcpy(rows.x + t * inner, both + t * 2 * inner, (size_t)inner * sizeof(float));
            prepare(&layer->down, &rows, count);
            multiply(&layer->down, &rows, count, share(hidden, thread, threads), share(hidden, thread + 1, threads),
                     (Target){x, hidden, 1});
#pragma omp barrier
        }
        for (int64_t t = 0; t < count; t++)
            normalise(x + t * hidden, model->norm, model->epsilon, hidden, rows.x + t * hidden);
        prepare(&model->head, &rows, count);
        const int64_t vocabulary = model->head.rows;
        multiply(&model->head, &rows, count, share(vocabulary, thread, threads),
                 share(vocabulary, thread + 1, threads), (Target){logits, vocabulary, 0});
    }
}
