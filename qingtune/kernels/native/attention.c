/* Causal attention over the segments of a layout, forward and backward, in tiles of rows and keys whose scores never leave
   the caches (FlashAttention-2: Dao 2023, https://arxiv.org/abs/2307.08691). What no row of a strip sees is not computed.

   Numbers are fp32 or bf16 in memory as `kind` says; bf16 needs BF16_UNITS. Scores, their softmax and all sums are fp32,
   shares and gradients of scores in bf16 only as factors of products, so a large part that all scores of a row have in
   common costs no digits. Each sum is made by one thread in one order: results do not depend on how many there are. */

#include <omp.h>

#include "attention_tiles.h"

#define LOG2_E 1.44269504f

/* Whether numbers of 16 bits are multiplied. */
int64_t attention_narrow(void) { return BF16_UNITS; }

/* What a thread needs: forward the first four, backward all. */
typedef struct {
    float *rows, *total;             /* [TILE, W]: queries; [TILE, D]: what they attend, or their gradient */
    float *scores, *shares;          /* [STRIP, TILE]; [TILE, TILE]: shares of a strip or, paired, of a tile */
    float *paired_rows, *grad_rows;  /* queries by rows; gradients of what they attended */
    float *paired_grad, *grad_share; /* those by rows; [STRIP, TILE] */
    float *grad_scores, *by_row;     /* [TILE, TILE] by rows and by columns */
} Room;

static int64_t lay_out_room(const Attention *a, Room *r, float *base) {
    const int64_t rows = TILE * a->W, wide = TILE * a->D, strip = STRIP * TILE, tile = TILE * TILE;
    const int64_t sizes[] = {rows, wide, strip, tile, rows, rows, rows, strip, tile, tile};
    float **places[] = {&r->rows,      &r->total,       &r->scores,     &r->shares,      &r->paired_rows,
                        &r->grad_rows, &r->paired_grad, &r->grad_share, &r->grad_scores, &r->by_row};
    int64_t used = 0;
    for (int i = 0; i < 10; i++) {
        if (base) *places[i] = base + used;
        used += filled(sizes[i], 16) + 16; /* not all at the same place of a page */
    }
    return used;
}

/* How many fp32 numbers of room both directions need: factors of all keys, and what threads use. */
int64_t attention_room(const Attention *given, int64_t threads) {
    const Attention a = complete(given);
    Room room;
    return 3 * a.key_heads * count_tiles(&a, a.count, 0) * TILE * a.W + threads * lay_out_room(&a, &room, 0);
}

/* Where a factor of the keys is: of a head, its tile of all, in `part` of three. */
INLINE float *factor_at(const Attention *a, float *factors, int64_t part, int64_t head, int64_t tile, int64_t tiles) {
    return factors + ((part * a->key_heads + head) * tiles + tile) * TILE * a->W;
}

/* --- Keys --------------------------------------------------------------------------------------------------------- */

INLINE void add_row(float *sum, const char *row, float factor, int64_t size, int kind) {
#pragma omp simd
    for (int64_t i = 0; i < size; i++) sum[i] += factor * get(row, i, kind);
}

INLINE void subtract_from(char *row, const float *mean, int64_t size, int kind) {
#pragma omp simd
    for (int64_t i = 0; i < size; i++) put(row, i, get(row, i, kind) - mean[i], kind);
}

/* The mean key of a segment, [d]. */
static void mean_key(const Attention *a, int64_t head, Segment segment, float *mean) {
    const int64_t count = keys_of(segment);
    memset(mean, 0, (size_t)a->size * 4);
    for (int64_t key = 0; key < count; key++) {
        const char *row = a->k + bytes(token_of(segment, key) * a->key_heads + head, a->size, a->kind);
        BY_KIND(add_row, a->kind, mean, row, 1.0f / (float)count, a->size);
    }
}

static void take_off(const Attention *a, Rows keys, const float *mean, float *copied) {
    for (int64_t r = 0; r < keys.count; r++) BY_KIND(subtract_from, a->kind, (char *)(copied + r * a->W), mean, a->size);
}

/* Factors of a segment's keys for a head, its first tile being number `tile`: keys turned, values by rows, or for the
   backward keys turned, keys by rows, values turned.

   The mean key is taken off. A softmax does not see it, but in fp32 large scores lose digits by it; and gradients of a
   row's scores sum to zero only nearly when they are rounded, so that it would get into those of queries. In bf16
   products of what is rounded already are exact, and only the second matters. */
