/* MLPs, and which of a mixture's a row is sent to. */

#ifndef MIXTURE_H
#define MIXTURE_H

#include "attention.h"

/* A row, one of its experts, and the expert's share in what the row becomes. */
typedef struct {
    int64_t row, expert;
    float share;
} Pair;

/* gate and up of a thread's rows, then activation(gate) * up in gate's place; both: [T, 2 I]. Both activations are
   x s(z(x)) with s(z) = 1 / (1 + e^-z): z is x for SiLU, and 2 u for GELU's tanh form, as (1 + tanh(u)) / 2 = s(2 u). */
static void gated(const MLP *mlp, const Rows *rows, int64_t count, int64_t thread, int64_t threads, float *both) {
    const int64_t inner = mlp->down.columns, from = share(inner, thread, threads);
    const int64_t until = share(inner, thread + 1, threads);
    const Target to = {both, 2 * inner, 0};
    multiply(&mlp->gate_up, rows, count, from, until, to);
    multiply(&mlp->gate_up, rows, count, from + inner / BLOCK, until + inner / BLOCK, to);
    for (int64_t t = 0; t < count; t++)
        for (int64_t i = from * BLOCK; i < until * BLOCK; i += LANES) {
            float *gate = both + t * 2 * inner + i;
            const Floats g = load(gate);
            Floats z = g;
            if (mlp->activation == GELU_TANH) {
                const Floats factor = every(1.5957691216f); /* 2 sqrt(2 / pi) */
                z = times(factor, times_plus(times(every(0.044715f), g), times(g, g), g));
            }
            store(gate, times(times(g, sigmoid_of(z)), load(gate + inner)));
        }
}

static void scale_row(const float *x, float by, int64_t width, float *out) {
    for (int64_t i = 0; i < width; i += LANES) store(out + i, times(load(x + i), every(by)));
}

static Rows row_of(const Rows *rows, int64_t t, int64_t columns) {
    return (Rows){rows->x + t * columns,         rows->q + t * columns, rows->scale + t * columns / GROUP,
                  rows->sum + t * columns / GROUP, rows->total + t,       NULL};
}

/* The experts of the largest shares of a row, `shares` of all [E] before: none is left out where some are NaN. */
static void choose(const Mixture *mixture, float *shares, float rate, int64_t row, Pair *pairs) {
    float sum = 0;
    for (int64_t k = 0; k < mixture->chosen; k++) {
        int64_t best = -1;
        for (int64_t e = 0; e < mixture->count; e++)
            if (!(shares[e] < 0) && (best < 0 || shares[e] > shares[best])) best = e;
        pairs[k] = (Pair){row, best, shares[best] * rate};
        sum += pairs[k].share;
        shares[best] = -1; /* shares are positive */
    }
    for (int64_t k = 0; k < mixture->chosen && mixture->normalised; k++) pairs[k].share /= sum;
}

/* The experts of all rows by their logits [T, rows of the router], in the order of experts, so that an expert's weights
   stay in the caches from one row to the next. shares: room for E + 16; pairs: for two each of [T, chosen]. */
static Pair *route(const Mixture *mixture, const float *logits, int64_t count, float *shares, Pair *pairs) {
    const int64_t all = count * mixture->chosen;
    Pair *sorted = pairs + all;
    int64_t starts[mixture->count + 1];
    memset(starts, 0, sizeof(starts));
    for (int64_t t = 0; t < count; t++) {
        memcpy(shares, logits + t * mixture->router.rows, (size_t)mixture->count * sizeof(float));
        choose(mixture, shares, exponentials(shares, mixture->count), t, pairs + t * mixture->chosen);
    }
    for (int64_t p = 0; p < all; p++) starts[pairs[p].expert + 1]++;
    for (int64_t e = 0; e < mixture->count; e++) starts[e + 1] += starts[e];
    for (int64_t p = 0; p < all; p++) sorted[starts[pairs[p].expert]++] = pairs[p];
    return sorted;
}

#endif
