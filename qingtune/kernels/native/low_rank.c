/* The products of low-rank adapters with activations, which are narrow: one of three sizes is the rank.

   Activations are fp32, or bf16 where the CPU has dot products of bf16; adapters and their gradients are fp32. Adapters are
   rounded to the activations' format as they are laid out in panels; sums are fp32, and only results in bf16 are rounded.
   Each number is a sum in one order, whatever the number of threads, so that results do not depend on it.

   Numbers that are summed over lie in words: one number in fp32, two neighbours in bf16, which a dot product takes. So
   one tile serves all products: its left factor gives a word at a time, its right one vectors of them. In bf16 all sizes
   but the number of rows of activations are even, and so are their strides, which are in numbers.

   An adapter's matrices lie in parts below one another, with as many rows each as `heights` says, without gaps. */

#include "low_rank.h"

#define DEPTH 384         /* words of a place that are laid out at a time */
#define BLOCK 128         /* rows and columns of a block of gradients */
#define MOST_PANELS 8     /* of a block of `expand`, */
#define BLOCK_WORDS 98304 /* and the room for it: 393 kB */

/* --- Tiles by what becomes of them -------------------------------------------------------------------------------- */

typedef void Tile(int64_t count, int64_t vectors, Left left, const float *panel, int64_t depth, float scale,
                  char *const *to);

#define TILE(name, across, what, y_kind, kind)                                                                        \
    static void name(int64_t count, int64_t vectors, Left left, const float *panel, int64_t depth, float scale,       \
                     char *const *to) {                                                                               \
        whole_tile(count, vectors, left, panel, depth, scale, to, across, what, y_kind, kind);                        \
    }

TILE(put_fp32, 0, PUT, FP32, FP32)
TILE(add_fp32, 0, ADD, FP32, FP32)
TILE(outer_fp32, 1, ADD, FP32, FP32)
#if BF16_UNITS
TILE(put_bf16, 0, PUT, BF16, BF16)
TILE(add_bf16, 0, ADD, BF16, BF16)
TILE(outer_bf16, 1, ADD, FP32, BF16)
#else /* not called, as takes_bf16 says */
#define put_bf16 NULL
#define add_bf16 NULL
#define outer_bf16 NULL
#endif

int64_t takes_bf16(void) { return BF16_UNITS; }

/* A tile of which rows of y, of this kind of numbers, have only `width` of them. */
static void partial_tile(Tile *whole, int64_t count, Left left, const float *panel, int64_t depth, float scale,
                         char *const *to, int64_t width, int64_t kind) {
    char numbers[ROWS][PANEL * 4], *apart[ROWS] = {NULL};
    const size_t size = (size_t)bytes(1, width, kind);
    for (int64_t r = 0; r < count; r++) {
        memset(numbers[r], 0, sizeof numbers[r]);
        memcpy(numbers[r], to[r], size);
        apart[r] = numbers[r];
    }
    whole(count, width > LANES ? 2 : 1, left, panel, depth, scale, apart);
    for (int64_t r = 0; r < count; r++) memcpy(to[r], numbers[r], size);
}

static void any_tile(Tile *whole, int64_t count, Left left, const float *panel, int64_t depth, float scale,
                     char *const *to, int64_t width, int64_t kind) {
    if (width >= PANEL || width == LANES) whole(count, width >= PANEL ? 2 : 1, left, panel, depth, scale, to);
    else partial_tile(whole, count, left, panel, depth, scale, to, width, kind);
}

/* --- Products with an adapter's matrices -------------------------------------------------------------------------- */

/* Rows of activations, and the numbers from one to the next. */
typedef struct {
    char *first;
    int64_t stride;
} Rows;

SIMD char *number_at(Rows x, int64_t row, int64_t column, int64_t kind) {
    return x.first + bytes(1, row * x.stride + column, kind);
}

/* Panels of a weight that are laid out, numbered from `from` to `to`, each of all `depth` words that are summed over. */
typedef struct {
    const float *words;
    int64_t from, to, depth;
} Panels;

