/* The gated delta net between its projections, forward and backward: convolution, SiLU, lengths of queries and keys, and
   the recurrence. A head of keys with its heads of values goes through all chunks of a pass, so that what it needs stays
   in the second cache; heads are shared among threads, and results do not depend on how many there are.

   Numbers are fp32 or bf16 in memory as `kind` says; shapes as in delta_chunk.h, T tokens of the layout. */

#include <omp.h>

#include "delta_chunk.h"

/* Tokens first..first + count of a segment, n of them after filling up. */
typedef struct {
    Segment segment;
    int64_t first, count, n;
} Chunk;

/* What a call is given besides its rows, as Python lays it out. */
typedef struct {
    int64_t tokens, segments, key_heads, share, key_size, value_size, seen;
} Sizes;

static Net net_of(const Sizes *sizes, const Segment *segments, const char *qkv, const float *taps, const float *decay,
                  const float *beta, char *states, float epsilon) {
    const int64_t heads = sizes->key_heads, d = sizes->key_size, e = sizes->value_size;
    const Convolution conv = {qkv, taps, 2 * heads * d + heads * sizes->share * e, sizes->seen};
    return (Net){conv, segments, decay, beta, states, sizes->tokens, sizes->segments, heads, sizes->share, d, e, epsilon};
}

/* How many fp32 numbers of room a thread needs. */
int64_t delta_room(const Sizes *sizes) {
    const Net net = net_of(sizes, 0, 0, 0, 0, 0, 0, 0.0f);
    Room room;
    return lay_out_room(&net, &room, 0);
}

static Part queries_of(const Net *net, int64_t head) {
    return (Part){head * net->d, net->d, 1.0f / sqrtf((float)net->d)};
}

static Part keys_of(const Net *net, int64_t head) {
    return (Part){(net->key_heads + head) * net->d, net->d, 1.0f};
}

/* Of value head number `head` of all. */
static Part values_of(const Net *net, int64_t head) {
    return (Part){2 * net->key_heads * net->d + head * net->e, net->e, 0.0f};
}

static Chunk chunk_of(Segment segment, int64_t first) {
    const int64_t left = segment.end - first, count = left < CHUNK ? left : CHUNK;
    return (Chunk){segment, first, count, (count + 15) / 16 * 16};
}

/* Where a value head's kept state lies. */
static char *state_at(const Net *net, int64_t number, int64_t head, int64_t kind) {
    return at(net->states, (number * net->key_heads * net->share + head) * net->d * net->e, kind);
}

INLINE void write_numbers(void *to, const float *from, int64_t count, int kind) {
#pragma omp simd
    for (int64_t i = 0; i < count; i++) put(to, i, from[i], kind);
}

INLINE void read_numbers(float *to, const void *from, int64_t count, int kind) {
#pragma omp simd
    for (int64_t i = 0; i < count; i++) to[i] = get(from, i, kind);
}

static void keep(const Net *net, const float *state, int64_t number, int64_t key_head, int64_t kind) {
    char *to = state_at(net, number, key_head * net->share, kind);
    BY_KIND(write_numbers, kind, to, state, net->share * net->d * net->e);
}

static void recall(const Net *net, float *state, int64_t number, int64_t key_head, int64_t kind) {
    const char *from = state_at(net, number, key_head * net->share, kind);
    BY_KIND(read_numbers, kind, state, from, net->share * net->d * net->e);
}

/* Write what a sequence starts from, zero for none. */
static void start(float *numbers, const float *from, int64_t count) {
    if (from) memcpy(numbers, from, (size_t)count * 4);
    else memset(numbers, 0, (size_t)count * 4);
}

static void add_to(float *total, const float *numbers, int64_t count) {
    for (int64_t i = 0; i < count; i++) total[i] += numbers[i];
}

