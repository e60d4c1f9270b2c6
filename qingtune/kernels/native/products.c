/* fp32 products with weights as they are stored, in fp32, bf16 or fp16: y = x W^T and y = x W.

   A block of the weight is widened and laid out in panels that the L2 cache holds; all rows of x then go through it, a
   few at a time, as products of PyTorch do it (Goto & van de Geijn 2008, Anatomy of high-performance matrix
   multiplication). As any product lays its weight out, widening costs nothing. Each number of y is a sum in one order,
   whatever the number of threads, so that results do not depend on it.

   Shapes: T rows of x, K numbers that are summed over, N numbers of a row of y. */

#include "simd.h"

#include <omp.h>
#include <string.h>

/* Of x at a time: with 2 vectors of W, the sums of 14 rows take 28 of 32 registers, those of 6 rows 12 of 16. */
#define ROWS (LANES == 16 ? 14 : 6)
#define PANEL (2 * LANES) /* numbers of a row of y that are summed at a time */
#define DEPTH 384         /* numbers that are summed over between two visits of y */
#define WIDTH 256         /* numbers of a row of y that a block holds the weights of: 384 kB with DEPTH */

enum { FP32, BF16, FP16 };

SIMD int64_t bytes_of(int kind) { return kind == FP32 ? 4 : 2; }

/* --- Weights ----------------------------------------------------------------------------------------------------- */

SIMD Floats widened(const char *p, const int kind) {
    if (kind == FP32) return load((const float *)p);
    return kind == FP16 ? from_fp16(p) : from_bf16(p);
}

SIMD float widened_one(const char *p, const int kind) {
    if (kind == FP32) return *(const float *)p;
    const uint16_t half = *(const uint16_t *)p;
    if (kind == FP16) return _cvtsh_ss(half);
    const uint32_t bits = (uint32_t)half << 16;
    float wide;
    memcpy(&wide, &bits, sizeof wide);
    return wide;
}

/* A panel [depth, PANEL] of the rows of W that start at w; what is beyond `count` rows is 0. */
SIMD void lay_out_rows(const char *w, int64_t stride, int64_t count, int64_t depth, float *panel, const int kind) {
    const int64_t size = bytes_of(kind);
    for (int64_t first = 0; first < PANEL; first += LANES) {
        int64_t k = 0;
        for (; count >= first + LANES && k + LANES <= depth; k += LANES) {
            Floats v[LANES];
            for (int i = 0; i < LANES; i++) v[i] = widened(w + ((first + i) * stride + k) * size, kind);
            transpose(v);
            for (int i = 0; i < LANES; i++) store(panel + (k + i) * PANEL + first, v[i]);
        }
        for (; k < depth; k++)
            for (int64_t i = first; i < first + LANES; i++)
                panel[k * PANEL + i] = i < count ? widened_one(w + (i * stride + k) * size, kind) : 0.0f;
    }
}

/* The same of columns of W. */
SIMD void lay_out_columns(const char *w, int64_t stride, int64_t count, int64_t depth, float *panel, const int kind) {
    const int64_t size = bytes_of(kind);
    for (int64_t k = 0; k < depth; k++, panel += PANEL, w += stride * size)
        if (count >= PANEL) {
            store(panel, widened(w, kind));
            store(panel + LANES, widened(w + LANES * size, kind));
        } else {
            for (int64_t i = 0; i < PANEL; i++) panel[i] = i < count ? widened_one(w + i * size, kind) : 0.0f;
        }
}

/* A weight that is [N, K] where its rows are the panels', else [K, N]; both without gaps. */
typedef struct {
    const char *numbers;
    int64_t kind, by_rows, wide, deep;
} Weight;

SIMD void lay_out_kind(const Weight *w, int64_t n, int64_t k, int64_t depth, float *panel, const int kind) {
    const int64_t stride = w->by_rows ? w->deep : w->wide, count = w->wide - n;
    const char *from = w->numbers + (w->by_rows ? n * stride + k : k * stride + n) * bytes_of(kind);
    if (w->by_rows) lay_out_rows(from, stride, count, depth, panel, kind);
    else lay_out_columns(from, stride, count, depth, panel, kind);
}

static void lay_out(const Weight *w, int64_t n, int64_t k, int64_t depth, float *panel) {
    if (w->kind == FP32) lay_out_kind(w, n, k, depth, panel, FP32);
    else if (w->kind == BF16) lay_out_kind(w, n, k, depth, panel, BF16);
    else lay_out_kind(w, n, k, depth, panel, FP16);
}

/* --- Products ---------------------------------------------------------------------------------------------------- */

/* Rows of x, or of y, and the numbers from one to the next. */
typedef struct {
    float *first;
    int64_t stride;
} Rows;

