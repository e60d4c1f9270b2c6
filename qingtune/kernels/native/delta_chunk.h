/* A chunk of tokens of one head by the gated delta rule, forward and backward (formulas in kernels/delta/rule.py). All
   of it in fp32, but where the machine has dot products of bf16 and memory holds bf16, factors of products are rounded to
   it, but for the triangular system.

   Shapes: n tokens of a chunk, filled up to a multiple of 16 with tokens that change nothing; K key heads, R value heads
   a key head, d and e the sizes of keys and values, multiples of 16. */

#ifndef DELTA_CHUNK_H
#define DELTA_CHUNK_H

#include "delta_heads.h"
#include "small_products.h"

#define NARROW(kind) (BF16_UNITS && (kind) == BF16)

/* What a call computes. */
typedef struct {
    Convolution conv;
    const Segment *segments;
    const float *decay, *beta; /* g and beta, [K, R, T] */
    char *states;              /* [1 + T / CHUNK, K, R, d, e]: after the shared beginning, and at starts of chunks */
    int64_t tokens, count, key_heads, share, d, e;
    float epsilon;
} Net;

/* What a thread needs besides; those with R are there for each value head. */
typedef struct {
    float *mixed_q, *mixed_k, *mixed_v;       /* [n, d], [n, d], R [n, e]: what the convolution gives */
    float *kq, *v;                            /* [2 n, d], keys first; R [n, e] */
    float *rates_q, *rates_k;                 /* [n] */
    float *decay, *beta, *since, *until;      /* [n]: sums of g, beta, decays since the chunk's start, until its end */
    float *kq_rows, *kq_columns;              /* kq as factors */
    float *products, *within, *scores;        /* [2 n, n], [n, n], [2 n, n] */
    float *solved, *reads, *missing, *added;  /* [n, n], [2 n, e], [n, e], [n, e] */
    float *state, *shared;                    /* R [d, e]: the state, and that after the shared beginning */
    float *left, *right;                      /* factors of the product at hand */
    float *grad_state, *grad_shared;          /* R [d, e]: of what a chunk leaves to the next one */
    float *grad_reads, *grad_added, *kept;    /* [2 n, e], [n, e], [n, e] */
    float *grad_scores, *weights;             /* [2 n, n] */
    float *grad_kq, *grad_v, *grad_part;      /* [2 n, d], R [n, e], [2 n, d] */
    float *grad_decay, *grad_beta;            /* [n]: of sums of g, and of log beta */
    float *grad_mixed;                        /* [n + seen - 1, d or e] */
    float *next, *next_shared;                /* [2 d + R e, seen - 1]: of mixed of the tokens after the chunk */
} Room;

typedef struct {
    float *base;
    int64_t used;
} Store;

static float *take(Store *store, int64_t numbers) {
    float *place = store->base ? store->base + store->used : 0;
    store->used += (numbers + 15) / 16 * 16 + 16; /* not all at the same place of a page */
    return place;
}

/* Returns how many numbers a thread needs. */
static int64_t lay_out_room(const Net *net, Room *r, float *base) {
    const int64_t d = net->d, e = net->e, share = net->share, n = CHUNK, largest = d > e ? d : e, after = net->conv.seen - 1;
    Store store = {base, 0}, *s = &store;
    r->mixed_q = take(s, n * d), r->mixed_k = take(s, n * d), r->mixed_v = take(s, share * n * e);
    r->kq = take(s, 2 * n * d), r->v = take(s, share * n * e);
    r->rates_q = take(s, n), r->rates_k = take(s, n);
    r->decay = take(s, n), r->beta = take(s, n), r->since = take(s, n), r->until = take(s, n);
    r->kq_rows = take(s, 2 * n * d), r->kq_columns = take(s, 2 * n * d);
    r->products = take(s, 2 * n * n), r->within = take(s, n * n), r->scores = take(s, 2 * n * n);
    r->solved = take(s, n * n), r->reads = take(s, 2 * n * e), r->missing = take(s, n * e), r->added = take(s, n * e);
    r->state = take(s, share * d * e), r->shared = take(s, share * d * e);
    const int64_t factor = d * e > 2 * n * largest ? d * e : 2 * n * largest;
    r->left = take(s, factor > n * n ? factor : n * n), r->right = take(s, factor);
    r->grad_state = take(s, share * d * e), r->grad_shared = take(s, share * d * e);
    r->grad_reads = take(s, 2 * n * e), r->grad_added = take(s, n * e), r->kept = take(s, n * e);
    r->grad_scores = take(s, 2 * n * n), r->weights = take(s, 2 * n * n);
    r->grad_kq = take(s, 2 * n * d), r->grad_v = take(s, share * n * e), r->grad_part = take(s, 2 * n * d);
    r->grad_decay = take(s, n), r->grad_beta = take(s, n), r->grad_mixed = take(s, (n + after) * largest);
    r->next = take(s, after * (2 * d + share * e)), r->next_shared = take(s, after * (2 * d + share * e));
    return store.used;
}