/* Rows `first` to `end` of y (+)= x W, in some panels and summed over words `k` to `until` of them. */
static void rows_of_panels(Tile *whole, Rows x, int64_t first, int64_t end, int64_t wide, Panels w, int64_t k,
                           int64_t until, Rows y, int64_t kind) {
    const int64_t tiles = (end - first + ROWS - 1) / ROWS;
    for (int64_t t = 0; t < tiles; t++) {
        const int64_t row = first + (end - first) * t / tiles, next = first + (end - first) * (t + 1) / tiles;
        const Left left = {(const float *)number_at(x, row, k * numbers_in(kind), kind), x.stride / numbers_in(kind)};
        for (int64_t p = w.from; p < w.to; p++) {
            char *at[ROWS];
            for (int64_t r = 0; r < next - row; r++) {
                at[r] = number_at(y, row + r, p * PANEL, kind);
                if (t + 1 < tiles) __builtin_prefetch(number_at(y, next + r, p * PANEL, kind), 1);
            }
            const float *panel = w.words + ((p - w.from) * w.depth + k) * PANEL;
            any_tile(whole, next - row, left, panel, until - k, 1.0f, at, wide - p * PANEL, kind);
        }
    }
}

/* y [rows, N] = scale x [rows, K] W of few columns. W is what the parts make up, or where they lie by_rows its transpose;
   all parts have rows of `width` numbers. laid_out: room for K words, in bf16 half as many, times N rounded up to whole
   panels. */
void reduce(const void *x, int64_t x_stride, int64_t rows, float *const *parts, const int64_t *heights, int64_t count,
            int64_t width, int64_t by_rows, float scale, float *laid_out, void *y, int64_t y_stride, int64_t kind,
            int64_t threads) {
    const Weight w = {{parts, heights, count, width}, by_rows, scale};
    const Rows from = {(char *)x, x_stride}, to = {y, y_stride};
    const int64_t panels = (wide(&w) + PANEL - 1) / PANEL, depth = deep(&w) / numbers_in(kind);
    const int64_t chunks = (depth + DEPTH - 1) / DEPTH;
    const int64_t at_once = kind == FP32 ? 1 : chunks; /* in fp32 sums of all would be less exact than y */
    const Panels all = {laid_out, 0, panels, depth};
#pragma omp parallel num_threads((int)threads)
    {
#pragma omp for collapse(2)
        for (int64_t p = 0; p < panels; p++)
            for (int64_t c = 0; c < chunks; c++) {
                const int64_t k = depth * c / chunks, some = depth * (c + 1) / chunks - k;
                lay_out(&w, p * PANEL, k, some, laid_out + (p * depth + k) * PANEL, kind);
            }
#pragma omp for
        for (int64_t i = 0; i < threads; i++)
            for (int64_t c = 0; c < chunks; c += at_once) {
                Tile *whole = kind == BF16 ? put_bf16 : c ? add_fp32 : put_fp32;
                rows_of_panels(whole, from, rows * i / threads, rows * (i + 1) / threads, wide(&w), all,
                               depth * c / chunks, depth * (c + at_once) / chunks, to, kind);
            }
    }
}

/* y [rows, N] += scale x [rows, K] W of few rows: K is at most BLOCK_WORDS / PANEL words. W as in `reduce`. */
void expand(const void *x, int64_t x_stride, int64_t rows, float *const *parts, const int64_t *heights, int64_t count,
            int64_t width, int64_t by_rows, float scale, void *y, int64_t y_stride, int64_t kind, int64_t threads) {
    const Weight w = {{parts, heights, count, width}, by_rows, scale};
    const Rows from = {(char *)x, x_stride}, to = {y, y_stride};
    const int64_t panels = (wide(&w) + PANEL - 1) / PANEL, depth = deep(&w) / numbers_in(kind);
    const int64_t at_once = least(MOST_PANELS, BLOCK_WORDS / (depth * PANEL));
    const int64_t across = least(panels, threads), along = threads / across; /* threads share columns before rows */
    const int64_t blocks = across * ((panels + across * at_once - 1) / (across * at_once));
#pragma omp parallel for collapse(2) num_threads((int)threads)
    for (int64_t part = 0; part < along; part++)
        for (int64_t b = 0; b < blocks; b++) {
            static _Thread_local float laid_out[BLOCK_WORDS] __attribute__((aligned(64)));
            const Panels mine = {laid_out, panels * b / blocks, panels * (b + 1) / blocks, depth};
            for (int64_t p = mine.from; p < mine.to; p++)
                lay_out(&w, p * PANEL, 0, depth, laid_out + (p - mine.from) * depth * PANEL, kind);
            rows_of_panels(kind == FP32 ? add_fp32 : add_bf16, from, rows * part / along, rows * (part + 1) / along,
                           wide(&w), mine, 0, depth, to, kind);
        }
}

