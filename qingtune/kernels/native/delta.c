/* The elementwise work of a gated delta net on a CPU: what lies between its projections and its recurrence, and its norm.

   As in elementwise.c: plain loops, fp32 or bf16 in memory as `kind` says, fp32 in between; a head belongs to one
   thread, so that results do not depend on the number of threads. */

#include "numbers.h"

enum { LARGEST_HEAD = 512 };

/* Where number i lies. */
INLINE void *at(const void *numbers, int64_t i, int kind) { return (char *)numbers + i * (kind == FP32 ? 4 : 2); }

INLINE float sigmoid(float x) {
    const float e = exponential(-fabsf(x)), part = 1.0f / (1.0f + e);
    return x < 0.0f ? e * part : part;
}

/* --- From rows to heads ------------------------------------------------------------------------------------------- */

/* One token of one head: the convolution of its channels into mixed, and its SiLU into active. */
INLINE void convolve(const void *window, const float *taps, float *mixed, float *active, int64_t channels, int64_t first,
                     int64_t size, int64_t seen, int kind) {
    for (int64_t i = 0; i < size; i++) mixed[i] = 0.0f;
    for (int64_t j = 0; j < seen; j++) {
        const void *row = at(window, j * channels + first, kind);
        const float *tap = taps + j * channels + first;
#pragma omp simd
        for (int64_t i = 0; i < size; i++) mixed[i] += get(row, i, kind) * tap[i];
    }
#pragma omp simd
    for (int64_t i = 0; i < size; i++) active[i] = mixed[i] * sigmoid(mixed[i]);
}

INLINE float rate_of(const float *active, int64_t size, float epsilon) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < size; i++) sum += active[i] * active[i];
    return 1.0f / sqrtf(sum + epsilon);
}

/* Head number of all, queries, then keys, then values: its first channel, its size, and where its first token's numbers
   lie in kq [K, 2, n, d] or v [K, n, R, e], with the step from token to token. */
typedef struct {
    int64_t first, size, place, step;
    int part; /* 0 queries, 1 keys, 2 values */
} Head;

INLINE Head head_of(int64_t number, int64_t tokens, int64_t key_heads, int64_t share, int64_t key_size,
                    int64_t value_size) {
    Head head;
    if (number < 2 * key_heads) {
        head.part = (int)(number / key_heads);
        head.first = number * key_size, head.size = head.step = key_size;
        head.place = (number % key_heads * 2 + (head.part == 0)) * tokens * key_size;
    } else {
        const int64_t value = number - 2 * key_heads;
        head.part = 2, head.first = 2 * key_heads * key_size + value * value_size, head.size = value_size;
        head.step = share * value_size;
        head.place = value / share * tokens * head.step + value % share * value_size;
    }
    return head;
}

INLINE void forward_head(const void *window, const float *taps, float *kq, float *v, int64_t tokens, int64_t channels,
                         Head head, int64_t seen, float epsilon, float scale, int kind) {
    float mixed[LARGEST_HEAD], active[LARGEST_HEAD];
    for (int64_t t = 0; t < tokens; t++) {
        convolve(at(window, t * channels, kind), taps, mixed, active, channels, head.first, head.size, seen, kind);
        float *out = (head.part == 2 ? v : kq) + head.place + t * head.step;
        const float rate = head.part == 2 ? 1.0f : rate_of(active, head.size, epsilon) * (head.part ? 1.0f : scale);
#pragma omp simd
        for (int64_t i = 0; i < head.size; i++) out[i] = active[i] * rate;
    }
}

/* window [seen - 1 + tokens, channels] of a kind and taps [seen, channels] -> kq [K, 2, tokens, d], keys first, and
   v [K, tokens, R, e]; queries have the length `scale`. */
void delta_heads(const void *window, const float *taps, float *kq, float *v, int64_t tokens, int64_t key_heads,
                 int64_t share, int64_t key_size, int64_t value_size, int64_t seen, float epsilon, float scale,
                 int64_t kind, int64_t threads) {
    const int64_t channels = 2 * key_heads * key_size + key_heads * share * value_size;
    PARALLEL
    for (int64_t number = 0; number < key_heads * (2 + share); number++) {
        const Head head = head_of(number, tokens, key_heads, share, key_size, value_size);
        BY_KIND(forward_head, kind, window, taps, kq, v, tokens, channels, head, seen, epsilon, scale);
    }
}

INLINE void backward_head(const float *grad_kq, const float *grad_v, const void *window, const float *taps,
                          const float *kq, float *grad_window, float *grad_taps, int64_t tokens, int64_t channels,
                          Head head, int64_t seen, float epsilon, float scale, int kind) {
    float mixed[LARGEST_HEAD], active[LARGEST_HEAD], grad[LARGEST_HEAD];
    for (int64_t t = 0; t < seen - 1; t++) memset(grad_window + t * channels + head.first, 0, 4 * (size_t)head.size);
    for (int64_t t = 0; t < tokens; t++) {
        const int64_t place = head.place + t * head.step;
        convolve(at(window, t * channels, kind), taps, mixed, active, channels, head.first, head.size, seen, kind);
        if (head.part == 2) {
            memcpy(grad, grad_v + place, 4 * (size_t)head.size);
        } else { /* of y = c x / |x| the gradient is c / |x| (grad - y (y . grad) / c^2) */
            const float length = head.part ? 1.0f : scale, rate = rate_of(active, head.size, epsilon) * length;
            const float *y = kq + place, *grad_y = grad_kq + place;
            float dot = 0.0f;
#pragma omp simd reduction(+ : dot)
            for (int64_t i = 0; i < head.size; i++) dot += y[i] * grad_y[i];
            dot /= length * length;
#pragma omp simd
            for (int64_t i = 0; i < head.size; i++) grad[i] = (grad_y[i] - y[i] * dot) * rate;
        }
        float *newest = grad_window + (t + seen - 1) * channels + head.first;
#pragma omp simd
        for (int64_t i = 0; i < head.size; i++) {
            const float s = sigmoid(mixed[i]);
            grad[i] *= s * (1.0f + mixed[i] * (1.0f - s));
            newest[i] = 0.0f;
        }
        for (int64_t j = 0; j < seen; j++) {
            float *out = grad_window + (t + j) * channels + head.first;
            const float *tap = taps + j * channels + head.first;
#pragma omp simd
            for (int64_t i = 0; i < head.size; i++) out[i] += grad[i] * tap[i];
            if (!grad_taps) continue;
            const void *row = at(window, (t + j) * channels + head.first, kind);
            float *grad_tap = grad_taps + j * channels + head.first;
#pragma omp simd
            for (int64_t i = 0; i < head.size; i++) grad_tap[i] += grad[i] * get(row, i, kind);
        }
    }
}

/* What delta_heads took and gave -> the gradient of its window, fp32; that of taps is added to grad_taps, if given. */
void delta_heads_backward(const float *grad_kq, const float *grad_v, const void *window, const float *taps,
                          const float *kq, float *grad_window, float *grad_taps, int64_t tokens, int64_t key_heads,
                          int64_t share, int64_t key_size, int64_t value_size, int64_t seen, float epsilon, float scale,
                          int64_t kind, int64_t threads) {
    const int64_t channels = 2 * key_heads * key_size + key_heads * share * value_size;
    PARALLEL
    for (int64_t number = 0; number < key_heads * (2 + share); number++) {
        const Head head = head_of(number, tokens, key_heads, share, key_size, value_size);
        BY_KIND(backward_head, kind, grad_kq, grad_v, window, taps, kq, grad_window, grad_taps, tokens, channels, head,
                seen, epsilon, scale);
    }
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
