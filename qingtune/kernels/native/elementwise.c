/* The elementwise work of training on a CPU: each function reads what it needs once from memory and writes its result.

   Plain loops, which compilers turn into vector instructions of whatever width the machine has; sums over a row may be
   taken in the order that suits these (`omp simd reduction`). A row belongs to one thread, and sums over rows are taken
   in their order, so that results do not depend on the number of threads.

   Numbers are fp32 or bf16 in memory, as `kind` says, and fp32 in between. The caller sees to shapes and to contiguous
   memory; an output may be one of the inputs where that is said. Functions are inlined once for each kind. */

#include <omp.h>

#include "numbers.h"

enum { SILU, GELU_TANH };

#define BY_ACTIVATION(function, activation, kind, ...) \
    do { \
        if ((activation) == SILU) BY_KIND(function, kind, __VA_ARGS__, SILU); \
        else BY_KIND(function, kind, __VA_ARGS__, GELU_TANH); \
    } while (0)

/* --- RMSNorm ------------------------------------------------------------------------------------------------------ */

INLINE void norm_row(const void *x, const float *weight, void *out, int64_t width, float epsilon, float offset,
                     int kind) {
    const float rate = inverse_length(x, width, epsilon, kind);
#pragma omp simd
    for (int64_t i = 0; i < width; i++) put(out, i, get(x, i, kind) * rate * (offset + weight[i]), kind);
}

/* Where row t of x begins: `group` of them lie `inner` numbers apart, and groups `outer`. */
INLINE int64_t start_of(int64_t t, int64_t group, int64_t outer, int64_t inner, int64_t kind) {
    return bytes(1, t / group * outer + t % group * inner, kind);
}

/* out = x / sqrt(mean(x^2) + epsilon) * (offset + weight), row by row; out may be x, if that has no gaps. */
void norm(const char *x, const float *weight, char *out, int64_t rows, int64_t width, int64_t group, int64_t outer,
          int64_t inner, float epsilon, float offset, int64_t kind, int64_t threads) {
    PARALLEL
    for (int64_t t = 0; t < rows; t++) {
        const int64_t from = start_of(t, group, outer, inner, kind);
        BY_KIND(norm_row, kind, x + from, weight, out + bytes(t, width, kind), width, epsilon, offset);
    }
}

/* Returns the factor that the row was normed with. */
INLINE float norm_backward_row(const void *grad, const void *x, const float *weight, void *out, int64_t width,
                               float epsilon, float offset, int add, int out_kind, int kind) {
    const float rate = inverse_length(x, width, epsilon, kind);
    float dot = 0.0f;
#pragma omp simd reduction(+ : dot)
    for (int64_t i = 0; i < width; i++) dot += get(grad, i, kind) * (offset + weight[i]) * get(x, i, kind);
    const float shared = rate * dot / (float)width * rate;
#pragma omp simd
    for (int64_t i = 0; i < width; i++) {
        const float own = (get(grad, i, kind) * (offset + weight[i]) - get(x, i, kind) * shared) * rate;
        put(out, i, add ? get(out, i, out_kind) + own : own, out_kind);
    }
    return rate;
}

/* The gradient of the weight from a column on, in the order of rows. */
INLINE void norm_weight_columns(const char *grad, const char *x, const float *rates, float *grad_weight, int64_t rows,
                                int64_t width, int64_t group, int64_t outer, int64_t inner, int64_t start, int kind) {
    enum { COLUMNS = 64 };
    const int64_t count = width - start < COLUMNS ? width - start : COLUMNS;
    double sums[COLUMNS] = {0};
    for (int64_t t = 0; t < rows; t++) {
        const void *from = x + start_of(t, group, outer, inner, kind), *g = grad + bytes(t, width, kind);
#pragma omp simd
        for (int64_t i = 0; i < count; i++)
            sums[i] += (double)(get(from, start + i, kind) * rates[t] * get(g, start + i, kind));
    }
    for (int64_t i = 0; i < count; i++) grad_weight[start + i] = (float)sums[i];
}

/* out, fp32, becomes the gradient of x; rates, fp32 [rows], the factors that rows were normed with. With grad_weight
   [width] it becomes the gradient of the weight. Only x may have gaps. */
