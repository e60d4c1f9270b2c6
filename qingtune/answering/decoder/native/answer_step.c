/* One new token of each of several sequences through a Qwen2, Qwen3 or Llama decoder, on a CPU with AVX2 or AVX-512.

   A step reads all weights once; everything else stays in the caches. All threads go through the whole step together
   and meet at barriers, five a layer; each owns a range of every matrix's rows. Activations are fp32.

   Shapes: T sequences, D hidden size, I inner size, H query heads, G key-value heads, d head size, V vocabulary. */

#include <math.h>
#include <omp.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "attention.h"
#include "matrices.h"

/* --- Single matrices --------------------------------------------------------------------------------------------- */

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
            const Floats g = load(gate), e = exponential_of(smaller(minus(zeros(), g), every(87.0f)));
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

/* --- A mixture of experts ---------------------------------------------------------------------------------------- */

/* Rows, and what they are sent to: pairs of a row and one of its experts, with the expert's share. */
typedef struct {
    const Matrix *gate_up, *down; /* of all experts, [2 I, D] and [D, I] */
    const int64_t *rows, *experts; /* [P] */
    const float *shares;           /* [P] */
    int64_t count, pairs;          /* T and P */
} Mixture;

typedef struct {
    Rows rows, inner;
    float *both, *out; /* [P, 2 I], [P, D] */
} MixtureRoom;

static void take_mixture(Scratch *from, const Mixture *mixture, MixtureRoom *room) {
    const int64_t hidden = mixture->gate_up->columns, inner = mixture->down->columns;
    take_rows(from, &room->rows, mixture->count, hidden);
    room->inner.x = take(from, mixture->pairs * inner);
    take_rows(from, &room->inner, mixture->pairs, inner);
    room->both = take(from, mixture->pairs * 2 * inner);
    room->out = take(from, mixture->pairs * hidden);
}

/* Bytes of scratch for a mixture. */
int64_t mixture_scratch_bytes(const Mixture *mixture) {
    Scratch scratch = {NULL, 0};
    MixtureRoom room;
    take_mixture(&scratch, mixture, &room);
    return scratch.used;
}

static Rows row_of(const Rows *rows, int64_t t, int64_t columns) {
    return (Rows){rows->x + t * columns,         rows->q + t * columns, rows->scale + t * columns / GROUP,
                  rows->sum + t * columns / GROUP, rows->total + t,       NULL};
}

/* To y [T, D] is added the sum of what each row's experts give, each times its share; x [T, D]. An expert is
   down(silu(gate x) * up x). */
void add_mixture(const Mixture *mixture, float *x, float *y, int64_t most_threads, char *memory) {
    const int64_t hidden = mixture->gate_up->columns, inner = mixture->down->columns, pairs = mixture->pairs;
    Scratch scratch = {memory, 0};
    MixtureRoom room;
    take_mixture(&scratch, mixture, &room);
    room.rows.x = x;
#pragma omp parallel num_threads((int)most_threads)
    {
        const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
        const int64_t first = pairs * thread / threads, last = pairs * (thread + 1) / threads;
        const int64_t from = share(hidden, thread, threads), until = share(hidden, thread + 1, threads);
        Rows inputs = room.rows, inners = room.inner;
        prepare(mixture->gate_up, &inputs, mixture->count * thread / threads, mixture->count * (thread + 1) / threads, 1);
#pragma omp barrier
        for (int64_t p = 0; p < pairs; p++) {
            const Rows one = row_of(&inputs, mixture->rows[p], hidden);
            gated(mixture->gate_up + mixture->experts[p], &one, 1, inner, thread, threads, room.both + p * 2 * inner);
        }
#pragma omp barrier
        for (int64_t p = first; p < last; p++)
            memcpy(inners.x + p * inner, room.both + p * 2 * inner, (size_t)inner * sizeof(float));
        prepare(mixture->down, &inners, first, last, 1);
#pragma omp barrier
        for (int64_t p = 0; p < pairs; p++) {
            const Rows one = row_of(&inners, p, inner);
            float *out = room.out + p * hidden, *to = y + mixture->rows[p] * hidden;
            multiply(mixture->down + mixture->experts[p], &one, 1, from, until, (Target){out, hidden, 0});
            for (int64_t i = from * BLOCK; i < until * BLOCK; i++) to[i] += mixture->shares[p] * out[i];
        }
    }
}