static void lay_out_keys(const Attention *a, Rows keys, int64_t head, int64_t tile, int64_t tiles, float *factors,
                         float *room, int backward) {
    const int narrow = NARROW(a->kind);
    float *copied = room, *mean = copied + TILE * a->W;
    mean_key(a, head, keys.segment, mean);
    for (; keys.first < keys_of(keys.segment); keys.first += TILE, tile++) {
        float *parts[3];
        for (int i = 0; i < 3; i++) parts[i] = factor_at(a, factors, i, head, tile, tiles);
        keys.count = smallest(TILE, keys_of(keys.segment) - keys.first);
        copy_keys(a, a->v, head, keys, copied);
        if (backward) turn(copied, a->W, parts[2]);
        else by_rows(copied, a->W, parts[1], narrow);
        copy_keys(a, a->k, head, keys, copied);
        if (!narrow) take_off(a, keys, mean, copied);
        turn(copied, a->W, parts[0]);
        if (!backward) continue;
        if (narrow) take_off(a, keys, mean, copied);
        by_rows(copied, a->W, parts[1], narrow);
    }
}

/* Factors of all keys. */
static void lay_out(const Attention *a, float *factors, float *room, int64_t each, int64_t threads, int backward) {
    const int64_t tiles = count_tiles(a, a->count, 0);
    PARALLEL
    for (int64_t i = 0; i < a->key_heads * a->count; i++) {
        const int64_t number = i % a->count;
        const Rows keys = {a->segments[number], number, 0, 0};
        lay_out_keys(a, keys, i / a->count, count_tiles(a, number, 0), tiles, factors, room + omp_get_thread_num() * each,
                     backward);
    }
}

/* --- Forward ------------------------------------------------------------------------------------------------------ */

/* The shares of a strip relative to its largest scores so far, of which sums are kept in lanes; what was attended shrinks
   where one grew. */
INLINE void share_strip(const Attention *a, Strip s, const Room *r, float *most, Floats *sums, const int narrow) {
    const Floats factor = every(a->scale * LOG2_E), least = every(-127.0f);
    const int64_t words = narrow ? TILE / 2 : TILE;
    for (int64_t i = 0; i < s.rows; i++) {
        const float *scores = r->scores + i * TILE;
        Floats largest = every(-INFINITY);
        for (int64_t c = s.lo; c < s.hi; c += LANES) largest = larger(largest, load(scores + c));
        const float highest = largest_of(largest) * a->scale * LOG2_E;
        if (!(highest <= most[i])) {
            const float drop = most[i] - highest;
            const Floats shrink = power_of_two(larger(least, every(drop)));
            float *total = r->total + (s.from + i) * a->D;
            for (int64_t c = 0; c < a->D; c += LANES) store(total + c, times(load(total + c), shrink));
            sums[i] = times(sums[i], shrink);
            most[i] = highest;
        }
        const Floats shift = every(-most[i]);
        for (int64_t c = s.lo; c < s.hi; c += LANES) {
            const Floats share = power_of_two(larger(least, times_plus(load(scores + c), factor, shift)));
            sums[i] = plus(sums[i], share);
            store_row(r->shares + i * words, c, share, narrow);
        }
    }
}

INLINE void forward_strip(const Attention *a, const Room *r, Strip s, const float *keys, const float *values, float *most,
                          Floats *sums, const int narrow) {
    const int64_t each = narrow ? 2 : 1, words = TILE / each;
    multiply_strip(a, r->rows, keys, s, r->scores, narrow);
    if (s.masked) mask_strip(a, s, r->scores);
    share_strip(a, s, r, most, sums, narrow);
    for (int64_t c = 0; c < a->D; c += COLUMNS)
        strip_product(r->shares, words, 0, values + c, a->D, s.lo / each, (s.need + each - 1) / each,
                      r->total + s.from * a->D + c, a->D, s.rows, 1, narrow);
}

static void forward_narrow(const Attention *a, const Room *r, Strip s, const float *keys, const float *values, float *most,
                           Floats *sums) {
    forward_strip(a, r, s, keys, values, most, sums, BF16_UNITS);
}

static void forward_wide(const Attention *a, const Room *r, Strip s, const float *keys, const float *values, float *most,
                         Floats *sums) {
    forward_strip(a, r, s, keys, values, most, sums, 0);
}

INLINE void write_row(char *to, const float *from, float factor, int64_t size, int kind) {
#pragma omp simd
    for (int64_t i = 0; i < size; i++) put(to, i, from[i] * factor, kind);
}