void norm_backward(const char *grad, const char *x, const float *weight, float *out, float *rates, float *grad_weight,
                   int64_t rows, int64_t width, int64_t group, int64_t outer, int64_t inner, float epsilon, float offset,
                   int64_t kind, int64_t threads) {
    PARALLEL
    for (int64_t t = 0; t < rows; t++) {
        const int64_t place = bytes(t, width, kind), from = start_of(t, group, outer, inner, kind);
        if (kind == FP32)
            rates[t] = norm_backward_row(grad + place, x + from, weight, out + t * width, width, epsilon, offset, 0,
                                         FP32, FP32);
        else
            rates[t] = norm_backward_row(grad + place, x + from, weight, out + t * width, width, epsilon, offset, 0,
                                         FP32, BF16);
    }
    if (!grad_weight) return;
    PARALLEL
    for (int64_t start = 0; start < width; start += 64)
        BY_KIND(norm_weight_columns, kind, grad, x, rates, grad_weight, rows, width, group, outer, inner, start);
}

/* Add the gradient of x to total. */
void norm_add_backward(const char *grad, const char *x, const float *weight, char *total, int64_t rows, int64_t width,
                       float epsilon, float offset, int64_t kind, int64_t threads) {
    PARALLEL
    for (int64_t t = 0; t < rows; t++) {
        const int64_t place = bytes(t, width, kind);
        if (kind == FP32)
            norm_backward_row(grad + place, x + place, weight, total + place, width, epsilon, offset, 1, FP32, FP32);
        else norm_backward_row(grad + place, x + place, weight, total + place, width, epsilon, offset, 1, BF16, BF16);
    }
}

/* --- Gated activations -------------------------------------------------------------------------------------------- */

#define PART 4096 /* elements that a thread takes at a time */

/* Both activations are x * s(z(x)) with s(z) = 1 / (1 + e^-z): z is x for SiLU, and 2 u for GELU's tanh form, as
   (1 + tanh(u)) / 2 = s(2 u). */
INLINE float inner(float x, int activation) {
    const float factor = 1.5957691216f; /* 2 sqrt(2 / pi) */
    return activation == SILU ? x : factor * (x + 0.044715f * x * x * x);
}

INLINE float inner_slope(float x, int activation) {
    const float factor = 1.5957691216f;
    return activation == SILU ? 1.0f : factor * (1.0f + 0.134145f * x * x);
}

INLINE float sigmoid(float z) {
    const float e = exponential(-fabsf(z));
    return (z < 0.0f ? e : 1.0f) / (1.0f + e);
}

INLINE void gated_part(const void *gate, const void *up, void *out, int64_t start, int64_t end, int activation,
                       int kind) {
#pragma omp simd
    for (int64_t i = start; i < end; i++) {
        const float x = get(gate, i, kind);
        put(out, i, x * sigmoid(inner(x, activation)) * get(up, i, kind), kind);
    }
}

/* out = activation(gate) * up; out may be either. */
void gated(const void *gate, const void *up, void *out, int64_t size, int64_t activation, int64_t kind,
           int64_t threads) {
    PARALLEL
    for (int64_t start = 0; start < size; start += PART) {
        const int64_t end = start + PART < size ? start + PART : size;
        BY_ACTIVATION(gated_part, activation, kind, gate, up, out, start, end);
    }
}

INLINE void gated_backward_part(const void *grad, void *gate, const void *up, void *grad_up, int64_t start, int64_t end,
                                int activation, int kind) {
#pragma omp simd
    for (int64_t i = start; i < end; i++) {
        const float x = get(gate, i, kind), g = get(grad, i, kind), u = get(up, i, kind);
        const float s = sigmoid(inner(x, activation));
        put(grad_up, i, g * (x * s), kind);
        put(gate, i, g * u * (s * (1.0f + x * inner_slope(x, activation) * (1.0f - s))), kind);
    }
}

/* Put the gradient of gate in its place and that of up in grad_up, which may be up or grad. */
void gated_backward(const void *grad, void *gate, const void *up, void *grad_up, int64_t size, int64_t activation,
                    int64_t kind, int64_t threads) {
    PARALLEL
    for (int64_t start = 0; start < size; start += PART) {
        const int64_t end = start + PART < size ? start + PART : size;
        BY_ACTIVATION(gated_backward_part, activation, kind, grad, gate, up, grad_up, start, end);
    }
}

