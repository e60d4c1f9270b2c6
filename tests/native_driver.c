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
    if (c->what == MIXTURE) add_mixture(c->mixture, c->x, c->y, c->threads, c->memory);
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
    const int64_t bytes = kind == INT8 ? BYTES_OF_INT8 : BYTES_OF_INT4, count = rows / BLOCK * (columns / GROUP);
    uint8_t *packed = room(count * bytes);
    for (int64_t i = 0; i < count * bytes; i++) packed[i] = (uint8_t)(256.0f * (drawn() + 0.5f));
    for (int64_t i = 0; i < count && kind == INT4; i++)
        for (int k = 0; k < 32; k++) { /* scales, then offsets */
            const uint16_t part = upper_half(k < 16 ? 0.02f : -0.15f);
            memcpy(packed + i * bytes + 2 * k, &part, 2);
        }
    return packed;
}

static Matrix matrix_of(int64_t kind, int64_t rows, int64_t columns, int biased) {
    Matrix m = {NULL, NULL, biased ? floats(rows, 0.1f) : NULL, kind, rows, columns};
    if (kind == INT8 || kind == INT4) m.weight = blocks(rows, columns, kind);
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
    if (kind == INT8) {
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
    if (kind == INT8 || kind == INT4) {
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

/* Each row is sent to two of three experts. */
static void try_mixture(int64_t kind, int64_t hidden, int64_t inner, int64_t count) {
    Matrix gate_up[3], down[3];
    for (int e = 0; e < 3; e++) {
        gate_up[e] = matrix_of(kind, 2 * inner, hidden, 0);
        down[e] = matrix_of(kind, hidden, inner, 0);
    }
    int64_t *rows = room(2 * count * 8), *experts = room(2 * count * 8);
    for (int64_t p = 0; p < 2 * count; p++) rows[p] = p / 2, experts[p] = (p + p / 2) % 3;
    float *shares = floats(2 * count, 1.0f), *x = floats(count * hidden, 2.0f), *results[2];
    const Mixture mixture = {gate_up, down, rows, experts, shares, count, 2 * count};
    for (int several = 0; several < 2; several++) {
        char *memory = room(mixture_scratch_bytes(&mixture));
        results[several] = room(count * hidden * 4);
        memset(results[several], 0, (size_t)(count * hidden * 4));
        run((Call){.what = MIXTURE, .mixture = &mixture, .x = x, .y = results[several], .threads = several ? 3 : 1,
                   .memory = memory});
        free(memory);
    }
    compare(results[0], results[1], count * hidden * 4, "mixture");
    for (int64_t i = 0; i < count * hidden; i++)
        if (!isfinite(results[0][i])) exit(4);
    for (int e = 0; e < 3; e++) {
        free_matrix(gate_up[e]);
        free_matrix(down[e]);
    }
    for (int i = 0; i < 2; i++) free(results[i]);
    free(rows);
    free(experts);
    free(shares);
    free(x);
}

typedef struct {
    int64_t hidden, inner, queries, keys, size, vocabulary, capacity;
    int head_norms, wide;
} Shape;

static Layer layer_of(const Shape *s, int64_t kind) {
    const int64_t width = s->queries * s->size, all = (s->queries + 2 * s->keys) * s->size;
    return (Layer){matrix_of(kind, all, s->hidden, 1),
                   matrix_of(kind, s->hidden, width, 0),
                   matrix_of(kind, 2 * s->inner, s->hidden, 0),
                   matrix_of(kind, s->hidden, s->inner, 0),
                   floats(s->hidden, 1.0f),
                   s->head_norms ? floats(s->size, 1.0f) : NULL,
                   s->head_norms ? floats(s->size, 1.0f) : NULL,
                   floats(s->hidden, 1.0f)};
}

static void free_layer(const Layer *l) {
    free_matrix(l->qkv);
    free_matrix(l->o);
    free_matrix(l->gate_up);
    free_matrix(l->down);
    free((void *)l->input_norm);
    free((void *)l->q_norm);
    free((void *)l->k_norm);
    free((void *)l->mlp_norm);
}

/* A step of sequences of which one holds nothing, one all but the last place, the others something between. */
static void try_step(Shape s, int64_t kind, int64_t count) {
    Layer layers[2] = {layer_of(&s, kind), layer_of(&s, kind)};
    const int64_t half = s.capacity * s.size / 2, kept = 2 * SLOTS * s.keys * s.capacity * s.size;
    const int64_t bytes = kept * (s.wide ? 4 : 2);
    float *norm = floats(s.hidden, 1.0f), *cosines = floats(half, 2.0f), *sines = floats(half, 2.0f);
    Model model = {layers, matrix_of(kind, s.vocabulary, s.hidden, 0), norm, cosines, sines,
                   2, s.hidden, s.inner, s.queries, s.keys, s.size, 0.2f, 1e-6f, 1e-6f};
    int64_t *places = room(count * 8);
    for (int64_t t = 0; t < count; t++) places[t] = (s.capacity - 1) * t / (count > 1 ? count - 1 : 1);
    void *before[2] = {s.wide ? (void *)floats(kept, 1.0f) : (void *)halves(kept, BF16), NULL}, *after[2][2];
    before[1] = copy_of(before[0], bytes);
    float *embedded = floats(count * s.hidden, 2.0f), *logits[2];
    for (int several = 0; several < 2; several++) {
        for (int i = 0; i < 2; i++) after[several][i] = copy_of(before[i], bytes);
        Cache cache = {after[several][0], after[several][1], s.wide, SLOTS, s.capacity, places};
        float *x = copy_of(embedded, count * s.hidden * 4);
        const int64_t threads = several ? 3 : 1;
        char *memory = room(scratch_bytes(&model, &cache, count, threads));
        logits[several] = room(count * s.vocabulary * 4);
        run((Call){.what = STEP, .model = &model, .cache = &cache, .x = x, .y = logits[several], .count = count,
                   .threads = threads, .memory = memory});
        free(memory);
        free(x);
    }
    compare(logits[0], logits[1], count * s.vocabulary * 4, "logits");
    for (int i = 0; i < 2; i++) compare(after[0][i], after[1][i], bytes, "the cache");
    for (int64_t i = 0; i < count * s.vocabulary; i++)
        if (!isfinite(logits[0][i])) exit(4);
    for (int i = 0; i < 2; i++) {
        free(logits[i]);
        free(before[i]);
        free(after[0][i]);
        free(after[1][i]);
        free_layer(&layers[i]);
    }
    free_matrix(model.head);
    free(norm);
    free(cosines);
    free(sines);
    free(places);
    free(embedded);
}

int main(int count, char **arguments) {
#ifdef TEAM
    if (count > 1) left_out = atoi(arguments[1]);
    const int64_t counts[] = {3, 50}, kinds[] = {BF16, INT4, EXACT_24_BITS};
#else
    (void)count, (void)arguments;
    const int64_t counts[] = {1, 2, 3, 4, 7, 13, 50}, kinds[] = {BF16, INT8, INT4, EXACT_BF16, EXACT_FP16, EXACT_24_BITS};
#endif
    const Shape shapes[] = {
        {32, 32, 1, 1, 32, 16, 1, 0, 1},     /* the smallest: fewer blocks of rows than threads, nothing held */
        {96, 160, 3, 1, 32, 80, 19, 1, 0},   /* three heads that share a key */
        {64, 32, 4, 2, 80, 336, 33, 0, 0},   /* heads wider than 64, one block more than a panel */
        {1056, 64, 2, 2, 16, 48, 5, 1, 1},   /* more columns than a panel is deep */
    };
    for (size_t k = 0; k < sizeof(kinds) / sizeof(*kinds); k++)
        for (size_t c = 0; c < sizeof(counts) / sizeof(*counts); c++) {
            try_product(kinds[k], 16, 32, counts[c]);
            try_product(kinds[k], 80, 1056, counts[c]);
            try_mixture(kinds[k], 32, 32, counts[c]);
            try_mixture(kinds[k], 80 * 2, 96, counts[c]);
            for (size_t i = 0; i < sizeof(shapes) / sizeof(*shapes); i++) try_step(shapes[i], kinds[k], counts[c]);
        }
    puts("done");
    return 0;
}
