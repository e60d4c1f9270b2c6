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
    char *normed[2], *grads[2], *sums[2], *weights[2], *logits[2], *losses[2], *shares[2], *hidden[2], *gates[2];
    char *totals[2], *running[2], *rest[2], *wanted[2], *added[2];
    for (int i = 0; i < 2; i++) {
        const int64_t threads = i ? 3 : 1;
        char *rates = room(rows * 4), *kept = room(threads * width * 4);
        norm(x, weight, normed[i] = room(size), rows, width, 1, width, 0, 1e-6f, 1.0f, kind, threads);
        norm_backward(grad, x, weight, (float *)(grads[i] = room(rows * width * 4)), (float *)rates,
                      (float *)(weights[i] = room(width * 4)), rows, width, 1, width, 0, 1e-6f, 0.0f, kind, threads);
        norm_add_backward(grad, x, weight, sums[i] = copy(total, size), rows, width, 1e-6f, 0.0f, kind, threads);
        cross_entropy(logits[i] = copy(x, size), targets, (double *)(losses[i] = room(rows * 8)), rows, width, 0.5f, kind,
                      threads);
        float *largest = room(rows * 4), *factors = room(rows * 4);
        for (int64_t t = 0; t < rows; t++) largest[t] = -INFINITY;
        running_softmax(running[i] = copy(x, size), targets, largest, (float *)memset(rest[i] = room(rows * 4), 0, rows * 4),
                        (float *)memset(wanted[i] = room(rows * 4), 0, rows * 4), factors, rows, width, 0, kind, threads);
        accumulate_rows(running[i], factors, (float *)(added[i] = copy(grads[i], rows * width * 4)), rows, width, kind,
                        threads);
        free(largest);
        free(factors);
        softmax(x, shares[i] = room(size), begins, ends, (float *)kept, rows, width, rows, kind, threads);
        gated(x, grad, hidden[i] = room(size), rows * width, GELU_TANH, kind, threads);
        gates[i] = copy(x, size);
        char *changed = copy(grad, size);
        gated_backward(changed, gates[i], total, changed, rows * width, SILU, kind, threads);
        free(changed);
        accumulate(x, (float *)(totals[i] = copy(grads[i], rows * width * 4)), rows * width, 0.5f, kind, threads);
        free(rates);
        free(kept);
    }
    compare(normed[0], normed[1], size, "norm");
    compare(grads[0], grads[1], rows * width * 4, "norm_backward");
    compare(weights[0], weights[1], width * 4, "the gradient of a norm's weight");
    compare(sums[0], sums[1], size, "norm_add_backward");
    compare(logits[0], logits[1], size, "cross_entropy");
    compare(losses[0], losses[1], rows * 8, "losses");
    compare(running[0], running[1], size, "running_softmax");
    compare(rest[0], rest[1], rows * 4, "the sums of running_softmax");
    compare(wanted[0], wanted[1], rows * 4, "the targets of running_softmax");
    compare(added[0], added[1], rows * width * 4, "accumulate_rows");
    compare(shares[0], shares[1], size, "softmax");
    compare(hidden[0], hidden[1], size, "gated");
    compare(gates[0], gates[1], size, "gated_backward");
    compare(totals[0], totals[1], rows * width * 4, "accumulate");
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
        rotate(x, c, s, out[i] = room(bytes(rows, heads * size, kind)), rows, heads, size, half,
               heads * size, size, kind, i ? 3 : 1);
    compare(out[0], out[1], bytes(rows, heads * size, kind), "rotate");
    free(x);
    free(c);
    free(s);
}

static void try_int8(int64_t rows, int64_t width, int64_t kind) {
    const int64_t size = bytes(rows, width, kind);
    char *x = numbers(rows * width, kind), *packed[2], *scales[2], *wide[2], *sums[2];
    float *columns = (float *)numbers(width, FP32);
    int32_t *products = room(rows * width * 4);
    for (int64_t i = 0; i < rows * width; i++) products[i] = (int32_t)(1000.0f * drawn());
    for (int i = 0; i < 2; i++) {
        const int64_t threads = i ? 3 : 1;
        packed[i] = room(rows * width);
        scales[i] = room(rows * 4);
        quantize_rows(x, rows % 2 ? columns : NULL, (int8_t *)packed[i], (float *)scales[i], rows, width, kind, threads);
        widen((int8_t *)packed[i], (float *)scales[i], wide[i] = room(size), rows, width, kind, threads);
        scale_sums(products, (float *)scales[i], rows % 2 ? NULL : columns, sums[i] = copy(x, size), rows, width, rows % 2,
                   kind, threads);
    }
    compare(packed[0], packed[1], rows * width, "quantize_rows");
    compare(scales[0], scales[1], rows * 4, "scales");
    compare(wide[0], wide[1], size, "widen");
    compare(sums[0], sums[1], size, "scale_sums");
    free(x);
    free(columns);
    free(products);
}

static void try_adamw(int64_t count, int64_t kind) {
    const int64_t blocks = (count + BLOCK - 1) / BLOCK, size = bytes(1, count, kind);
    char *weights = numbers(count, kind), *grads = numbers(count, kind), *updated[2], *first[2], *second[2];
    float *noise = (float *)numbers(blocks * BLOCK, FP32);
    for (int64_t i = 0; i < blocks * BLOCK; i++) noise[i] = (noise[i] + 2.0f) / 4.0f;
    for (int i = 0; i < 2; i++) {
        float *largest = room(2 * blocks * 4);
        for (int64_t k = 0; k < 2 * blocks; k++) largest[k] = 0.5f;
        memset(first[i] = room(blocks * BLOCK), 3, (size_t)(blocks * BLOCK));
        memset(second[i] = room(blocks * BLOCK), 200, (size_t)(blocks * BLOCK));
        adamw8bit(updated[i] = copy(weights, size), grads, (int8_t *)first[i], largest, (uint8_t *)second[i],
                  largest + blocks, noise, noise, noise, count, 0.9f, 0.999f, 0.1f, 0.001f, 1e-8f, 0.99f, 0.1f, kind,
                  i ? 3 : 1);
        free(largest);
    }
    compare(updated[0], updated[1], size, "adamw8bit");
    compare(first[0], first[1], blocks * BLOCK, "first moments");
    compare(second[0], second[1], blocks * BLOCK, "second moments");
    free(weights);
    free(grads);
    free(noise);
}

int main(void) {
    const int64_t widths[] = {1, 2, 15, 16, 33, 100, 4099};
    for (int64_t kind = FP32; kind <= BF16; kind++) {
        for (int64_t rows = 1; rows < 6; rows += 2)
            for (int i = 0; i < 7; i++) try_rows(rows, widths[i], kind);
        for (int64_t rows = 1; rows < 5; rows++)
            for (int i = 0; i < 7; i++) try_int8(rows, widths[i], kind);
        for (int i = 0; i < 7; i++) try_adamw(widths[i], kind);
        try_adamw(256, kind);
        try_rotation(1, 1, 2, 1, kind);
        try_rotation(7, 3, 40, 9, kind);
        try_rotation(4, 2, 32, 16, kind);
    }
    puts("done");
    return 0;
}
