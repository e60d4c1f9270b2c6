/* Runs the functions of elementwise.c over odd sizes, each buffer exactly as large as it has to be, so that sanitizers see
   every access beyond it. Several threads have to give what one gives, bit for bit. */

#include <stdio.h>
#include <stdlib.h>

#include SOURCE

static uint32_t state = 1;

static float drawn(void) { /* in [-2, 2) */
    state = state * 1664525u + 1013904223u;
    return (float)(state >> 8) / 4194304.0f - 2.0f;
}

static void *room(int64_t size) {
    void *memory = malloc((size_t)size);
    if (!memory) abort();
    return memory;
}

static char *numbers(int64_t count, int64_t kind) {
    char *made = room(bytes(1, count, kind));
    for (int64_t i = 0; i < count; i++) put(made, i, drawn(), (int)kind);
    return made;
}

static char *copy(const char *from, int64_t size) { return memcpy(room(size), from, (size_t)size); }

static void compare(char *one, char *other, int64_t size, const char *what) {
    if (memcmp(one, other, (size_t)size)) {
        printf("%s: several threads give something else than one\n", what);
        exit(3);
    }
    free(one);
    free(other);
}

static void try_rows(int64_t rows, int64_t width, int64_t kind) {
    const int64_t size = bytes(rows, width, kind);
    char *x = numbers(rows * width, kind), *grad = numbers(rows * width, kind), *total = numbers(rows * width, kind);
    float *weight = (float *)numbers(width, FP32);
    int64_t *targets = room(rows * 8), *begins = room(2 * rows * 8), *ends = begins + rows;
    for (int64_t t = 0; t < rows; t++) {
        targets[t] = t % 2 ? 0 : width - 1;
        begins[t] = t % width / 2;
        ends[t] = width - t % ((width + 1) / 2);
    }
    char *normed[2], *grads[2], *sums[2], *weights[2], *logits[2], *losses[2], *shares[2], *scores[2], *hidden[2], *gates[2];
    for (int i = 0; i < 2; i++) {
        const int64_t threads = i ? 3 : 1;
        char *rates = room(rows * 4), *kept = room(threads * width * 4);
        norm(x, weight, normed[i] = room(size), rows, width, 1e-6f, 1.0f, kind, threads);
        norm_backward(grad, x, weight, (float *)(grads[i] = room(rows * width * 4)), (float *)rates,
                      (float *)(weights[i] = room(width * 4)), rows, width, 1e-6f, 0.0f, kind, threads);
        norm_add_backward(grad, x, weight, sums[i] = copy(total, size), rows, width, 1e-6f, 0.0f, kind, threads);
        cross_entropy(logits[i] = copy(x, size), targets, (double *)(losses[i] = room(rows * 8)), rows, width, 0.5f, kind,
                      threads);
        softmax(x, shares[i] = room(size), begins, ends, (float *)kept, rows, width, rows, kind, threads);
        softmax_backward(grad, shares[i], scores[i] = room(size), begins, ends, rows, width, rows, kind, threads);
        gated(x, grad, hidden[i] = room(size), rows * width, GELU_TANH, kind, threads);
        gates[i] = copy(x, size);
        char *changed = copy(grad, size);
        gated_backward(changed, gates[i], total, changed, rows * width, SILU, kind, threads);
        free(changed);
        free(rates);
        free(kept);
    }
    compare(normed[0], normed[1], size, "norm");
    compare(grads[0], grads[1], rows * width * 4, "norm_backward");
    compare(weights[0], weights[1], width * 4, "the gradient of a norm's weight");
    compare(sums[0], sums[1], size, "norm_add_backward");
    compare(logits[0], logits[1], size, "cross_entropy");
    compare(losses[0], losses[1], rows * 8, "losses");
    compare(shares[0], shares[1], size, "softmax");
    compare(scores[0], scores[1], size, "softmax_backward");
    compare(hidden[0], hidden[1], size, "gated");
    compare(gates[0], gates[1], size, "gated_backward");
    free(x);
    free(grad);
    free(total);
    free(weight);
    free(targets);
    free(begins);
}

static void try_rotation(int64_t rows, int64_t heads, int64_t size, int64_t half, int64_t kind) {
    char *x = numbers(rows * heads * size, kind), *c = numbers(rows * half, kind), *s = numbers(rows * half, kind), *out[2];
    for (int i = 0; i < 2; i++)
        rotate(x, c, s, out[i] = room(bytes(rows, heads * size, kind)), rows, heads, size, half, kind, i ? 3 : 1);
    compare(out[0], out[1], bytes(rows, heads * size, kind), "rotate");
    free(x);
    free(c);
    free(s);
}

int main(void) {
    const int64_t widths[] = {1, 2, 15, 16, 33, 100, 4099};
    for (int64_t kind = FP32; kind <= BF16; kind++) {
        for (int64_t rows = 1; rows < 6; rows += 2)
            for (int i = 0; i < 7; i++) try_rows(rows, widths[i], kind);
        try_rotation(1, 1, 2, 1, kind);
        try_rotation(7, 3, 40, 9, kind);
        try_rotation(4, 2, 32, 16, kind);
    }
    puts("done");
    return 0;
}