/* A step of the sums. Loads are kept apart from what uses them: a compiler would repeat each in its two products. */
#define STEP(j)                                                               \
    do {                                                                      \
        Floats left = load(panel + (j) * PANEL), right = load(panel + (j) * PANEL + LANES); \
        __asm__("" : "+v"(left), "+v"(right));                                \
        _Pragma("GCC unroll 16") for (int r = 0; r < count; r++) {            \
            Floats same = every(at[r / 3][(j) + r % 3 * x.stride]);             \
            __asm__("" : "+v"(same));                                         \
            sum[r][0] = times_plus(same, left, sum[r][0]);                  \
            sum[r][1] = times_plus(same, right, sum[r][1]);                 \
        }                                                                     \
    } while (0)

/* y [count, PANEL] (+)= x [count, depth] panel [depth, PANEL]. */
SIMD void tile(const int count, Rows x, const float *panel, int64_t depth, Rows y, int add) {
    Floats sum[ROWS][2];
    const float *at[(ROWS + 2) / 3]; /* every third row: an address holds no more than twice the stride */
    for (int i = 0; i < (count + 2) / 3; i++) at[i] = x.first + 3 * i * x.stride;
    for (int r = 0; r < count; r++)
        for (int half = 0; half < 2; half++)
            sum[r][half] = add ? load(y.first + r * y.stride + half * LANES) : zeros();
    for (; depth >= 4; depth -= 4, panel += 4 * PANEL) {
        STEP(0);
        STEP(1);
        STEP(2);
        STEP(3);
        for (int i = 0; i < (count + 2) / 3; i++) at[i] += 4;
    }
    for (; depth > 0; depth--, panel += PANEL) {
        STEP(0);
        for (int i = 0; i < (count + 2) / 3; i++) at[i] += 1;
    }
    for (int r = 0; r < count; r++)
        for (int half = 0; half < 2; half++) store(y.first + r * y.stride + half * LANES, sum[r][half]);
}

#define CASE(n) \
    case n: tile(n, x, panel, depth, y, add); return

static void whole_tile(int64_t count, Rows x, const float *panel, int64_t depth, Rows y, int add) {
    switch (count) {
#if ROWS > 6
        CASE(14); CASE(13); CASE(12); CASE(11); CASE(10); CASE(9); CASE(8); CASE(7);
#endif
        CASE(6); CASE(5); CASE(4); CASE(3); CASE(2); CASE(1);
    }
}

/* A tile of which y has only the first `width` numbers of a row. */
static void partial_tile(int64_t count, Rows x, const float *panel, int64_t depth, Rows y, int add, int64_t width) {
    float numbers[ROWS * PANEL] = {0};
    const Rows apart = {numbers, PANEL};
    for (int64_t r = 0; add && r < count; r++) memcpy(numbers + r * PANEL, y.first + r * y.stride, width * sizeof(float));
    whole_tile(count, x, panel, depth, apart, add);
    for (int64_t r = 0; r < count; r++) memcpy(y.first + r * y.stride, numbers + r * PANEL, width * sizeof(float));
}

/* The numbers of y in some panels, [T, from PANEL .. to PANEL]. */
static void block(const Weight *w, Rows x, int64_t count, int64_t from, int64_t to, Rows y, int add) {
    static _Thread_local float panels[WIDTH * DEPTH] __attribute__((aligned(64)));
    const int64_t parts = (w->deep + DEPTH - 1) / DEPTH;
    for (int64_t part = 0; part < parts; part++) {
        const int64_t k = w->deep * part / parts, depth = w->deep * (part + 1) / parts - k;
        for (int64_t p = from; p < to; p++) lay_out(w, p * PANEL, k, depth, panels + (p - from) * depth * PANEL);
        for (int64_t t = 0; t < count; t += ROWS) {
            const int64_t some = count - t < ROWS ? count - t : ROWS;
            const Rows mine = {x.first + t * x.stride + k, x.stride};
            for (int64_t p = from; p < to; p++) {
                const float *panel = panels + (p - from) * depth * PANEL;
                const Rows place = {y.first + t * y.stride + p * PANEL, y.stride};
                const int64_t left = w->wide - p * PANEL;
                if (left >= PANEL) whole_tile(some, mine, panel, depth, place, add || part);
                else partial_tile(some, mine, panel, depth, place, add || part, left);
            }
        }
    }
}

/* y [T, N] (+)= x [T, K] by a weight [N, K] (by_rows) or [K, N]; strides of x and y in numbers. */
void multiply(const float *x, int64_t x_stride, int64_t count, const void *weight, int64_t kind, int64_t by_rows,
              int64_t wide, int64_t deep, float *y, int64_t y_stride, int64_t add, int64_t threads) {
    const Weight w = {weight, kind, by_rows, wide, deep};
    const Rows from = {(float *)x, x_stride}, to = {y, y_stride};
    const int64_t panels = (wide + PANEL - 1) / PANEL;
#pragma omp parallel num_threads(threads)
    {
        const int64_t me = omp_get_thread_num(), all = omp_get_num_threads();
        const int64_t first = panels * me / all, mine = panels * (me + 1) / all - first;
        const int64_t blocks = (mine + WIDTH / PANEL - 1) / (WIDTH / PANEL);
        for (int64_t b = 0; b < blocks; b++)
            block(&w, from, count, first + mine * b / blocks, first + mine * (b + 1) / blocks, to, (int)add);
    }
}
