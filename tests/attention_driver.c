/* Calls attention.c on blocks from the heap, each of exactly its size, so that sanitizers see what it reads and writes.
   SOURCE is the file, given on the command line. */

#include SOURCE

#include <stdio.h>
#include <stdlib.h>

/* Numbers from -1 to 1 of a kind; state is changed. */
static void *numbers(int64_t count, int64_t kind, uint32_t *state) {
    void *made = malloc((size_t)bytes(1, count, kind));
    for (int64_t i = 0; i < count; i++) {
        *state = *state * 1664525u + 1013904223u;
        put(made, i, (float)(*state >> 8) / 8388608.0f - 1.0f, (int)kind);
    }
    return made;
}

/* Rows `every` apart ask, each of which sees `window` keys. */
static void run(Segment *segments, int64_t count, int64_t heads, int64_t key_heads, int64_t size, int64_t every,
                int64_t window, int64_t kind) {
    const int64_t tokens = segments[count - 1].end, threads = 3;
    int64_t *begins = malloc((size_t)tokens * 8), *ends = malloc((size_t)tokens * 8), rows = 0;
    for (int64_t s = 0; s < count; s++) {
        segments[s].first = rows;
        for (int64_t token = segments[s].start; token < segments[s].end; token++) {
            if (token % every) continue;
            ends[rows] = token - segments[s].start + segments[s].shared + 1;
            begins[rows] = ends[rows] > window ? ends[rows] - window : 0;
            rows++;
        }
        segments[s].last = rows;
    }
    begins = realloc(begins, (size_t)rows * 8), ends = realloc(ends, (size_t)rows * 8);
    uint32_t state = 1;
    const int64_t of_q = rows * heads * size, of_k = tokens * key_heads * size;
    char *q = numbers(of_q, kind, &state), *k = numbers(of_k, kind, &state), *v = numbers(of_k, kind, &state);
    char *out = numbers(of_q, kind, &state), *grad = numbers(of_q, kind, &state), *grad_q = numbers(of_q, kind, &state);
    char *grad_k = numbers(of_k, kind, &state), *grad_v = numbers(of_k, kind, &state);
    const Attention a = {q, k, v, segments, begins, ends, count, rows, heads, key_heads, size, 0.3f, kind, 0, 0};
    const int64_t of_room = attention_room(&a, threads);
    const int64_t of_sums = 2 * heads * all_keys(&a, count) * filled(size, 32);
    float *lengths = malloc((size_t)(heads * rows) * 4), *room = malloc((size_t)of_room * 4);
    float *sums = malloc((size_t)of_sums * 4);
    memset(room, 0xff, (size_t)of_room * 4), memset(sums, 0xff, (size_t)of_sums * 4); /* what was not written is no number */
    attention_forward(&a, out, lengths, room, threads);
    memset(room, 0xff, (size_t)of_room * 4);
    attention_backward(&a, out, lengths, grad, grad_q, grad_k, grad_v, sums, room, threads);
    for (int64_t i = 0; i < of_q; i++)
        if (!isfinite(get(out, i, (int)kind)) || !isfinite(get(grad_q, i, (int)kind))) puts("not finite"), exit(1);
    for (int64_t i = 0; i < of_k; i++)
        if (!isfinite(get(grad_k, i, (int)kind)) || !isfinite(get(grad_v, i, (int)kind))) puts("not finite"), exit(1);
    void *all[] = {begins, ends, q, k, v, out, grad, grad_q, grad_k, grad_v, lengths, room, sums};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
}

int main(void) {
    Segment alone[] = {{0, 0, 1, 0, 0}}, apart[] = {{0, 0, 70, 0, 0}, {0, 70, 72, 0, 0}, {0, 72, 272, 0, 0}};
    Segment together[] = {{0, 0, 66, 0, 0}, {66, 66, 67, 0, 0}, {66, 67, 140, 0, 0}};
    for (int64_t kind = FP32; kind <= (attention_narrow() ? BF16 : FP32); kind++) {
        run(alone, 1, 1, 1, 7, 1, 9, kind);
        run(apart, 3, 4, 2, 32, 1, 1000, kind);
        run(apart, 3, 3, 1, 80, 1, 20, kind);
        run(together, 3, 6, 2, 12, 1, 1000, kind);
        run(together, 3, 2, 2, 256, 3, 30, kind);
        run(apart, 3, 2, 1, 96, 73, 1000, kind); /* one segment has no rows that ask */
    }
    puts("done");
}
