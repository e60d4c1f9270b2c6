/* From a projection's rows to the heads of a gated delta net and back: a causal convolution of each channel over a few
   tokens, SiLU, and queries and keys brought to a length. A chunk of tokens of one part of a head at a time. */

#ifndef DELTA_HEADS_H
#define DELTA_HEADS_H

#include "numbers.h"

enum { CHUNK = 64, LARGEST_HEAD = 512, LARGEST_KERNEL = 16 };

/* Tokens start..end of the layout, which see `shared` tokens at its beginning and then each other. */
typedef struct {
    int64_t start, end, shared;
} Segment;

/* The rows of all tokens, and of which a convolution sees `seen`; taps [seen, channels], the newest token's last. */
typedef struct {
    const char *rows;
    const float *taps;
    int64_t channels, seen;
} Convolution;

/* Queries, keys or values of a head: where their channels start, how many, and their length, 0 for any. */
typedef struct {
    int64_t first, size;
    float length;
} Part;

/* Where number i lies. */
INLINE char *at(const void *numbers, int64_t i, int64_t kind) { return (char *)numbers + i * (kind == FP32 ? 4 : 2); }

INLINE float sigmoid(float x) {
    const float e = exponential(-fabsf(x)), part = 1.0f / (1.0f + e);
    return x < 0.0f ? e * part : part;
}

/* The rows that the convolution sees for a token, from the part's first channel on; zeros before a sample. */
static void seen_rows(const Convolution *conv, Segment segment, int64_t token, int64_t first, const char **rows,
                      int64_t kind) {
    static const float nothing[LARGEST_HEAD];
    for (int64_t j = 0; j < conv->seen; j++) {
        int64_t place = token - conv->seen + 1 + j;
        if (place < segment.start) place += segment.shared - segment.start;
        rows[j] = place < 0 ? (const char *)nothing : at(conv->rows, place * conv->channels + first, kind);
    }
}

INLINE void convolve_row(const char *const *rows, const float *taps, int64_t channels, float *mixed, float *active,
                         int64_t size, const int64_t seen, int kind) {
#pragma omp simd
    for (int64_t i = 0; i < size; i++) {
        float sum = 0.0f;
        for (int64_t j = 0; j < seen; j++) sum += get(rows[j], i, kind) * taps[j * channels + i];
        mixed[i] = sum;
        active[i] = sum * sigmoid(sum);
    }
}

/* A token's convolution into mixed, and its SiLU into active. */
INLINE void convolve(const char *const *rows, const float *taps, int64_t channels, float *mixed, float *active,
                     int64_t size, int64_t seen, int kind) {
    if (seen == 4) convolve_row(rows, taps, channels, mixed, active, size, 4, kind);
    else convolve_row(rows, taps, channels, mixed, active, size, seen, kind);
}

static float squares(const float *x, int64_t size) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < size; i++) sum += x[i] * x[i];
    return sum;
}

/* Ask for a part's numbers of the row that is AHEAD of one of `rows`: rows lie so far apart that the machine does not
   guess the next one. */
INLINE void ask_ahead(const void *numbers, int64_t row, int64_t rows, int64_t width, Part part, int64_t kind) {
    enum { AHEAD = 16, LINE = 64 };
    if (row + AHEAD >= rows) return;
    const char *from = at(numbers, (row + AHEAD) * width + part.first, kind);
    for (int64_t place = 0; place < bytes(1, part.size, kind); place += LINE) __builtin_prefetch(from + place);
}

/* Tokens first..first + count: what the convolution gives into mixed, the part into out [count, size], and the factors
   that brought it to its length into rates. */
static void part_forward(const Convolution *conv, Segment segment, int64_t first, int64_t count, Part part, float *mixed,
                         float *out, float *rates, float epsilon, int64_t kind) {
    const float *taps = conv->taps + part.first;
    for (int64_t t = 0; t < count; t++, mixed += part.size, out += part.size) {
        const char *rows[LARGEST_KERNEL];
        ask_ahead(conv->rows, first + t, segment.end, conv->channels, part, kind);
        seen_rows(conv, segment, first + t, part.first, rows, kind);
        BY_KIND(convolve, kind, rows, taps, conv->channels, mixed, out, part.size, conv->seen);
        if (part.length == 0.0f) continue;
        rates[t] = part.length / sqrtf(squares(out, part.size) + epsilon);
#pragma omp simd
        for (int64_t i = 0; i < part.size; i++) out[i] *= rates[t];
    }
}

/* Through the length and SiLU: grad [count, size], of out above, becomes that of mixed. */
static void part_activation_backward(float *grad, const float *out, const float *mixed, const float *rates, int64_t count,
                                     Part part) {
    for (int64_t t = 0; t < count; t++, grad += part.size, out += part.size, mixed += part.size) {
        float dot = 0.0f, rate = 1.0f; /* of y = c x / |x| the gradient is c / |x| (grad - y (y . grad) / c^2) */
        if (part.length != 0.0f) {
            rate = rates[t];
#pragma omp simd reduction(+ : dot)
            for (int64_t i = 0; i < part.size; i++) dot += out[i] * grad[i];
            dot /= part.length * part.length;
        }
#pragma omp simd
        for (int64_t i = 0; i < part.size; i++) {
            const float s = sigmoid(mixed[i]), slope = s * (1.0f + mixed[i] * (1.0f - s));
            grad[i] = (grad[i] - out[i] * dot) * rate * slope;
        }
    }
}

INLINE void convolve_back_row(const float *grad, const float *taps, int64_t channels, void *out, int64_t size,
                              const int64_t seen, int kind) {
#pragma omp simd
    for (int64_t i = 0; i < size; i++) {
        float sum = 0.0f;
        for (int64_t j = 0; j < seen; j++) sum += grad[(seen - 1 - j) * size + i] * taps[j * channels + i];
        put(out, i, sum, kind);
    }
}

/* A row of the gradient of what the convolution read. */
INLINE void convolve_back(const float *grad, const float *taps, int64_t channels, void *out, int64_t size, int64_t seen,
                          int kind) {
    if (seen == 4) convolve_back_row(grad, taps, channels, out, size, 4, kind);
    else convolve_back_row(grad, taps, channels, out, size, seen, kind);
}

INLINE void add_products(float *sums, const float *grad, const char *row, int64_t size, int kind) {
#pragma omp simd
    for (int64_t i = 0; i < size; i++) sums[i] += grad[i] * get(row, i, kind);
}

/* Through the convolution: gradients of rows first..first + count of conv into grad_rows, for those of mixed of these
   and of the seen - 1 tokens after them, [count + seen - 1, size]. That of taps is added to grad_taps, if given. */
static void part_convolution_backward(const Convolution *conv, Segment segment, int64_t first, int64_t count, Part part,
                                      const float *grad, char *grad_rows, float *grad_taps, int64_t kind) {
    const float *taps = conv->taps + part.first;
    for (int64_t t = 0; t < count; t++, grad += part.size) {
        char *out = at(grad_rows, (first + t) * conv->channels + part.first, kind);
        BY_KIND(convolve_back, kind, grad, taps, conv->channels, out, part.size, conv->seen);
        if (!grad_taps) continue;
        const char *rows[LARGEST_KERNEL];
        seen_rows(conv, segment, first + t, part.first, rows, kind);
        for (int64_t j = 0; j < conv->seen; j++)
            BY_KIND(add_products, kind, grad_taps + j * conv->channels + part.first, grad, rows[j], part.size);
    }
}

#endif