/* --- A chunk ------------------------------------------------------------------------------------------------------ */

/* Clamped as _factors in delta/rule.py says. */
INLINE float factor_of(float exponent) {
    const float low = exponent < -50.0f ? -50.0f : exponent;
    return exponential(low < 0.0f ? low : 0.0f);
}

/* Row i of the inverse of the unit triangular system, whose entries below the diagonal are strength * of_key. */
INLINE void solve_row(const float *of_key, float strength, float *solved, int64_t i, int64_t n, const int vectors) {
    Floats even[CHUNK / LANES], odd[CHUNK / LANES];
    for (int v = 0; v < vectors; v++) even[v] = odd[v] = zeros();
    for (int64_t j = 0; j + 1 < i; j += 2)
        for (int v = 0; v < vectors; v++) {
            even[v] = times_plus(every(of_key[j]), load(solved + j * n + v * LANES), even[v]);
            odd[v] = times_plus(every(of_key[j + 1]), load(solved + (j + 1) * n + v * LANES), odd[v]);
        }
    for (int v = 0; v < vectors; v++) {
        if (i % 2) even[v] = times_plus(every(of_key[i - 1]), load(solved + (i - 1) * n + v * LANES), even[v]);
        store(solved + i * n + v * LANES, times(every(-strength), plus(even[v], odd[v])));
    }
    solved[i * n + i] = 1.0f;
}

/* D, both halves of products times D (keys' strictly lower), and the inverse of the triangular system times beta. Of each
   row whole groups of 16 numbers are written, up to that of the diagonal. */
static void relate(const Room *r, int64_t n) {
    memset(r->solved, 0, (size_t)(n * n) * 4);
    for (int64_t i = 0; i < n; i++) {
        const int64_t place = i * n, width = i / 16 * 16 + 16;
        const float *key = r->products + place, *query = key + n * n, own = r->decay[i];
        float *within = r->within + place, *of_key = r->scores + place, *of_query = of_key + n * n;
#pragma omp simd
        for (int64_t j = 0; j < width; j++) {
            const float decay = j <= i ? factor_of(own - r->decay[j]) : 0.0f;
            within[j] = decay;
            of_key[j] = j < i ? key[j] * decay : 0.0f;
            of_query[j] = j <= i ? query[j] * decay : 0.0f;
        }
        switch (i / 16) {
            case 0: solve_row(of_key, r->beta[i], r->solved, i, n, 16 / LANES); break;
            case 1: solve_row(of_key, r->beta[i], r->solved, i, n, 32 / LANES); break;
            case 2: solve_row(of_key, r->beta[i], r->solved, i, n, 48 / LANES); break;
            default: solve_row(of_key, r->beta[i], r->solved, i, n, 64 / LANES);
        }
    }
    for (int64_t i = 0; i < n; i++)
#pragma omp simd
        for (int64_t j = 0; j <= i; j++) r->solved[i * n + j] *= r->beta[j];
}

/* Sums of g and what follows from them, of one value head; those beyond the last token let nothing decay. */
static void decays(const Room *r, const float *decay, const float *beta, int64_t count, int64_t n) {
    float sum = 0.0f;
    for (int64_t i = 0; i < n; i++) {
        sum += i < count ? decay[i] : 0.0f;
        r->decay[i] = sum;
        r->beta[i] = i < count ? beta[i] : 0.0f;
    }
    for (int64_t i = 0; i < n; i++) {
        r->since[i] = factor_of(r->decay[i]);
        r->until[i] = factor_of(sum - r->decay[i]);
    }
}

/* Keys and queries of the chunk as factors, and their products. */
static void multiply_keys(const Net *net, const Room *r, int64_t n, int narrow) {
    const int64_t d = net->d;
    const Factor columns = by_columns(r->kq, 2 * n, d, r->kq_columns, narrow);
    by_rows(r->kq, 2 * n, d, r->kq_rows, narrow);
    product(columns, columns, n, n, d, r->products, 0, RESULT_LOWER, narrow);
    product((Factor){columns.words + n, 2 * n}, columns, n, n, d, r->products + n * n, 0, RESULT_LOWER, narrow);
}