static void forward_tile(const Attention *a, const Room *r, Rows rows, int64_t head, const float *keys,
                         const float *values, char *out, float *lengths) {
    float most[TILE];
    Floats sums[TILE];
    for (int64_t i = 0; i < TILE; i++) most[i] = NOTHING, sums[i] = zeros();
    memset(r->total, 0, (size_t)(TILE * a->D) * 4);
    copy_rows(a, a->q, a->heads, head, rows, r->rows);
    const int64_t last = tiles_of(a->ends[rows.first + rows.count - 1]);
    for (int64_t tile = a->begins[rows.first] / TILE; tile < last; tile++)
        for (int64_t from = 0; from < rows.count; from += STRIP) {
            const Strip s = strip_of(a, rows, from, tile * TILE);
            const int64_t place = tile * TILE * a->W;
            if (s.hi) (NARROW(a->kind) ? forward_narrow : forward_wide)(a, r, s, keys + place, values + place, most + from,
                                                                       sums + from);
        }
    for (int64_t i = 0; i < rows.count; i++) {
        const float sum = sum_of(sums[i]);
        char *to = out + bytes((rows.first + i) * a->heads + head, a->size, a->kind);
        BY_KIND(write_row, a->kind, to, r->total + i * a->D, 1.0f / sum, a->size);
        lengths[head * a->rows + rows.first + i] = most[i] + log2f(sum);
    }
}

/* q [N, H, d], k and v [T, K, d] -> out [N, H, d], and of each row and head the logarithm to base 2 of the sum of the
   exponentials of its scores, fp32 [H, N]; room: fp32, attention_room. */
void attention_forward(const Attention *given, char *out, float *lengths, float *room, int64_t threads) {
    const Attention complete_one = complete(given), *a = &complete_one;
    const int64_t key_tiles = count_tiles(a, a->count, 0), tiles = count_tiles(a, a->count, 1);
    const int64_t each = lay_out_room(a, &(Room){0}, 0), group = a->heads / a->key_heads;
    float *factors = room + threads * each;
    lay_out(a, factors, room, each, threads, 0);
#pragma omp parallel for num_threads((int)threads) schedule(dynamic)
    for (int64_t i = 0; i < a->heads * tiles; i++) {
        Room r;
        lay_out_room(a, &r, room + omp_get_thread_num() * each);
        const int64_t head = i / tiles;
        const Rows rows = find_tile(a, i % tiles, 1);
        const int64_t first = count_tiles(a, rows.number, 0);
        forward_tile(a, &r, rows, head, factor_at(a, factors, 0, head / group, first, key_tiles),
                     factor_at(a, factors, 1, head / group, first, key_tiles), out, lengths);
    }
}

/* --- Backward ----------------------------------------------------------------------------------------------------- */

/* What rows attended, the gradient of that, what attention_forward gave as lengths; gradients of queries, and sums for
   those of keys and values [H, all segments' keys, d]. */
typedef struct {
    const char *out, *grad;
    const float *lengths;
    char *grad_q;
    float *key_sums, *value_sums;
} Gradients;

/* Of a tile of rows: their lengths, and what the gradients of their shares have in common. */
typedef struct {
    float length[TILE], common[TILE];
} Known;

INLINE float dot_row(const char *one, const char *two, int64_t size, int kind) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < size; i++) sum += get(one, i, kind) * get(two, i, kind);
    return sum;
}

/* Lay out what the products of a tile of rows need. */
static void prepare_rows(const Attention *a, const Room *r, Rows rows, int64_t head, Gradients g, Known *known) {
    const int narrow = NARROW(a->kind);
    memset(r->total, 0, (size_t)(TILE * a->D) * 4);
    copy_rows(a, a->q, a->heads, head, rows, r->rows);
    by_rows(r->rows, a->W, r->paired_rows, narrow);
    copy_rows(a, g.grad, a->heads, head, rows, r->grad_rows);
    by_rows(r->grad_rows, a->W, r->paired_grad, narrow);
    memset(known, 0, sizeof *known);
    for (int64_t i = 0; i < rows.count; i++) {
        const int64_t place = bytes((rows.first + i) * a->heads + head, a->size, a->kind);
        known->length[i] = g.lengths[head * a->rows + rows.first + i];
        known->common[i] = a->kind == FP32 ? dot_row(g.out + place, g.grad + place, a->size, FP32)
                                           : dot_row(g.out + place, g.grad + place, a->size, BF16);
    }
}