/* --- Rotary positions --------------------------------------------------------------------------------------------- */

INLINE void rotate_token(const char *x, const void *cosines, const void *sines, char *out, int64_t heads, int64_t size,
                         int64_t half, int64_t inner, int kind) {
    for (int64_t h = 0; h < heads; h++) {
        const void *from = x + bytes(h, inner, kind);
        void *to = out + bytes(h, size, kind);
#pragma omp simd
        for (int64_t i = 0; i < half; i++) {
            const float first = get(from, i, kind), second = get(from, half + i, kind);
            put(to, i, first * get(cosines, i, kind) - second * get(sines, i, kind), kind);
            put(to, half + i, second * get(cosines, i, kind) + first * get(sines, i, kind), kind);
        }
        for (int64_t i = 2 * half; i < size; i++) put(to, i, get(from, i, kind), kind);
    }
}

/* x [rows, heads, size]; the first 2 * half coordinates of a head turn, in pairs half apart, by the angles whose cosines
   and sines are given, [rows, half] of x's kind; the others stay. Rows of x lie `outer` numbers apart, heads `inner`; out
   may be x, if that has no gaps. */
void rotate(const char *x, const char *cosines, const char *sines, char *out, int64_t rows, int64_t heads, int64_t size,
            int64_t half, int64_t outer, int64_t inner, int64_t kind, int64_t threads) {
    PARALLEL
    for (int64_t t = 0; t < rows; t++) {
        const int64_t place = bytes(t, heads * size, kind), angle = bytes(t, half, kind);
        BY_KIND(rotate_token, kind, x + bytes(t, outer, kind), cosines + angle, sines + angle, out + place, heads, size,
                half, inner);
    }
}

/* --- Softmax of the head ------------------------------------------------------------------------------------------ */

INLINE float largest_of(const void *x, int64_t start, int64_t end, int kind) {
    float largest = -INFINITY;
#pragma omp simd reduction(max : largest)
    for (int64_t i = start; i < end; i++) largest = get(x, i, kind) > largest ? get(x, i, kind) : largest;
    return largest;
}

/* What is subtracted from exponents: e^(-inf - 0) is 0, while -inf - -inf is no number. */
INLINE float finite_base(float largest) { return largest == -INFINITY ? 0.0f : largest; }

INLINE float sum_of_exponentials(const void *x, int64_t start, int64_t end, float base, int kind) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = start; i < end; i++) sum += exponential(get(x, i, kind) - base);
    return sum;
}

INLINE void put_exponentials(const void *x, void *out, int64_t start, int64_t end, float base, float factor, int kind) {
#pragma omp simd
    for (int64_t i = start; i < end; i++) put(out, i, exponential(get(x, i, kind) - base) * factor, kind);
}

INLINE void cross_entropy_row(void *row, int64_t target, double *loss, int64_t width, float scale, int kind) {
    float largest = -INFINITY;
    double total = 0.0; /* of e^(x - largest); a part at a time, so that it comes from memory once */
    for (int64_t start = 0; start < width; start += PART) {
        const int64_t end = start + PART < width ? start + PART : width;
        const float here = largest_of(row, start, end, kind);
        if (here > largest) {
            total *= (double)exponential(largest - here);
            largest = here;
        }
        total += (double)sum_of_exponentials(row, start, end, finite_base(largest), kind);
    }
    const float base = finite_base(largest), wanted = get(row, target, kind);
    *loss = log(total) + (double)largest - (double)wanted;
    put_exponentials(row, row, 0, width, base, (float)((double)scale / total), kind);
    put(row, target, (float)(((double)exponential(wanted - base) - total) / total * (double)scale), kind);
}

/* Put scale * (softmax - one-hot) in the place of logits, [rows, width], and each row's cross-entropy in losses. */
void cross_entropy(char *logits, const int64_t *targets, double *losses, int64_t rows, int64_t width, float scale,
                   int64_t kind, int64_t threads) {
    PARALLEL
    for (int64_t t = 0; t < rows; t++)
        BY_KIND(cross_entropy_row, kind, logits + bytes(t, width, kind), targets[t], losses + t, width, scale);
}