/* Queries, keys and values of a chunk, and products of the first two. */
static void prepare(const Net *net, const Room *r, Chunk c, int64_t head, int64_t kind) {
    const Convolution *conv = &net->conv;
    const int64_t d = net->d, e = net->e, filled = c.n - c.count;
    float *keys = r->kq, *queries = r->kq + c.n * d;
    part_forward(conv, c.segment, c.first, c.count, keys_of(net, head), r->mixed_k, keys, r->rates_k, net->epsilon, kind);
    part_forward(conv, c.segment, c.first, c.count, queries_of(net, head), r->mixed_q, queries, r->rates_q, net->epsilon,
                 kind);
    start(keys + c.count * d, 0, filled * d);
    start(queries + c.count * d, 0, filled * d);
    for (int64_t i = 0; i < net->share; i++) {
        float *v = r->v + i * CHUNK * e;
        part_forward(conv, c.segment, c.first, c.count, values_of(net, head * net->share + i), r->mixed_v + i * CHUNK * e,
                     v, 0, 0.0f, kind);
        start(v + c.count * e, 0, filled * e);
    }
    multiply_keys(net, r, c.n, NARROW(kind));
}

/* --- Forward ------------------------------------------------------------------------------------------------------ */

/* Of value head number `head` of all, the i-th of its key head. */
static void forward_value(const Net *net, const Room *r, Chunk c, int64_t head, int64_t i, char *out, int64_t kind) {
    const int64_t e = net->e, width = net->key_heads * net->share * e, place = head * net->tokens + c.first;
    decays(r, net->decay + place, net->beta + place, c.count, c.n);
    rule_forward(net, r, r->state + i * net->d * e, r->v + i * CHUNK * e, c.n, NARROW(kind));
    for (int64_t t = 0; t < c.count; t++) {
        char *row = at(out, (c.first + t) * width + head * e, kind);
        BY_KIND(write_numbers, kind, row, r->reads + (c.n + t) * e, e);
    }
}

static void forward_head(const Net *net, const Room *r, int64_t head, char *out, int64_t kind) {
    const int64_t state = net->share * net->d * net->e;
    int64_t kept = 0;
    for (int64_t s = 0; s < net->count; s++) {
        const Segment segment = net->segments[s];
        start(r->state, segment.shared ? r->shared : 0, state);
        for (int64_t first = segment.start; first < segment.end; first += CHUNK) {
            if (first > segment.start) keep(net, r->state, ++kept, head, kind);
            const Chunk c = chunk_of(segment, first);
            prepare(net, r, c, head, kind);
            for (int64_t i = 0; i < net->share; i++) forward_value(net, r, c, head * net->share + i, i, out, kind);
        }
        if (s > 0) continue;
        start(r->shared, r->state, state);
        keep(net, r->state, 0, head, kind);
    }
}

/* qkv [T, channels] and taps [seen, channels], g and beta [K, R, T] fp32 -> what tokens read, out [T, K R e], and states
   for the backward pass; room: fp32 [threads, delta_room]. */
void delta_forward(const char *qkv, const float *taps, const float *decay, const float *beta, char *states, char *out,
                   const Segment *segments, const Sizes *sizes, float *room, float epsilon, int64_t kind,
                   int64_t threads) {
    const Net net = net_of(sizes, segments, qkv, taps, decay, beta, states, epsilon);
    const int64_t each = delta_room(sizes);
    PARALLEL
    for (int64_t head = 0; head < net.key_heads; head++) {
        Room r;
        lay_out_room(&net, &r, room + omp_get_thread_num() * each);
        forward_head(&net, &r, head, out, kind);
    }
}

/* --- Backward ----------------------------------------------------------------------------------------------------- */

/* Where gradients go: of rows of kind, of g and log beta [K, R, T] fp32, and of taps, if they are wanted. */
typedef struct {
    const char *reads;
    char *rows;
    float *decay, *beta, *taps;
} Gradients;

static void backward_value(const Net *net, const Room *r, Chunk c, int64_t head, int64_t i, Gradients g, int64_t kind) {
    const int64_t e = net->e, width = net->key_heads * net->share * e, place = head * net->tokens + c.first;
    float *grad = r->grad_reads + c.n * e, sum = 0.0f;
    for (int64_t t = 0; t < c.count; t++) {
        const char *row = at(g.reads, (c.first + t) * width + head * e, kind);
        BY_KIND(read_numbers, kind, grad + t * e, row, e);
    }
    start(grad + c.count * e, 0, (c.n - c.count) * e);
    decays(r, net->decay + place, net->beta + place, c.count, c.n);
    const int64_t state = i * net->d * e, values = i * CHUNK * e;
    rule_backward(net, r, r->state + state, r->v + values, r->grad_state + state, r->grad_v + values, c.count, c.n, i > 0,
                  NARROW(kind));
    memcpy(g.beta + place, r->grad_beta, (size_t)c.count * 4);
    for (int64_t t = c.count - 1; t >= 0; t--) g.decay[place + t] = sum += r->grad_decay[t];
}