static Factor keys_by_rows(const Net *net, const Room *r, int narrow) {
    return (Factor){narrow ? r->kq_rows : r->kq, net->d};
}

static Factor queries_by_rows(const Net *net, const Room *r, int64_t n, int narrow) {
    return (Factor){narrow ? r->kq_rows + n / 2 * net->d : r->kq + n * net->d, net->d};
}

/* Scores, what keys and queries read of the state, what is missing under the keys, and what tokens add. */
static void find_added(const Net *net, const Room *r, const float *state, const float *v, int64_t n, int narrow) {
    const int64_t e = net->e;
    relate(r, n);
    product((Factor){r->kq_columns, 2 * n}, by_rows(state, net->d, e, r->right, narrow), 2 * n, e, net->d, r->reads, 0,
            ALL_ENTRIES, narrow);
    for (int64_t i = 0; i < n; i++) {
        float *key = r->reads + i * e, *query = key + n * e, *missing = r->missing + i * e;
#pragma omp simd
        for (int64_t j = 0; j < e; j++) {
            key[j] *= r->since[i];
            query[j] *= r->since[i];
            missing[j] = v[i * e + j] - key[j];
        }
    }
    product(by_columns(r->solved, n, n, r->left, narrow), by_rows(r->missing, n, e, r->right, narrow), n, e, n, r->added,
            0, LEFT_LOWER, narrow);
}

static void scale_rows(float *x, const float *factors, float *out, int64_t rows, int64_t width) {
    for (int64_t i = 0; i < rows; i++)
#pragma omp simd
        for (int64_t j = 0; j < width; j++) out[i * width + j] = x[i * width + j] * factors[i];
}

/* What queries read into the second half of reads; the state becomes that after the chunk. */
static void rule_forward(const Net *net, const Room *r, float *state, const float *v, int64_t n, int narrow) {
    const int64_t d = net->d, e = net->e;
    find_added(net, r, state, v, n, narrow);
    product(by_columns(r->scores + n * n, n, n, r->left, narrow), by_rows(r->added, n, e, r->right, narrow), n, e, n,
            r->reads + n * e, 1, LEFT_LOWER, narrow);
    scale_rows(r->added, r->until, r->added, n, e);
    for (int64_t i = 0; i < d * e; i++) state[i] *= r->since[n - 1];
    product(keys_by_rows(net, r, narrow), by_rows(r->added, n, e, r->right, narrow), d, e, n, state, 1, ALL_ENTRIES,
            narrow);
}

/* --- Its gradients ------------------------------------------------------------------------------------------------ */

static float dot_of(const float *one, const float *two, int64_t size) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < size; i++) sum += one[i] * two[i];
    return sum;
}

/* From grad_scores: gradients of sums of g and of log beta, and of products into weights. */
static void relate_backward(const Room *r, int64_t n, int add) {
    for (int64_t i = 0; i < n; i++) {
        const int64_t place = i * n, width = i / 16 * 16 + 16;
        float of_keys = 0.0f, of_queries = 0.0f;
        for (int half = 0; half < 2; half++) {
            const float *grad = r->grad_scores + half * n * n + place, *scores = r->scores + half * n * n + place;
            const float *within = r->within + place;
            float *weights = r->weights + half * n * n + place, sum = 0.0f;
#pragma omp simd reduction(+ : sum)
            for (int64_t j = 0; j < width; j++) {
                const float exponent = j < i ? grad[j] * scores[j] : 0.0f; /* the diagonal's would cancel */
                const float weight = j < i + half ? grad[j] * within[j] : 0.0f;
                sum += exponent;
                r->grad_decay[j] -= exponent;
                weights[j] = add ? weights[j] + weight : weight;
            }
            *(half ? &of_queries : &of_keys) = sum;
        }
        r->grad_decay[i] += of_keys + of_queries;
        r->grad_beta[i] += of_keys;
    }
}

/* Gradients of reads, the negative of values' among them, and of sums of g and log beta as far as they follow from
   rows; grad_reads holds those of what queries read. Returns what the chunk's end takes of those of g. */
