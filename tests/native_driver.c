/* Runs the kernels of answer_step.c over odd shapes, each buffer exactly as large as it has to be, so that sanitizers see
   every access beyond it. Several threads have to give what one gives, bit for bit.

   With -DTEAM the threads are POSIX threads that call a function together, as OpenMP's would go through its parallel
   region: ThreadSanitizer does not understand the barriers of an OpenMP library that was built without it. The source is
   then a copy in which each `#pragma omp barrier` is a call of `team_barrier` with its number, and each parallel loop
   takes its share of the turns. The barrier whose number is the argument is left out. */

#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifdef TEAM
static _Thread_local int own_number;
static int team_size = 1, left_out = -1;
/* One each: at a shared one, a thread that is late to leave would seem to have waited for what the others did since. */
static pthread_barrier_t meetings[16];
static int omp_get_thread_num(void) { return own_number; }
static int omp_get_num_threads(void) { return team_size; }
static void team_barrier(int number) {
    if (number != left_out) pthread_barrier_wait(&meetings[number]);
}
#endif

#include SOURCE

#define SLOTS 56

/* --- Calls by a team of threads ----------------------------------------------------------------------------------- */

enum { STEP, PRODUCT, UNPACK, TO_24_BITS, MIXTURE };

typedef struct {
    int what;
    const Model *model;
    const Cache *cache;
    const Matrix *matrix;
    const Mixture *mixture;
    float *x, *y;
    void *out;
    int64_t count, threads;
    char *memory;
} Call;

static void *make(void *argument) {
    const Call *c = argument;
    if (c->what == STEP) answer_step(c->model, c->cache, c->x, c->count, c->threads, c->memory, c->y);
    if (c->what == PRODUCT) multiply_rows(c->matrix, c->x, c->count, c->threads, c->memory, c->y);
    if (c->what == MIXTURE) apply_mixture(c->mixture, c->x, c->count, c->threads, c->memory, c->y);
    if (c->what == UNPACK) unpack(c->matrix, c->out, c->threads);
    if (c->what == TO_24_BITS) to_24_bits(c->x, c->out, c->count, c->threads);
    return NULL;
}

#ifdef TEAM
typedef struct {
    Call call;
    int number;
} Member;

static void *join_in(void *argument) {
    Member *member = argument;
    own_number = member->number;
    return make(&member->call);
}

static void run(Call call) {
    pthread_t threads[8];
    Member members[8];
    team_size = (int)call.threads;
    for (int i = 0; i < 16; i++) pthread_barrier_init(&meetings[i], NULL, (unsigned)team_size);
    for (int i = 0; i < team_size; i++) {
        members[i] = (Member){call, i};
        pthread_create(&threads[i], NULL, join_in, &members[i]);
    }
    for (int i = 0; i < team_size; i++) pthread_join(threads[i], NULL);
    for (int i = 0; i < 16; i++) pthread_barrier_destroy(&meetings[i]);
}
#else
static void run(Call call) { make(&call); }
#endif

/* --- Random content ----------------------------------------------------------------------------------------------- */

static uint32_t state = 1;

static float drawn(void) { /* in [-0.5, 0.5) */
    state = state * 1664525u + 1013904223u;
    return (float)(state >> 8) / 16777216.0f - 0.5f;
}

static void *room(int64_t bytes) {
    void *memory = malloc((size_t)bytes);
    if (!memory) abort();
    return memory;
}

static float *floats(int64_t count, float size) {
    float *numbers = room(count * 4);
    for (int64_t i = 0; i < count; i++) numbers[i] = size * drawn();
    return numbers;
}

static uint16_t upper_half(float number) {
    uint32_t bits;
    memcpy(&bits, &number, 4);
    return (uint16_t)(bits >> 16);
}

