/* The elementwise work of a gated delta net on a CPU: within a chunk of tokens, as answering takes it, and its norm.

   As in elementwise.c: plain loops, fp32 or bf16 in memory as `kind` says, fp32 in between; a head belongs to one
   thread, so that results do not depend on the number of threads. */

#include "numbers.h"

enum { LARGEST_HEAD = 512 };

INLINE float sigmoid(float x) {
    const float e = exponential(-fabsf(x)), part = 1.0f / (1.0f + e);
    return x < 0.0f ? e * part : part;
}

/* --- Within a chunk ----------------------------------------------------------------------------------------------- */

INLINE void scores_of_head(const float *products, const float *decay, const float *beta, float *within, float *scores,
                           float *solved, int64_t n) {
    const int64_t pairs = n * n;
    for (int64_t i = 0; i < n; i++) {
        float *d = within + i * n, *of_key = scores + i * n, *of_query = of_key + pairs, *row = solved + i * n;
        const float *key = products + i * n, *query = key + pairs, own = decay[i];
#pragma omp simd
        for (int64_t j = 0; j < n; j++) { /* clamped as _factors in delta/rule.py says */
            const float gap = own - decay[j], low = gap < -50.0f ? -50.0f : gap;
            d[j] = j <= i ? exponential(low < 0.0f ? low : 0.0f) : 0.0f;
            of_key[j] = j < i ? key[j] * d[j] : 0.0f;
            of_query[j] = j <= i ? query[j] * d[j] : 0.0f;
            row[j] = j == i ? 1.0f : 0.0f;
        }
        for (int64_t j = 0; j < i; j++) { /* forward substitution */
            const float factor = beta[i] * of_key[j], *before = solved + j * n;
#pragma omp simd
            for (int64_t m = 0; m <= j; m++) row[m] -= factor * before[m];
        }
    }
    for (int64_t i = 0; i < n; i++)
#pragma omp simd
        for (int64_t j = 0; j <= i; j++) solved[i * n + j] *= beta[j];
}

/* K K' and Q K' [K, 2, n, n], decay and beta [K, R, n] -> D [K, R, n, n], both times D [K, R, 2, n, n] (keys' strictly
   lower), and the inverse of I + beta times keys' ones, times beta [K, R, n, n]. */
void delta_scores(const float *products, const float *decay, const float *beta, float *within, float *scores,
                  float *solved, int64_t key_heads, int64_t share, int64_t n, int64_t kind, int64_t threads) {
    (void)kind;
    PARALLEL
    for (int64_t head = 0; head < key_heads * share; head++)
        scores_of_head(products + head / share * 2 * n * n, decay + head * n, beta + head * n, within + head * n * n,
                       scores + head * 2 * n * n, solved + head * n * n, n);
}

/* --- The gated norm ----------------------------------------------------------------------------------------------- */

INLINE void gated_row(const void *x, const void *z, const float *weight, void *out, int64_t width, float epsilon,
                      int kind) {
    const float rate = inverse_length(x, width, epsilon, kind);
#pragma omp simd
    for (int64_t i = 0; i < width; i++) {
        const float gate = get(z, i, kind);
        put(out, i, get(x, i, kind) * rate * weight[i] * gate * sigmoid(gate), kind);
    }
}

/* out = x / sqrt(mean(x^2) + epsilon) * weight * silu(z), row by row. */
void gated_norm(const char *x, const char *z, const float *weight, char *out, int64_t rows, int64_t width, float epsilon,
                int64_t kind, int64_t threads) {
    PARALLEL
    for (int64_t t = 0; t < rows; t++) {
        const int64_t place = bytes(t, width, kind);
        BY_KIND(gated_row, kind, x + place, z + place, weight, out + place, width, epsilon);
    }
}

INLINE void gated_backward_row(void *grad, const void *x, const void *z, const float *weight, void *grad_x,
                               int64_t width, float epsilon, int kind) {
    const float rate = inverse_length(x, width, epsilon, kind);
    float own[LARGEST_HEAD], shared = 0.0f;
#pragma omp simd reduction(+ : shared)
    for (int64_t i = 0; i < width; i++) {
        const float gate = get(z, i, kind), s = sigmoid(gate), scaled = get(grad, i, kind) * weight[i];
        const float normalised = get(x, i, kind) * rate;
        own[i] = scaled * gate * s;
        shared += own[i] * normalised;
        put(grad, i, scaled * normalised * s * (1.0f + gate * (1.0f - s)), kind);
    }
    shared /= (float)width;
#pragma omp simd
    for (int64_t i = 0; i < width; i++) put(grad_x, i, (own[i] - get(x, i, kind) * rate * shared) * rate, kind);
}

/* The gradient of z in grad's place, and that of x in grad_x. */
void gated_norm_backward(char *grad, const char *x, const char *z, const float *weight, char *grad_x, int64_t rows,
                         int64_t width, float epsilon, int64_t kind, int64_t threads) {
    PARALLEL
    for (int64_t t = 0; t < rows; t++) {
        const int64_t place = bytes(t, width, kind);
        BY_KIND(gated_backward_row, kind, grad + place, x + place, z + place, weight, grad_x + place, width, epsilon);
    }
}