static float reads_backward(const Net *net, const Room *r, const float *grad_state, float *grad_v, int64_t n, int narrow) {
    const int64_t d = net->d, e = net->e;
    float total = 0.0f;
    product((Factor){r->kq_columns, 2 * n}, by_rows(grad_state, d, e, r->right, narrow), n, e, d, r->grad_added, 0,
            ALL_ENTRIES, narrow);
    scale_rows(r->added, r->until, r->kept, n, e);
    for (int64_t i = 0; i < n; i++) {
        const float through_state = dot_of(r->grad_added + i * e, r->kept + i * e, e);
        r->grad_decay[i] = -through_state;
        total += through_state;
    }
    scale_rows(r->grad_added, r->until, r->grad_added, n, e);
    product(by_rows(r->scores + n * n, n, n, r->left, narrow), by_rows(r->grad_reads + n * e, n, e, r->right, narrow), n, e,
            n, r->grad_added, 1, LEFT_UPPER, narrow);
    product(by_rows(r->solved, n, n, r->left, narrow), by_rows(r->grad_added, n, e, r->right, narrow), n, e, n, grad_v, 0,
            LEFT_UPPER, narrow);
    for (int64_t i = 0; i < n; i++) {
        float *of_key = r->grad_reads + i * e, *of_value = grad_v + i * e;
#pragma omp simd
        for (int64_t j = 0; j < e; j++) of_key[j] = -of_value[j];
        r->grad_beta[i] = dot_of(of_value, r->missing + i * e, e);
        r->grad_decay[i] += dot_of(of_key, r->reads + i * e, e);
        r->grad_decay[i] += dot_of(of_key + n * e, r->reads + (n + i) * e, e);
    }
    return total;
}

/* Of one value head: gradients of its values, of the sums of g and log beta, of kq but for what comes through products
   (added to grad_kq, as weights are, but for the first head), and of the state at the chunk's start in grad_state. */
static void rule_backward(const Net *net, const Room *r, const float *state, const float *v, float *grad_state,
                          float *grad_v, int64_t count, int64_t n, int add, int narrow) {
    const int64_t d = net->d, e = net->e;
    find_added(net, r, state, v, n, narrow);
    float end = reads_backward(net, r, grad_state, grad_v, n, narrow);
    const Factor rows = by_columns(r->grad_reads, 2 * n, e, r->left, narrow);
    const Factor added = by_columns(r->added, n, e, r->right, narrow), queries = {rows.words + n, rows.stride};
    product(rows, added, n, n, e, r->grad_scores, 0, RESULT_LOWER, narrow);
    product(queries, added, n, n, e, r->grad_scores + n * n, 0, RESULT_LOWER, narrow);
    relate_backward(r, n, add);
    product(rows, by_columns(state, d, e, r->right, narrow), 2 * n, d, e, r->grad_part, 0, ALL_ENTRIES, narrow);
    for (int half = 0; half < 2; half++)
        scale_rows(r->grad_part + half * n * d, r->since, r->grad_part + half * n * d, n, d);
    product(by_columns(r->kept, n, e, r->left, narrow), by_columns(grad_state, d, e, r->right, narrow), n, d, e,
            r->grad_part, 1, ALL_ENTRIES, narrow);
#pragma omp simd
    for (int64_t i = 0; i < 2 * n * d; i++) r->grad_kq[i] = add ? r->grad_kq[i] + r->grad_part[i] : r->grad_part[i];
    const float whole = r->since[n - 1];
    end += whole * dot_of(grad_state, state, d * e);
#pragma omp simd
    for (int64_t i = 0; i < d * e; i++) grad_state[i] *= whole;
    for (int half = 0; half < 2; half++)
        scale_rows(r->grad_reads + half * n * e, r->since, r->grad_reads + half * n * e, n, e);
    product(keys_by_rows(net, r, narrow), by_rows(r->grad_reads, 2 * n, e, r->left, narrow), d, e, 2 * n, grad_state, 1,
            ALL_ENTRIES, narrow);
    r->grad_decay[count - 1] += end;
}

/* What comes to keys and queries through their products, for all value heads. */
static void keys_backward(const Net *net, const Room *r, int64_t n, int narrow) {
    const int64_t d = net->d;
    const Factor keys = keys_by_rows(net, r, narrow), queries = queries_by_rows(net, r, n, narrow);
    const float *of_keys = r->weights, *of_queries = of_keys + n * n;
    product(by_columns(of_keys, n, n, r->left, narrow), keys, n, d, n, r->grad_kq, 1, LEFT_LOWER, narrow);
    product(by_columns(of_queries, n, n, r->left, narrow), keys, n, d, n, r->grad_kq + n * d, 1, LEFT_LOWER, narrow);
    product(by_rows(of_keys, n, n, r->left, narrow), keys, n, d, n, r->grad_kq, 1, LEFT_UPPER, narrow);
    product(by_rows(of_queries, n, n, r->left, narrow), queries, n, d, n, r->grad_kq, 1, LEFT_UPPER, narrow);
}

#endif
