/* One new token of a sequence through a gated delta net (Yang et al. 2024), on a CPU: from what its projections give to
   what its output layer reads. The state of a head is read twice and written once; everything else stays in the first
   cache. Included by kernels for this alone (delta_step.c) and for whole steps of a decoder.

   As in elementwise.c: plain loops, fp32 or bf16 in memory as `kind` says, fp32 in between.

   Shapes: B sequences, M channels (queries, then keys, then values), w tokens that the convolution sees, K heads of keys,
   R heads of values for each, H = K R, d and e the sizes of keys and values. */

#ifndef DELTA_TOKEN_H
#define DELTA_TOKEN_H

#include "numbers.h"

enum { LARGEST_HEAD = 512 };

/* Where each sequence's numbers of a kind start, `stride` numbers apart. */
typedef struct {
    const char *numbers;
    int64_t stride;
} Inputs;

typedef struct {
    Inputs qkv, z, b, a;
    float *rows;                                  /* [B, w - 1, M]: what the convolution saw last */
    float *states;                                /* [B, H, d, e] */
    const float *taps, *rate, *bias, *weight;     /* [w, M], [H], [H], [e] */
    void *out;                                    /* [B, H e] */
    int64_t sequences, channels, key_heads, share, key_size, value_size, seen;
    float length_epsilon, norm_epsilon;
} DeltaStep;

INLINE const void *of_sequence(Inputs inputs, int64_t sequence, int kind) {
    return inputs.numbers + bytes(sequence, inputs.stride, kind);
}

INLINE float sigmoid(float x) {
    const float e = exponential(-fabsf(x)), part = 1.0f / (1.0f + e);
    return x < 0.0f ? e * part : part;
}

/* SiLU of the convolution of a head's channels from `first` on; gives the sum of the squares. */
INLINE float convolve(const DeltaStep *step, int64_t sequence, int64_t first, int64_t size, float *out, int kind) {
    const void *newest = of_sequence(step->qkv, sequence, kind);
    const float *row = step->rows + sequence * (step->seen - 1) * step->channels + first, *tap = step->taps + first;
    float sum = 0.0f;
    for (int64_t i = 0; i < size; i++) out[i] = 0.0f;
    for (int64_t j = 1; j < step->seen; j++, row += step->channels, tap += step->channels)
#pragma omp simd
        for (int64_t i = 0; i < size; i++) out[i] += row[i] * tap[i];
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < size; i++) {
        const float mixed = out[i] + get(newest, first + i, kind) * tap[i];
        out[i] = mixed * sigmoid(mixed);
        sum += out[i] * out[i];
    }
    return sum;
}

/* S = decay S + k (beta (v - decay k S))', then q S. */
INLINE void recur(float *restrict state, const float *q, const float *k, const float *v, float decay, float beta,
                  int64_t key_size, int64_t value_size, float *restrict read) {
    float missing[LARGEST_HEAD];
    for (int64_t j = 0; j < value_size; j++) missing[j] = read[j] = 0.0f;
    for (int64_t i = 0; i < key_size; i++)
#pragma omp simd
        for (int64_t j = 0; j < value_size; j++) missing[j] += k[i] * state[i * value_size + j];
#pragma omp simd
    for (int64_t j = 0; j < value_size; j++) missing[j] = beta * (v[j] - decay * missing[j]);
    for (int64_t i = 0; i < key_size; i++)
#pragma omp simd
        for (int64_t j = 0; j < value_size; j++) {
            const float number = decay * state[i * value_size + j] + k[i] * missing[j];
            state[i * value_size + j] = number;
            read[j] += q[i] * number;
        }
}

INLINE void one_head(const DeltaStep *step, int64_t sequence, int64_t head, int kind) {
    const int64_t d = step->key_size, e = step->value_size, heads = step->key_heads * step->share;
    const int64_t from = head / step->share * d, width = step->key_heads * d;
    float q[LARGEST_HEAD], k[LARGEST_HEAD], v[LARGEST_HEAD], read[LARGEST_HEAD];
    const float of_q = 1.0f / sqrtf((convolve(step, sequence, from, d, q, kind) + step->length_epsilon) * (float)d);
    const float of_k = 1.0f / sqrtf(convolve(step, sequence, width + from, d, k, kind) + step->length_epsilon);
    for (int64_t i = 0; i < d; i++) q[i] *= of_q, k[i] *= of_k;
    convolve(step, sequence, 2 * width + head * e, e, v, kind);
    const float x = get(of_sequence(step->a, sequence, kind), head, kind) + step->bias[head];
    const float softplus = x > 20.0f ? x : log1pf(expf(x)); /* as PyTorch */
    const float beta = sigmoid(get(of_sequence(step->b, sequence, kind), head, kind));
    recur(step->states + (sequence * heads + head) * d * e, q, k, v, expf(step->rate[head] * softplus), beta, d, e, read);
    const float length = inverse_length(read, e, step->norm_epsilon, FP32);
    const void *z = of_sequence(step->z, sequence, kind);
    for (int64_t j = 0; j < e; j++) {
        const float gate = get(z, head * e + j, kind);
        put(step->out, (sequence * heads + head) * e + j, read[j] * length * step->weight[j] * gate * sigmoid(gate), kind);
    }
}

/* The convolution's rows move up by one, for the newest to come in. */
INLINE void keep_newest(const DeltaStep *step, int64_t sequence, int kind) {
    const int64_t kept = (step->seen - 2) * step->channels;
    float *rows = step->rows + sequence * (step->seen - 1) * step->channels;
    const void *newest = of_sequence(step->qkv, sequence, kind);
    memmove(rows, rows + step->channels, (size_t)kept * sizeof(float));
    for (int64_t i = 0; i < step->channels; i++) rows[kept + i] = get(newest, i, kind);
}

#endif
