/* What both directions of attention have in common: segments, the keys that rows see, tiles of rows and of keys, and
   scores of a strip of rows.

   Shapes: N rows that ask, H query heads, K key heads, d numbers a head, D of them after filling up, W words a row. */

#ifndef ATTENTION_TILES_H
#define ATTENTION_TILES_H

#include "attention_products.h"

#define NARROW(kind) (BF16_UNITS && (kind) == BF16)
#define NOTHING (-1e30f) /* where the largest score of a row begins: no row has so small a one */

/* Keys of a segment: `shared` tokens at the layout's beginning, then tokens start..end; rows first..last of it ask. */
typedef struct {
    int64_t shared, start, end, first, last;
} Segment;

/* What a call computes. Row n sees keys begins[n]..ends[n] of its segment; both ascend within one. */
typedef struct {
    const char *q, *k, *v;
    const Segment *segments;
    const int64_t *begins, *ends;
    int64_t count, rows, heads, key_heads, size;
    float scale;
    int64_t kind;
    int64_t D, W; /* by `complete` */
} Attention;

/* Rows first..first + count, or keys, of segment number `number`. */
typedef struct {
    Segment segment;
    int64_t number, first, count;
} Rows;

/* A strip of rows `from`..`from` + `rows` of those that a tile has, and columns lo..hi of a tile of keys that they see:
   not all of them see all if it is `masked`, and none sees any from `need` on. */
typedef struct {
    int64_t first, from, rows, key, lo, hi, need, masked;
} Strip;

static Attention complete(const Attention *given) {
    Attention a = *given;
    a.D = filled(a.size, 32), a.W = NARROW(a.kind) ? a.D / 2 : a.D;
    return a;
}

INLINE int64_t keys_of(Segment s) { return s.shared + s.end - s.start; }
INLINE int64_t tiles_of(int64_t count) { return (count + TILE - 1) / TILE; }

/* The token of the layout that a segment's key is. */
INLINE int64_t token_of(Segment s, int64_t key) { return key < s.shared ? key : key - s.shared + s.start; }

/* Tile number `number` of all keys of a head, or of all rows that ask (`asking`); tiles do not reach over segments. */
static Rows find_tile(const Attention *a, int64_t number, int asking) {
    int64_t s = 0, first = number * TILE, size;
    for (;; s++, first -= filled(size, TILE)) {
        size = asking ? a->segments[s].last - a->segments[s].first : keys_of(a->segments[s]);
        if (first < filled(size, TILE)) break;
    }
    return (Rows){a->segments[s], s, first + asking * a->segments[s].first, smallest(TILE, size - first)};
}

/* How many tiles all segments have before number `end`. */
static int64_t count_tiles(const Attention *a, int64_t end, int asking) {
    int64_t sum = 0;
    for (int64_t s = 0; s < end; s++)
        sum += tiles_of(asking ? a->segments[s].last - a->segments[s].first : keys_of(a->segments[s]));
    return sum;
}

/* The keys of all segments before number `end`. */
static int64_t all_keys(const Attention *a, int64_t end) {
    int64_t sum = 0;
    for (int64_t s = 0; s < end; s++) sum += keys_of(a->segments[s]);
    return sum;
}

/* --- Tiles in words ----------------------------------------------------------------------------------------------- */

/* Rows of a head among `heads`, [TILE, W] with zeros after the last. */
static void copy_rows(const Attention *a, const char *x, int64_t heads, int64_t head, Rows rows, float *to) {
    const int64_t row = heads * a->size;
    for (int64_t r = 0; r < TILE; r++) {
        const char *from = x + bytes(rows.first + r, row, a->kind) + bytes(head, a->size, a->kind);
        copy_row(r < rows.count ? from : 0, a->size, a->W, to + r * a->W, a->kind);
    }
}

/* A tile of keys or values, likewise. */
static void copy_keys(const Attention *a, const char *x, int64_t head, Rows keys, float *to) {
    const int64_t row = a->key_heads * a->size;
    for (int64_t r = 0; r < TILE; r++) {
        const int64_t token = token_of(keys.segment, keys.first + smallest(r, keys.count - 1));
        const char *from = x + bytes(token, row, a->kind) + bytes(head, a->size, a->kind);
        copy_row(r < keys.count ? from : 0, a->size, a->W, to + r * a->W, a->kind);
    }
}

/* --- Scores ------------------------------------------------------------------------------------------------------- */

/* The strip of a tile's rows from `from` on, with the tile of keys that begins at `key`; hi is 0 if they see none. */
static Strip strip_of(const Attention *a, Rows rows, int64_t from, int64_t key) {
    Strip s = {rows.first + from, from, smallest(STRIP, rows.count - from), key, 0, 0, 0, 0};
    const int64_t *begins = a->begins + s.first, *ends = a->ends + s.first, last = s.rows - 1;
    const int64_t lo = within(begins[0] - key, 0, TILE);
    s.need = within(ends[last] - key, 0, TILE);
    if (s.need <= lo) return s;
    s.lo = lo / COLUMNS * COLUMNS, s.hi = filled(s.need, COLUMNS);
    s.masked = s.rows < STRIP || ends[0] - key < s.hi || begins[last] - key > s.lo;
    return s;
}

/* scores [STRIP, TILE] = what a strip's rows [TILE, W] and the keys, turned, give in columns lo..hi. */
INLINE void multiply_strip(const Attention *a, const float *rows, const float *turned, Strip s, float *scores,
                           const int narrow) {
    for (int64_t c = s.lo; c < s.hi; c += COLUMNS)
        strip_product(rows + s.from * a->W, a->W, 0, turned + c, TILE, 0, a->W, scores + c, TILE, STRIP, 0, narrow);
}

/* Scores of keys that a row does not see become minus infinity. */
static void mask_strip(const Attention *a, Strip s, float *scores) {
    for (int64_t r = 0; r < STRIP; r++) {
        const int64_t begin = r < s.rows ? within(a->begins[s.first + r] - s.key, 0, TILE) : 0;
        const int64_t end = r < s.rows ? within(a->ends[s.first + r] - s.key, 0, TILE) : 0;
        for (int64_t c = s.lo; c < s.hi; c++)
            scores[r * TILE + c] = c >= begin && c < end ? scores[r * TILE + c] : -INFINITY;
    }
}

/* Write numbers of two rows of a strip, columns c on, as a factor that is summed over its rows. */
INLINE void store_pair(float *to, int64_t row, int64_t c, Floats one, Floats two, const int narrow) {
#if BF16_UNITS
    if (narrow) {
        store(to + row / 2 * TILE + c, paired(one, two));
        return;
    }
#endif
    (void)narrow;
    store(to + row * TILE + c, one);
    store(to + (row + 1) * TILE + c, two);
}

/* Write numbers of a row, columns c on, as a factor that is summed over its columns. */
INLINE void store_row(float *row, int64_t c, Floats x, const int narrow) {
#if BF16_UNITS
    if (narrow) {
        _mm256_storeu_si256((void *)(row + c / 2), (__m256i)_mm512_cvtneps_pbh(x));
        return;
    }
#endif
    (void)narrow;
    store(row + c, x);
}

#endif