static uint16_t *halves(int64_t count, int64_t kind) {
    uint16_t *numbers = room(count * 2);
    for (int64_t i = 0; i < count; i++)
        numbers[i] = kind == EXACT_FP16 ? (uint16_t)(0x2c00 | (state & 0x83ff)) : upper_half(0.3f * drawn()), drawn();
    return numbers;
}

static uint8_t *blocks(int64_t rows, int64_t columns, int64_t kind) {
    const int64_t bytes = kind == OF_INT8 ? BYTES_OF_INT8 : BYTES_OF_INT4, count = rows / BLOCK * (columns / GROUP);
    uint8_t *packed = room(count * bytes);
    for (int64_t i = 0; i < count * bytes; i++) packed[i] = (uint8_t)(256.0f * (drawn() + 0.5f));
    for (int64_t i = 0; i < count && kind == OF_INT4; i++)
        for (int k = 0; k < 32; k++) { /* scales, then offsets */
            const uint16_t part = upper_half(k < 16 ? 0.02f : -0.15f);
            memcpy(packed + i * bytes + 2 * k, &part, 2);
        }
    return packed;
}

static Matrix matrix_of(int64_t kind, int64_t rows, int64_t columns, int biased) {
    Matrix m = {NULL, NULL, biased ? floats(rows, 0.1f) : NULL, kind, rows, columns};
    if (kind == OF_INT8 || kind == OF_INT4) m.weight = blocks(rows, columns, kind);
    else if (kind == EXACT_24_BITS) {
        float *wide = floats(rows * columns, 0.3f);
        uint8_t *one = room(rows * columns * 3), *many = room(rows * columns * 3);
        run((Call){.what = TO_24_BITS, .x = wide, .out = one, .count = rows * columns, .threads = 1});
        run((Call){.what = TO_24_BITS, .x = wide, .out = many, .count = rows * columns, .threads = 3});
        if (memcmp(one, many, (size_t)(rows * columns * 3))) abort();
        free(wide);
        free(one);
        m.weight = many;
    } else m.weight = halves(rows * columns, kind);
    if (kind == OF_INT8) {
        float *scale = floats(rows, 0.002f);
        m.scale = scale;
    }
    return m;
}

static void free_matrix(Matrix m) {
    free((void *)m.weight);
    free((void *)m.scale);
    free((void *)m.bias);
}

static void *copy_of(const void *from, int64_t bytes) { return memcpy(room(bytes), from, (size_t)bytes); }

static void compare(const void *one, const void *other, int64_t bytes, const char *what) {
    if (memcmp(one, other, (size_t)bytes)) {
        printf("%s: several threads give something else than one\n", what);
        exit(3);
    }
}

/* --- Shapes ------------------------------------------------------------------------------------------------------- */

static void try_product(int64_t kind, int64_t rows, int64_t columns, int64_t count) {
    Matrix m = matrix_of(kind, rows, columns, count % 2 == 1);
    float *x = floats(count * columns, 2.0f), *results[2];
    for (int several = 0; several < 2; several++) {
        const int64_t threads = several ? 3 : 1;
        char *memory = room(product_scratch_bytes(&m, count, threads));
        results[several] = room(count * rows * 4);
        run((Call){.what = PRODUCT, .matrix = &m, .x = x, .y = results[several], .count = count, .threads = threads,
                   .memory = memory});
        free(memory);
    }
    compare(results[0], results[1], count * rows * 4, "product");
    for (int64_t i = 0; i < count * rows; i++)
        if (!isfinite(results[0][i])) exit(4);
    if (kind == OF_INT8 || kind == OF_INT4) {
        uint16_t *one = room(rows * columns * 2), *many = room(rows * columns * 2);
        run((Call){.what = UNPACK, .matrix = &m, .out = one, .threads = 1});
        run((Call){.what = UNPACK, .matrix = &m, .out = many, .threads = 3});
        compare(one, many, rows * columns * 2, "unpacked");
        free(one);
        free(many);
    }
    free(results[0]);
    free(results[1]);
    free(x);
    free_matrix(m);
}