/* --- Their gradients ---------------------------------------------------------------------------------------------- */

typedef struct {
    Rows left, right;
    int64_t rows, kind;
    float scale;
    Stack totals;
} Outer;

/* Words `k` to `k + depth` of `count` columns, in panels. */
static void block_of(const Outer *o, Rows x, int64_t k, int64_t depth, int64_t column, int64_t count, float *to) {
    const int64_t row = k * numbers_in(o->kind);
    for (int64_t i = 0; i < count; i += PANEL)
        interleave(number_at(x, row, column + i, o->kind), x.stride, o->rows - row, least(PANEL, count - i), depth,
                   to + i * depth, o->kind);
}

/* Totals of `high` rows from m and `width` columns from n, of what was laid out. */
static void add_block(const Outer *o, const float *lefts, const float *rights, int64_t depth, int64_t m, int64_t high,
                      int64_t n, int64_t width) {
    for (int64_t i = 0; i < high; i += PANEL) {
        const int64_t mine = least(PANEL, high - i), tiles = (mine + ROWS - 1) / ROWS;
        for (int64_t t = 0; t < tiles; t++) {
            const int64_t first = mine * t / tiles, count = mine * (t + 1) / tiles - first;
            float *rows[ROWS];
            for (int64_t r = 0; r < count; r++) rows[r] = row_of(&o->totals, m + i + first + r) + n;
            for (int64_t p = 0; p < width; p += PANEL) {
                char *at[ROWS];
                for (int64_t r = 0; r < count; r++) at[r] = (char *)(rows[r] + p);
                const Left left = {lefts + i * depth + first, PANEL};
                any_tile(o->kind == FP32 ? outer_fp32 : outer_bf16, count, left, rights + p * depth, depth, o->scale, at,
                         width - p, FP32);
            }
        }
    }
}

/* Totals in rows `top` to `bottom` and columns `from` to `end`. */
static void outer_part(const Outer *o, int64_t top, int64_t bottom, int64_t from, int64_t end) {
    static _Thread_local float lefts[DEPTH * BLOCK] __attribute__((aligned(64)));
    static _Thread_local float rights[DEPTH * BLOCK] __attribute__((aligned(64)));
    const int64_t words = (o->rows + numbers_in(o->kind) - 1) / numbers_in(o->kind);
    const int64_t chunks = (words + DEPTH - 1) / DEPTH;
    for (int64_t c = 0; c < chunks; c++) {
        const int64_t k = words * c / chunks, depth = words * (c + 1) / chunks - k;
        for (int64_t n = from; n < end; n += BLOCK) {
            const int64_t width = least(BLOCK, end - n);
            block_of(o, o->right, k, depth, n, width, rights);
            for (int64_t m = top; m < bottom; m += BLOCK) {
                const int64_t high = least(BLOCK, bottom - m);
                if (n == from || bottom - top > BLOCK) block_of(o, o->left, k, depth, m, high, lefts);
                add_block(o, lefts, rights, depth, m, high, n, width);
            }
        }
    }
}

/* The sums of the parts' rows, fp32 [M, N], += scale left [rows, M]^T right [rows, N]. */
void outer(const void *left, int64_t left_stride, int64_t high, const void *right, int64_t right_stride, int64_t width,
           int64_t rows, float scale, float *const *parts, const int64_t *heights, int64_t count, int64_t kind,
           int64_t threads) {
    const Outer o = {{(char *)left, left_stride}, {(char *)right, right_stride}, rows, kind, scale,
                     {parts, heights, count, width}};
    const int64_t units = ((high > width ? high : width) + PANEL - 1) / PANEL;
#pragma omp parallel for num_threads((int)threads)
    for (int64_t i = 0; i < threads; i++) {
        const int64_t from = units * i / threads * PANEL, to = units * (i + 1) / threads * PANEL;
        if (high > width) outer_part(&o, from, least(to, high), 0, width);
        else outer_part(&o, 0, high, from, least(to, width));
    }
}