/* Shares and gradients of scores of a strip with a tile of keys; 0 in columns that it does not see. */
INLINE void backward_strip(const Attention *a, const Room *r, Strip s, const Known *known, const int narrow) {
    const Floats factor = every(a->scale * LOG2_E), least = every(-127.0f);
    const int64_t words = narrow ? TILE / 2 : TILE;
    for (int64_t i = 0; i < STRIP; i += 2) {
        const int64_t row = s.from + i;
        for (int64_t c = 0; c < TILE; c += LANES) {
            Floats share[2] = {zeros(), zeros()}, grad[2] = {zeros(), zeros()};
            for (int64_t j = 0; j < 2 && c >= s.lo && c < s.hi; j++) {
                const Floats scores = load(r->scores + (i + j) * TILE + c), shift = every(-known->length[row + j]);
                share[j] = power_of_two(larger(least, times_plus(scores, factor, shift)));
                grad[j] = minus(load(r->grad_share + (i + j) * TILE + c), every(known->common[row + j]));
                grad[j] = times(share[j], grad[j]);
                store_row(r->by_row + (row + j) * words, c, grad[j], narrow);
            }
            store_pair(r->shares, row, c, share[0], share[1], narrow);
            store_pair(r->grad_scores, row, c, grad[0], grad[1], narrow);
        }
    }
}

/* The rows of a tile that see a strip of keys from `column` on, as words from..to; earlier strips have fewer before. */
INLINE void rows_of_keys(const Attention *a, Rows rows, int64_t column, int64_t *from, int64_t *to) {
    const int64_t *begins = a->begins + rows.first, *ends = a->ends + rows.first;
    while (*from < rows.count && ends[*from] <= column) ++*from;
    while (*to < rows.count && begins[*to] < column + STRIP) ++*to;
}

/* Add the gradients that a tile of rows gives a tile of keys, whose sums begin at row `key` of the segment's. */
INLINE void keys_backward(const Attention *a, const Room *r, Rows rows, int64_t key, float *key_sums, float *value_sums,
                          const int narrow) {
    const int64_t each = narrow ? 2 : 1, count = smallest(TILE, keys_of(rows.segment) - key), d = a->D;
    int64_t first = 0, last = 0;
    for (int64_t k = 0; k < count; k += STRIP) {
        rows_of_keys(a, rows, key + k, &first, &last);
        const int64_t from = first / each, to = (last + each - 1) / each, left = smallest(STRIP, count - k);
        if (from >= to) continue;
        for (int64_t c = 0; c < d; c += COLUMNS) {
            const int64_t place = (key + k) * d + c;
            strip_product(r->shares + k, TILE, 1, r->paired_grad + c, d, from, to, value_sums + place, d, left, 1, narrow);
            strip_product(r->grad_scores + k, TILE, 1, r->paired_rows + c, d, from, to, key_sums + place, d, left, 1,
                          narrow);
        }
    }
}

/* A tile of rows with a tile of keys, whose factors are turned keys, keys by rows and turned values. */
INLINE void backward_tiles(const Attention *a, const Room *r, Rows rows, int64_t key, const float *const factors[3],
                           const Known *known, float *key_sums, float *value_sums, const int narrow) {
    const int64_t each = narrow ? 2 : 1, words = TILE / each;
    for (int64_t from = 0; from < rows.count; from += STRIP) {
        const Strip s = strip_of(a, rows, from, key);
        if (!s.hi) continue;
        multiply_strip(a, r->rows, factors[0], s, r->scores, narrow);
        if (s.masked) mask_strip(a, s, r->scores);
        multiply_strip(a, r->grad_rows, factors[2], s, r->grad_share, narrow);
        backward_strip(a, r, s, known, narrow);
        for (int64_t c = 0; c < a->D; c += COLUMNS)
            strip_product(r->by_row + from * words, words, 0, factors[1] + c, a->D, s.lo / each, (s.need + each - 1) / each,
                          r->total + from * a->D + c, a->D, s.rows, 1, narrow);
    }
    keys_backward(a, r, rows, key, key_sums, value_sums, narrow);
}

static void backward_narrow(const Attention *a, const Room *r, Rows rows, int64_t key, const float *const factors[3],
                            const Known *known, float *key_sums, float *value_sums) {
    backward_tiles(a, r, rows, key, factors, known, key_sums, value_sums, BF16_UNITS);
}