static MLP mlp_of(int64_t kind, int64_t hidden, int64_t inner, int64_t activation) {
    return (MLP){matrix_of(kind, 2 * inner, hidden, 0), matrix_of(kind, hidden, inner, 0), activation};
}

static void free_mlp(MLP mlp) {
    free_matrix(mlp.gate_up);
    free_matrix(mlp.down);
}

/* Each row is sent to two of three experts. */
static Mixture *mixture_of(int64_t kind, int64_t hidden, int64_t inner, int64_t shared) {
    const int64_t dense = kind == OF_INT8 || kind == OF_INT4 ? OF_BF16 : kind;
    MLP *experts = room(3 * sizeof(MLP)), *common = shared ? room(sizeof(MLP)) : NULL;
    for (int e = 0; e < 3; e++) experts[e] = mlp_of(kind, hidden, inner, SILU);
    if (shared) *common = mlp_of(kind, hidden, shared, SILU);
    const Matrix gate = shared ? matrix_of(dense, 16, hidden, 0) : (Matrix){0};
    const Mixture mixture = {matrix_of(dense, 16, hidden, 0), experts, common, gate, 3, 2, shared > 0};
    return copy_of(&mixture, sizeof(mixture));
}

static void free_mixture(const Mixture *mixture) {
    for (int e = 0; e < 3; e++) free_mlp(mixture->experts[e]);
    if (mixture->shared) free_mlp(*mixture->shared);
    free_matrix(mixture->router);
    free_matrix(mixture->shared_gate);
    free((void *)mixture->experts);
    free((void *)mixture->shared);
    free((void *)mixture);
}

static void try_mixture(int64_t kind, int64_t hidden, int64_t inner, int64_t shared, int64_t count) {
    Mixture *mixture = mixture_of(kind, hidden, inner, shared);
    float *x = floats(count * hidden, 2.0f), *results[2];
    for (int several = 0; several < 2; several++) {
        const int64_t threads = several ? 3 : 1;
        char *memory = room(mixture_scratch_bytes(mixture, count, threads));
        results[several] = room(count * hidden * 4);
        run((Call){.what = MIXTURE, .mixture = mixture, .x = x, .y = results[several], .count = count,
                   .threads = threads, .memory = memory});
        free(memory);
    }
    compare(results[0], results[1], count * hidden * 4, "mixture");
    for (int64_t i = 0; i < count * hidden; i++)
        if (!isfinite(results[0][i])) exit(4);
    for (int i = 0; i < 2; i++) free(results[i]);
    free(x);
    free_mixture(mixture);
}

/* gated: queries with gates, capped scores, norms on outputs, a window, partly turned heads, a mixture and a delta net,
   all at once. */
typedef struct {
    int64_t hidden, inner, queries, keys, size, vocabulary, capacity;
    int head_norms, wide, gated;
} Shape;

enum { KEY_HEADS = 2, VALUE_HEADS = 4, KEY_SIZE = 8, VALUE_SIZE = 16, SEEN = 3 };
enum { CHANNELS = 2 * KEY_HEADS * KEY_SIZE + VALUE_HEADS * VALUE_SIZE };

