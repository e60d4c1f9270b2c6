/* Calls delta_rule.c on blocks from the heap, each of exactly its size, so that sanitizers see what it reads and writes.
   SOURCE is the file, given on the command line. */

#include SOURCE

#include <stdio.h>
#include <stdlib.h>

/* Numbers from -1 to 1 of a kind; state is changed. */
static void *numbers(int64_t count, int kind, uint32_t *state) {
    void *made = malloc((size_t)count * (kind == FP32 ? 4 : 2));
    for (int64_t i = 0; i < count; i++) {
        *state = *state * 1664525u + 1013904223u;
        put(made, i, (float)(*state >> 8) / 8388608.0f - 1.0f, kind);
    }
    return made;
}

static void run(const Segment *segments, int64_t count, int64_t share, int64_t d, int64_t e, int64_t seen, int kind) {
    const int64_t tokens = segments[count - 1].end, heads = 3, values = heads * share;
    const int64_t channels = 2 * heads * d + values * e, threads = 3;
    const Sizes sizes = {tokens, count, heads, share, d, e, seen};
    uint32_t state = 1;
    char *qkv = numbers(tokens * channels, kind, &state), *grad = numbers(tokens * values * e, kind, &state);
    float *taps = numbers(seen * channels, FP32, &state), *grad_taps = numbers(seen * channels, FP32, &state);
    float *decay = numbers(values * tokens, FP32, &state), *beta = numbers(values * tokens, FP32, &state);
    float *grad_decay = numbers(values * tokens, FP32, &state), *grad_beta = numbers(values * tokens, FP32, &state);
    for (int64_t i = 0; i < values * tokens; i++) decay[i] = -fabsf(decay[i]), beta[i] = fabsf(beta[i]);
    char *states = numbers((1 + tokens / CHUNK) * values * d * e, kind, &state);
    char *out = numbers(tokens * values * e, kind, &state), *grad_qkv = numbers(tokens * channels, kind, &state);
    float *room = malloc((size_t)(threads * delta_room(&sizes)) * 4);
    memset(room, 0xff, (size_t)(threads * delta_room(&sizes)) * 4); /* what was not written is no number */
    delta_forward(qkv, taps, decay, beta, states, out, segments, &sizes, room, 1e-6f, kind, threads);
    delta_backward(grad, qkv, taps, decay, beta, states, grad_qkv, grad_decay, grad_beta, grad_taps, segments, &sizes,
                   room, 1e-6f, kind, threads);
    for (int64_t i = 0; i < tokens * channels; i++)
        if (!isfinite(get(grad_qkv, i, kind))) puts("not finite"), exit(1);
    void *all[] = {qkv, grad, taps, grad_taps, decay, beta, grad_decay, grad_beta, states, out, grad_qkv, room};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
}

int main(void) {
    const Segment alone[] = {{0, 1, 0}}, apart[] = {{0, 70, 0}, {70, 72, 0}, {72, 200, 0}};
    const Segment together[] = {{0, 66, 0}, {66, 67, 66}, {67, 140, 66}}, brief[] = {{0, 2, 0}, {2, 5, 2}};
    for (int kind = FP32; kind <= BF16; kind++)
        for (int64_t share = 1; share <= 3; share += 2) {
            run(alone, 1, share, 16, 32, 4, kind);
            run(apart, 3, share, 48, 16, 4, kind);
            run(together, 3, share, 32, 48, 3, kind);
            run(brief, 2, share, 16, 16, 16, kind);
        }
    puts("done");
}