/* From the gradient of a part, which is overwritten, to that of its rows; next: of mixed of the seen - 1 tokens after the
   chunk, which becomes that for the chunk before it. */
static void part_backward(const Net *net, const Room *r, Chunk c, Part part, float *grad, const float *out,
                          const float *mixed, const float *rates, float *next, Gradients g, int64_t kind) {
    const int64_t numbers = c.count * part.size, after = (net->conv.seen - 1) * part.size;
    part_activation_backward(grad, out, mixed, rates, c.count, part);
    start(r->grad_mixed, grad, numbers);
    start(r->grad_mixed + numbers, next, after);
    part_convolution_backward(&net->conv, c.segment, c.first, c.count, part, r->grad_mixed, g.rows, g.taps, kind);
    start(next, r->grad_mixed, after);
}

static void backward_chunk(const Net *net, const Room *r, Chunk c, int64_t head, Gradients g, int64_t kind) {
    const int64_t d = net->d, e = net->e, after = net->conv.seen - 1;
    prepare(net, r, c, head, kind);
    for (int64_t i = 0; i < net->share; i++) backward_value(net, r, c, head * net->share + i, i, g, kind);
    keys_backward(net, r, c.n, NARROW(kind));
    part_backward(net, r, c, keys_of(net, head), r->grad_kq, r->kq, r->mixed_k, r->rates_k, r->next, g, kind);
    part_backward(net, r, c, queries_of(net, head), r->grad_kq + c.n * d, r->kq + c.n * d, r->mixed_q, r->rates_q,
                  r->next + after * d, g, kind);
    for (int64_t i = 0; i < net->share; i++)
        part_backward(net, r, c, values_of(net, head * net->share + i), r->grad_v + i * CHUNK * e, r->v + i * CHUNK * e,
                      r->mixed_v + i * CHUNK * e, 0, r->next + after * (2 * d + i * e), g, kind);
}

static void backward_head(const Net *net, const Room *r, int64_t head, Gradients g, int64_t kind) {
    const int64_t state = net->share * net->d * net->e, after = (net->conv.seen - 1) * (2 * net->d + net->share * net->e);
    int64_t kept = 0;
    for (int64_t s = 0; s < net->count; s++) kept += (net->segments[s].end - net->segments[s].start - 1) / CHUNK;
    start(r->grad_shared, 0, state);
    start(r->next_shared, 0, after);
    for (int64_t s = net->count - 1; s >= 0; s--) {
        const Segment segment = net->segments[s];
        start(r->grad_state, s ? 0 : r->grad_shared, state);
        start(r->next, s ? 0 : r->next_shared, after);
        for (int64_t number = (segment.end - segment.start - 1) / CHUNK; number >= 0; number--) {
            if (number) recall(net, r->state, kept--, head, kind);
            else if (segment.shared) recall(net, r->state, 0, head, kind);
            else start(r->state, 0, state);
            backward_chunk(net, r, chunk_of(segment, segment.start + number * CHUNK), head, g, kind);
        }
        if (!segment.shared) continue;
        add_to(r->grad_shared, r->grad_state, state);
        add_to(r->next_shared, r->next, after);
    }
}

/* What delta_forward took, and the gradient of what it gave -> those of qkv, g and log beta; that of taps is added to
   grad_taps, if given. */
void delta_backward(const char *grad, const char *qkv, const float *taps, const float *decay, const float *beta,
                    char *states, char *grad_qkv, float *grad_decay, float *grad_beta, float *grad_taps,
                    const Segment *segments, const Sizes *sizes, float *room, float epsilon, int64_t kind,
                    int64_t threads) {
    const Net net = net_of(sizes, segments, qkv, taps, decay, beta, states, epsilon);
    const Gradients g = {grad, grad_qkv, grad_decay, grad_beta, grad_taps};
    const int64_t each = delta_room(sizes);
    PARALLEL
    for (int64_t head = 0; head < net.key_heads; head++) {
        Room r;
        lay_out_room(&net, &r, room + omp_get_thread_num() * each);
        backward_head(&net, &r, head, g, kind);
    }
}