static Layer layer_of(const Shape *s, int64_t kind, int delta) {
    const int64_t width = s->queries * s->size, dense = kind == OF_INT8 || kind == OF_INT4 ? OF_BF16 : kind;
    Layer layer = {.input_norm = floats(s->hidden, 1.0f), .mlp_norm = floats(s->hidden, 1.0f)};
    if (s->gated) {
        layer.mixer_output_norm = floats(s->hidden, 1.0f);
        layer.mlp_output_norm = floats(s->hidden, 1.0f);
    }
    if (delta) {
        const int64_t read = VALUE_HEADS * VALUE_SIZE;
        const DeltaNet net = {matrix_of(kind, CHANNELS + read, s->hidden, 0),
                              matrix_of(dense, 16, s->hidden, 0),
                              matrix_of(kind, s->hidden, read, 0),
                              floats(SEEN * CHANNELS, 1.0f), floats(VALUE_HEADS, 1.0f), floats(VALUE_HEADS, 1.0f),
                              floats(VALUE_SIZE, 1.0f)};
        layer.net = copy_of(&net, sizeof(net));
        layer.mixture = mixture_of(kind, s->hidden, s->inner, 32);
    } else {
        const int64_t all = (s->queries * (1 + s->gated) + 2 * s->keys) * s->size;
        const Attention attention = {matrix_of(kind, all, s->hidden, 1), matrix_of(kind, s->hidden, width, 0),
                                     s->head_norms ? floats(s->size, 1.0f) : NULL,
                                     s->head_norms ? floats(s->size, 1.0f) : NULL,
                                     s->gated ? 3 : s->capacity, s->gated};
        const MLP mlp = mlp_of(kind, s->hidden, s->inner, s->gated ? GELU_TANH : SILU);
        layer.attention = copy_of(&attention, sizeof(attention));
        layer.mlp = copy_of(&mlp, sizeof(mlp));
    }
    return layer;
}

static void free_layer(const Layer *l) {
    const float *norms[] = {l->input_norm, l->mlp_norm, l->mixer_output_norm, l->mlp_output_norm};
    for (int i = 0; i < 4; i++) free((void *)norms[i]);
    if (l->attention) {
        free_matrix(l->attention->qkv);
        free_matrix(l->attention->o);
        free((void *)l->attention->q_norm);
        free((void *)l->attention->k_norm);
        free_mlp(*l->mlp);
    } else {
        const float *parts[] = {l->net->taps, l->net->rate, l->net->bias, l->net->weight};
        free_matrix(l->net->qkv_z);
        free_matrix(l->net->b_a);
        free_matrix(l->net->out);
        for (int i = 0; i < 4; i++) free((void *)parts[i]);
        free_mixture(l->mixture);
    }
    free((void *)l->attention);
    free((void *)l->net);
    free((void *)l->mlp);
}

enum { KEPT = 4 }; /* keys, values, a delta net's rows and its states */

static Cache cache_of(const Shape *s, void *const kept[KEPT], const int64_t *places, const Turns *turns,
                      const float *factors) {
    return (Cache){kept[0], kept[1], s->wide, SLOTS, s->capacity, places, kept[2], kept[3], turns, factors};
}

