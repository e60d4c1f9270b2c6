/* One new token of each of several sequences through a decoder, on a CPU with AVX2 or AVX-512. Its layers (model.h) have
   attention or a gated delta net, and an MLP or a mixture of experts.

   A step reads all weights once; everything else stays in the caches. All threads go through the whole step together
   and meet at barriers, four or five a layer; each owns a range of every matrix's rows, and holds all hidden states.
   Activations are fp32. Shapes: see model.h. */

#include <math.h>
#include <omp.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "attention.h"
#include "delta_token.h"
#include "mixture.h"
#include "model.h"

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
    const int64_t groups = m->columns / GROUP, bytes = m->kind == OF_INT8 ? BYTES_OF_INT8 : BYTES_OF_INT4;
#pragma omp parallel for num_threads((int)threads)
    for (int64_t row = 0; row < m->rows; row += LANES) {
        const int part = (int)(row % BLOCK / LANES);
        const uint8_t *block = (const uint8_t *)m->weight + row / BLOCK * groups * bytes;
        for (int64_t g = 0; g < groups; g++, block += bytes) {
            Ints weights[8];
            Floats scale, offset;
            if (m->kind == OF_INT8) {
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

/* --- What threads work with -------------------------------------------------------------------------------------- */

/* Numbers of a token that are held at a time. */
typedef struct {
    int64_t row;                          /* that a matrix multiplies, at most */
    int64_t mixed, gates, seen;           /* of a mixer: what its first matrices give, what its last one reads */
    int64_t both, logits, experts, pairs; /* of an MLP or a mixture */
} Widths;

typedef struct {
    float *mixed, *gates, *seen, *both, *logits, *given;
} Shared;

typedef struct {
    int64_t thread, threads, count;
    float *x;      /* [T, D]: hidden states, which all threads compute */
    Rows rows;
    float *scores; /* room for them, or for shares of experts */
    Pair *pairs;
} Worker;

static int64_t larger_of(int64_t a, int64_t b) { return a > b ? a : b; }

static void widen_for_mlp(Widths *w, const MLP *mlp) { w->row = larger_of(w->row, mlp->down.columns); }

static void widen_for(Widths *w, const Layer *layer) {
    if (layer->attention) {
        w->mixed = larger_of(w->mixed, layer->attention->qkv.rows);
        w->seen = larger_of(w->seen, layer->attention->o.columns);
    }
    if (layer->net) {
        w->mixed = larger_of(w->mixed, layer->net->qkv_z.rows);
        w->gates = larger_of(w->gates, layer->net->b_a.rows);
        w->seen = larger_of(w->seen, layer->net->out.columns);
    }
    if (layer->mlp) {
        widen_for_mlp(w, layer->mlp);
        w->both = larger_of(w->both, 2 * layer->mlp->down.columns);
    }
    if (layer->mixture) {
        const Mixture *mixture = layer->mixture;
        widen_for_mlp(w, mixture->experts);
        int64_t both = mixture->chosen * 2 * mixture->experts->down.columns, logits = mixture->router.rows;
        if (mixture->shared) {
            widen_for_mlp(w, mixture->shared);
            both += 2 * mixture->shared->down.columns;
            logits += mixture->shared_gate.rows;
        }
        w->both = larger_of(w->both, both);
        w->logits = larger_of(w->logits, logits);
        w->experts = larger_of(w->experts, mixture->count);
        w->pairs = larger_of(w->pairs, mixture->chosen);
    }
}

static Widths widths_of(const Model *model) {
    Widths widths = {.row = model->hidden};
    for (int64_t i = 0; i < model->count; i++) widen_for(&widths, model->layers + i);
    widths.row = larger_of(widths.row, widths.seen);
    return widths;
}

/* Room for all threads up to the worker's, which it gets the last of. */
static Shared take_all(Scratch *from, const Model *model, int64_t capacity, Worker *worker) {
    const Widths widths = widths_of(model);
    const int64_t count = worker->count, of_pairs = 2 * widths.pairs * (int64_t)(sizeof(Pair) / sizeof(float));
    Shared shared;
    shared.mixed = take(from, count * widths.mixed);
    shared.gates = take(from, count * widths.gates);
    shared.seen = take(from, count * widths.seen);
    shared.both = take(from, count * widths.both);
    shared.logits = take(from, count * widths.logits);
    shared.given = take(from, count * model->hidden);
    for (int64_t i = 0; i <= worker->thread; i++) {
        worker->x = take(from, count * model->hidden);
        worker->rows.x = take(from, count * widths.row);
        worker->rows.panel = take(from, PANEL * DEPTH);
        take_rows(from, &worker->rows, count, widths.row);
        worker->scores = take(from, larger_of(capacity, widths.experts) + 16);
        worker->pairs = (Pair *)take(from, count * of_pairs);
    }
    return shared;
}

/* Bytes of scratch for a number of threads. */
static int64_t bytes_for(const Model *model, int64_t capacity, int64_t count, int64_t threads) {
    Scratch scratch = {NULL, 0};
    Worker last = {.thread = threads - 1, .threads = threads, .count = count};
    take_all(&scratch, model, capacity, &last);
    return scratch.used;
}

/* --- A step ------------------------------------------------------------------------------------------------------ */

/* A thread's rows of a matrix by all that it has: y [T, N]. */
static void project(const Matrix *m, Worker *w, float *y) {
    prepare(m, &w->rows, 0, w->count, w->count);
    multiply(m, &w->rows, w->count, share(m->rows, w->thread, w->threads), share(m->rows, w->thread + 1, w->threads),
             (Target){y, m->rows, 0});
}

/* Have the first numbers of each row, `stride` apart, as what the next matrix multiplies. */
static void read_rows(Worker *w, const float *from, int64_t stride, int64_t width) {
    for (int64_t t = 0; t < w->count; t++)
        memcpy(w->rows.x + t * width, from + t * stride, (size_t)width * sizeof(float));
}

static void normalise_rows(const Model *model, Worker *w, const float *weight) {
    const int64_t hidden = model->hidden;
    for (int64_t t = 0; t < w->count; t++)
        normalise(w->x + t * hidden, weight, model->epsilon, hidden, w->rows.x + t * hidden);
}

/* Add what a block gave, normed where it has a norm, to the hidden states. */
static void add_rows(const Model *model, Worker *w, const float *given, const float *norm) {
    const int64_t hidden = model->hidden;
    for (int64_t t = 0; t < w->count; t++) {
        float *x = w->x + t * hidden;
        const float *more = given + t * hidden;
        if (norm) {
            normalise(more, norm, model->epsilon, hidden, w->rows.x);
            more = w->rows.x;
        }
        for (int64_t i = 0; i < hidden; i += LANES) store(x + i, plus(load(x + i), load(more + i)));
    }
}

/* A delta net's layer as delta_token.h takes it. */
static DeltaStep delta_of(const Model *model, const Layer *layer, const Cache *cache, int64_t count, const Shared *s) {
    const DeltaNet *net = layer->net;
    const int64_t heads = model->value_heads, inputs = net->qkv_z.rows, gates = net->b_a.rows;
    const int64_t channels = 2 * model->key_heads * model->key_size + heads * model->value_size;
    const int64_t first = layer->number * cache->slots;
    return (DeltaStep){
        .qkv = {(const char *)s->mixed, inputs}, .z = {(const char *)(s->mixed + channels), inputs},
        .b = {(const char *)s->gates, gates}, .a = {(const char *)(s->gates + heads), gates},
        .rows = cache->rows + first * (model->seen - 1) * channels,
        .states = cache->states + first * heads * model->key_size * model->value_size,
        .taps = net->taps, .rate = net->rate, .bias = net->bias, .weight = net->weight, .out = s->seen,
        .sequences = count, .channels = channels, .key_heads = model->key_heads, .share = heads / model->key_heads,
        .key_size = model->key_size, .value_size = model->value_size, .seen = model->seen,
        .length_epsilon = model->length_epsilon, .norm_epsilon = model->epsilon,
    };
}

/* A thread's heads of all sequences: from what the mixer's first matrices gave to what its last one reads. */
static void mix_heads(const Model *model, const Layer *layer, const Cache *cache, Worker *w, const Shared *s) {
    const int64_t heads = layer->attention ? model->queries : model->value_heads, items = w->count * heads;
    const int64_t first = items * w->thread / w->threads, last = items * (w->thread + 1) / w->threads;
    if (layer->attention) {
        const int64_t all = layer->attention->qkv.rows, width = heads * model->size;
        for (int64_t item = first; item < last; item++)
            attend(model, layer, cache, item / heads, item % heads, s->mixed + item / heads * all, w->scores,
                   s->seen + item / heads * width + item % heads * model->size);
    } else {
        const DeltaStep step = delta_of(model, layer, cache, w->count, s);
        for (int64_t item = first; item < last; item++) one_head(&step, item / heads, item % heads, FP32);
    }
}

/* x + mixer(norm(x)). */
static void mixer(const Model *model, const Layer *layer, const Cache *cache, Worker *w, const Shared *s) {
    const Matrix *last = layer->attention ? &layer->attention->o : &layer->net->out;
    normalise_rows(model, w, layer->input_norm);
    project(layer->attention ? &layer->attention->qkv : &layer->net->qkv_z, w, s->mixed);
    if (layer->net) project(&layer->net->b_a, w, s->gates);
#pragma omp barrier
    mix_heads(model, layer, cache, w, s);
#pragma omp barrier
    if (layer->net) {
        const DeltaStep step = delta_of(model, layer, cache, w->count, s);
        for (int64_t t = w->thread; t < w->count; t += w->threads) keep_newest(&step, t, FP32);
    }
    read_rows(w, s->seen, last->columns, last->columns);
    project(last, w, s->given);
#pragma omp barrier
    add_rows(model, w, s->given, layer->mixer_output_norm);
}

/* What a mixture gives rows.x [T, D]: given [T, D], of which a thread writes its columns. */
static void mix_experts(const Mixture *mixture, Worker *w, const Shared *s, float *given) {
    const MLP *shared = mixture->shared;
    const int64_t count = w->count, experts = mixture->router.rows, hidden = mixture->router.columns;
    const int64_t inner = mixture->experts->down.columns, pairs = count * mixture->chosen;
    const int64_t from = share(hidden, w->thread, w->threads), until = share(hidden, w->thread + 1, w->threads);
    float *gates = s->logits + count * experts, *both = s->both;
    project(&mixture->router, w, s->logits);
    if (shared) {
        project(&mixture->shared_gate, w, gates);
        prepare(&shared->gate_up, &w->rows, 0, count, count);
        gated(shared, &w->rows, count, w->thread, w->threads, both);
        both += count * 2 * shared->down.columns;
    }
#pragma omp barrier
    Pair *chosen = route(mixture, s->logits, count, w->scores, w->pairs);
    prepare(&mixture->experts->gate_up, &w->rows, 0, count, 1);
    for (int64_t p = 0; p < pairs; p++) {
        const Rows one = row_of(&w->rows, chosen[p].row, hidden);
        gated(mixture->experts + chosen[p].expert, &one, 1, w->thread, w->threads, both + p * 2 * inner);
    }
#pragma omp barrier
    if (shared) {
        const int64_t width = shared->down.columns;
        for (int64_t t = 0; t < count; t++) {
            float share_of[LANES];
            store(share_of, sigmoid_of(every(gates[t * mixture->shared_gate.rows])));
            scale_row(s->both + t * 2 * width, share_of[0], width, w->rows.x + t * width);
        }
        project(&shared->down, w, given);
    } else {
        for (int64_t t = 0; t < count; t++)
            memset(given + t * hidden + from * BLOCK, 0, (size_t)((until - from) * BLOCK) * sizeof(float));
    }
    for (int64_t p = 0; p < pairs; p++) {
        const Matrix *down = &mixture->experts[chosen[p].expert].down;
        scale_row(both + p * 2 * inner, chosen[p].share, inner, w->rows.x);
        prepare(down, &w->rows, 0, 1, 1);
        multiply(down, &w->rows, 1, from, until, (Target){given + chosen[p].row * hidden, hidden, 1});
    }
}

/* x + mlp(norm(x)). */
static void feed_forward(const Model *model, const Layer *layer, Worker *w, const Shared *s) {
    normalise_rows(model, w, layer->mlp_norm);
    if (layer->mixture) mix_experts(layer->mixture, w, s, s->given);
    else {
        const Matrix *down = &layer->mlp->down;
        prepare(&layer->mlp->gate_up, &w->rows, 0, w->count, w->count);
        gated(layer->mlp, &w->rows, w->count, w->thread, w->threads, s->both);
#pragma omp barrier
        read_rows(w, s->both, 2 * down->columns, down->columns);
        project(down, w, s->given);
    }
#pragma omp barrier
    add_rows(model, w, s->given, layer->mlp_output_norm);
}

/* Bytes of scratch for steps of T sequences. */
int64_t scratch_bytes(const Model *model, const Cache *cache, int64_t count, int64_t threads) {
    return bytes_for(model, cache->capacity, count, threads);
}

/* x [T, D], the embeddings of new tokens, through all layers; logits [T, V]. */
void answer_step(const Model *model, const Cache *cache, const float *x, int64_t count, int64_t most_threads,
                 char *memory, float *logits) {
#pragma omp parallel num_threads((int)most_threads)
    {
        Scratch scratch = {memory, 0};
        Worker worker = {.thread = omp_get_thread_num(), .threads = omp_get_num_threads(), .count = count};
        const Shared shared = take_all(&scratch, model, cache->capacity, &worker);
        memcpy(worker.x, x, (size_t)(count * model->hidden) * sizeof(float));
        for (int64_t number = 0; number < model->count; number++) {
            mixer(model, model->layers + number, cache, &worker, &shared);
            feed_forward(model, model->layers + number, &worker, &shared);
        }
        normalise_rows(model, &worker, model->norm);
        project(&model->head, &worker, logits);
    }
}

/* --- A mixture by itself ----------------------------------------------------------------------------------------- */

/* A model of nothing but a mixture. */
static Model alone(const Layer *layer) {
    return (Model){.layers = layer, .count = 1, .hidden = layer->mixture->router.columns};
}

/* Bytes of scratch for a mixture. */
int64_t mixture_scratch_bytes(const Mixture *mixture, int64_t count, int64_t threads) {
    const Layer layer = {.mixture = mixture};
    const Model model = alone(&layer);
    return bytes_for(&model, 0, count, threads);
}

/* What a mixture gives x [T, D]: y [T, D]. */
void apply_mixture(const Mixture *mixture, const float *x, int64_t count, int64_t most_threads, char *memory, float *y) {
    const Layer layer = {.mixture = mixture};
    const Model model = alone(&layer);
#pragma omp parallel num_threads((int)most_threads)
    {
        Scratch scratch = {memory, 0};
        Worker worker = {.thread = omp_get_thread_num(), .threads = omp_get_num_threads(), .count = count};
        const Shared shared = take_all(&scratch, &model, 0, &worker);
        read_rows(&worker, x, model.hidden, model.hidden);
        mix_experts(mixture, &worker, &shared, y);
    }
}