static void backward_wide(const Attention *a, const Room *r, Rows rows, int64_t key, const float *const factors[3],
                          const Known *known, float *key_sums, float *value_sums) {
    backward_tiles(a, r, rows, key, factors, known, key_sums, value_sums, 0);
}

/* All rows of a segment, one head; factors as `lay_out` leaves them. */
static void backward_segment(const Attention *a, const Room *r, int64_t number, int64_t head, float *factors, Gradients g) {
    const Segment segment = a->segments[number];
    const int64_t tiles = count_tiles(a, a->count, 0), first = count_tiles(a, number, 0), size = keys_of(segment) * a->D;
    const int64_t sums = (head * all_keys(a, a->count) + all_keys(a, number)) * a->D;
    float *key_sums = g.key_sums + sums, *value_sums = g.value_sums + sums;
    memset(key_sums, 0, (size_t)size * 4), memset(value_sums, 0, (size_t)size * 4);
    for (int64_t row = segment.first; row < segment.last; row += TILE) {
        const Rows rows = {segment, number, row, smallest(TILE, segment.last - row)};
        Known known;
        prepare_rows(a, r, rows, head, g, &known);
        const int64_t last = tiles_of(a->ends[row + rows.count - 1]), key_head = head / (a->heads / a->key_heads);
        for (int64_t tile = a->begins[row] / TILE; tile < last; tile++) {
            const float *parts[3];
            for (int i = 0; i < 3; i++) parts[i] = factor_at(a, factors, i, key_head, first + tile, tiles);
            (NARROW(a->kind) ? backward_narrow : backward_wide)(a, r, rows, tile * TILE, parts, &known, key_sums, value_sums);
        }
        for (int64_t i = 0; i < rows.count; i++) {
            char *to = g.grad_q + bytes((row + i) * a->heads + head, a->size, a->kind);
            BY_KIND(write_row, a->kind, to, r->total + i * a->D, a->scale, a->size);
        }
    }
}

/* Gradients of the keys or values of a segment's own tokens, of a head: what its query heads have in their sums, those of
   all segments that see the token. */
static void add_up(const Attention *a, const float *sums, int64_t number, int64_t key_head, float factor, float *total,
                   char *to) {
    const int64_t group = a->heads / a->key_heads, d = a->D, all = all_keys(a, a->count);
    const Segment own = a->segments[number];
    for (int64_t token = own.start; token < own.end; token++) {
        memset(total, 0, (size_t)d * 4);
        for (int64_t s = number; s < (number ? number + 1 : a->count); s++) { /* the first may be what all share */
            if (s > number && token >= a->segments[s].shared) continue;
            const int64_t key = all_keys(a, s) + (s > number ? token : token - own.start + own.shared);
            for (int64_t head = key_head * group; head < (key_head + 1) * group; head++)
                for (int64_t i = 0; i < d; i++) total[i] += sums[(head * all + key) * d + i];
        }
        char *row = to + bytes(token * a->key_heads + key_head, a->size, a->kind);
        BY_KIND(write_row, a->kind, row, total, factor, a->size);
    }
}

/* What attention_forward took and gave, and the gradient of out -> those of q [N, H, d], k and v [T, K, d].
   sums: fp32 [2, H, all segments' keys, D]. */
void attention_backward(const Attention *given, const char *out, const float *lengths, const char *grad, char *grad_q,
                        char *grad_k, char *grad_v, float *sums, float *room, int64_t threads) {
    const Attention complete_one = complete(given), *a = &complete_one;
    const int64_t each = lay_out_room(a, &(Room){0}, 0);
    float *factors = room + threads * each, *value_sums = sums + a->heads * all_keys(a, a->count) * a->D;
    const Gradients g = {out, grad, lengths, grad_q, sums, value_sums};
    lay_out(a, factors, room, each, threads, 1);
#pragma omp parallel for num_threads((int)threads) schedule(dynamic)
    for (int64_t i = 0; i < a->heads * a->count; i++) {
        Room r;
        lay_out_room(a, &r, room + omp_get_thread_num() * each);
        backward_segment(a, &r, i % a->count, i / a->count, factors, g);
    }
    PARALLEL
    for (int64_t i = 0; i < a->key_heads * a->count; i++) {
        float *total = room + omp_get_thread_num() * each;
        add_up(a, g.key_sums, i % a->count, i / a->count, a->scale, total, grad_k);
        add_up(a, g.value_sums, i % a->count, i / a->count, 1.0f, total, grad_v);
    }
}