/* A step of sequences of which one holds nothing, one all but the last place, the others something between. */
static void try_step(Shape s, int64_t kind, int64_t count) {
    Layer layers[3] = {layer_of(&s, kind, 0), layer_of(&s, kind, 0)};
    if (s.gated) layers[2] = layer_of(&s, kind, 1);
    layers[1].number = 1;
    const int64_t half = s.size / 2, numbers = 2 * SLOTS * s.keys * s.capacity * s.size;
    const int64_t bytes_of_keys = numbers * (s.wide ? 4 : 2), rows = SLOTS * (SEEN - 1) * CHANNELS;
    const int64_t states = SLOTS * VALUE_HEADS * KEY_SIZE * VALUE_SIZE;
    const int64_t sizes[KEPT] = {bytes_of_keys, bytes_of_keys, rows * 4, states * 4};
    float *norm = floats(s.hidden, 1.0f), *parts[4], *factors = s.gated ? floats(count, 1.0f) : NULL;
    for (int i = 0; i < 4; i++) parts[i] = floats(count * (i < 2 ? half : half - 3), 2.0f);
    const Turns turns[2] = {{parts[0], parts[1], half}, {parts[2], parts[3], half - 3}};
    Model model = {layers, matrix_of(kind, s.vocabulary, s.hidden, 0), norm,
                   s.gated ? 3 : 2, s.hidden, s.queries, s.keys, s.size, s.gated,
                   KEY_HEADS, VALUE_HEADS, KEY_SIZE, VALUE_SIZE, SEEN, 0.2f, 1e-6f, 1e-6f, s.gated ? 2.0f : 0.0f};
    int64_t *places = room(count * 8);
    for (int64_t t = 0; t < count; t++) places[t] = (s.capacity - 1) * t / (count > 1 ? count - 1 : 1);
    void *before[KEPT], *after[2][KEPT];
    before[0] = s.wide ? (void *)floats(numbers, 1.0f) : (void *)halves(numbers, OF_BF16);
    before[1] = copy_of(before[0], bytes_of_keys);
    before[2] = floats(rows, 1.0f);
    before[3] = floats(states, 1.0f);
    float *embedded = floats(count * s.hidden, 2.0f), *logits[2];
    for (int several = 0; several < 2; several++) {
        for (int i = 0; i < KEPT; i++) after[several][i] = copy_of(before[i], sizes[i]);
        const Cache cache = cache_of(&s, after[several], places, turns, factors);
        const int64_t threads = several ? 3 : 1;
        char *memory = room(scratch_bytes(&model, &cache, count, threads));
        logits[several] = room(count * s.vocabulary * 4);
        run((Call){.what = STEP, .model = &model, .cache = &cache, .x = embedded, .y = logits[several], .count = count,
                   .threads = threads, .memory = memory});
        free(memory);
    }
    compare(logits[0], logits[1], count * s.vocabulary * 4, "logits");
    for (int i = 0; i < KEPT; i++) compare(after[0][i], after[1][i], sizes[i], "the cache");
    for (int64_t i = 0; i < count * s.vocabulary; i++)
        if (!isfinite(logits[0][i])) exit(4);
    for (int i = 0; i < KEPT; i++) {
        free(before[i]);
        free(after[0][i]);
        free(after[1][i]);
        free(parts[i]);
    }
    for (int64_t i = 0; i < model.count; i++) free_layer(&layers[i]);
    for (int i = 0; i < 2; i++) free(logits[i]);
    free_matrix(model.head);
    free(norm);
    free(factors);
    free(places);
    free(embedded);
}

int main(int count, char **arguments) {
#ifdef TEAM
    if (count > 1) left_out = atoi(arguments[1]);
    const int64_t counts[] = {3, 50}, kinds[] = {OF_BF16, OF_INT4, EXACT_24_BITS};
#else
    (void)count, (void)arguments;
    const int64_t counts[] = {1, 2, 3, 4, 7, 13, 50}, kinds[] = {OF_BF16, OF_INT8, OF_INT4, EXACT_BF16, EXACT_FP16, EXACT_24_BITS};
#endif
    const Shape shapes[] = {
        {32, 32, 1, 1, 32, 16, 1, 0, 1, 0},   /* the smallest: fewer blocks of rows than threads, nothing held */
        {96, 160, 3, 1, 32, 80, 19, 1, 0, 1}, /* three heads that share a key */
        {64, 32, 4, 2, 80, 336, 33, 0, 0, 0}, /* heads wider than 64, one block more than a panel */
        {1056, 64, 2, 2, 16, 48, 5, 1, 1, 1}, /* more columns than a panel is deep */
    };
    for (size_t k = 0; k < sizeof(kinds) / sizeof(*kinds); k++)
        for (size_t c = 0; c < sizeof(counts) / sizeof(*counts); c++) {
            try_product(kinds[k], 16, 32, counts[c]);
            try_product(kinds[k], 80, 1056, counts[c]);
            try_mixture(kinds[k], 32, 32, 0, counts[c]);
            try_mixture(kinds[k], 80 * 2, 96, 64, counts[c]);
            for (size_t i = 0; i < sizeof(shapes) / sizeof(*shapes); i++) try_step(shapes[i], kinds[k], counts[c]);
        }
    puts("done");
    return 0;
}