/* The target's logit gives way to -inf, so that it is in no sum. */
INLINE void running_softmax_row(void *row, int64_t target, float *largest, float *rest, float *wanted, float *factor,
                                int64_t width, int kind) {
    const float here = largest_of(row, 0, width, kind), before = *largest;
    *largest = here > before ? here : before;
    if (target >= 0 && target < width) {
        *wanted = get(row, target, kind);
        put(row, target, -INFINITY, kind);
    }
    const float base = finite_base(*largest);
    *factor = exponential(before - base);
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < width; i++) {
        const float share = exponential(get(row, i, kind) - base);
        sum += share;
        put(row, i, share, kind);
    }
    *rest = *rest * *factor + sum;
}

/* The next columns, from `first` on, of a softmax over more of them than are there at a time: puts e^(x - largest) in the
   place of logits, [rows, width], 0 in that of a row's target. Of each row: the largest logit so far, the sum of
   e^(x - largest) without its target, the target's logit once it was there, and the factor by which what came before has
   to be multiplied, as its largest was another. At first largest is -inf and rest 0. */
void running_softmax(char *logits, const int64_t *targets, float *largest, float *rest, float *wanted, float *factors,
                     int64_t rows, int64_t width, int64_t first, int64_t kind, int64_t threads) {
    PARALLEL
    for (int64_t t = 0; t < rows; t++)
        BY_KIND(running_softmax_row, kind, logits + bytes(t, width, kind), targets[t] - first, largest + t, rest + t,
                wanted + t, factors + t, width);
}

INLINE void add_to_row(const void *part, float *total, float factor, int64_t width, int kind) {
#pragma omp simd
    for (int64_t i = 0; i < width; i++) total[i] = total[i] * factor + get(part, i, kind);
}

/* total = total * its row's factor + part; total, fp32, is [rows, width]. */
void accumulate_rows(const char *part, const float *factors, float *total, int64_t rows, int64_t width, int64_t kind,
                     int64_t threads) {
    PARALLEL
    for (int64_t t = 0; t < rows; t++)
        BY_KIND(add_to_row, kind, part + bytes(t, width, kind), total + t * width, factors[t], width);
}

/* --- Softmax of attention ----------------------------------------------------------------------------------------- */

/* Of the columns from begin to end; kept: room for a row. */
INLINE void softmax_row(const void *scores, void *shares, float *kept, int64_t begin, int64_t end, int kind) {
    for (int64_t i = begin; i < end; i++) kept[i] = get(scores, i, kind);
    const float base = finite_base(largest_of(kept, begin, end, FP32));
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = begin; i < end; i++) sum += kept[i] = exponential(kept[i] - base);
    const float factor = 1.0f / sum;
    for (int64_t i = begin; i < end; i++) put(shares, i, kept[i] * factor, kind);
}

/* shares = softmax(scores), [rows, width], and may be scores. Row t sees the columns from begins[t % masks] to
   ends[t % masks]; other shares are 0. room: fp32 [threads, width]. */
void softmax(const char *scores, char *shares, const int64_t *begins, const int64_t *ends, float *room, int64_t rows,
             int64_t width, int64_t masks, int64_t kind, int64_t threads) {
    PARALLEL
    for (int64_t t = 0; t < rows; t++) {
        const int64_t place = bytes(t, width, kind), begin = begins[t % masks], end = ends[t % masks];
        float *kept = room + omp_get_thread_num() * width;
        BY_KIND(softmax_row, kind, scores + place, shares + place, kept, begin, end);
        memset(shares + place, 0, (size_t)bytes(1, begin, kind));
        memset(shares + place + bytes(1, end, kind), 0, (size_t)bytes(1, width - end, kind));
    }
}

/* --- Gradients ---------------------------------------------------------------------------------------------------- */

INLINE void accumulate_part(const void *part, float *total, int64_t start, int64_t end, float factor, int kind) {
#pragma omp simd
    for (int64_t i = start; i < end; i++) total[i] += factor * get(part, i, kind);
}

/* total, fp32, += factor * part. */
void accumulate(const void *part, float *total, int64_t size, float factor, int64_t kind, int64_t threads) {
    PARALLEL
    for (int64_t start = 0; start < size; start += PART) {
        const int64_t end = start + PART < size ? start + PART : size;
        BY_KIND(accumulate_part, kind, part, total, start, end, factor);
    }
}

#include "adamw.h"
#include "int8_rows.h"
