/* Attention of one new token to what a slot of the cache holds. */

#ifndef ATTENTION_H
#define ATTENTION_H

#include "model.h"

/* RMSNorm (Zhang & Sennrich 2019) of n numbers, a multiple of 16; in place is fine. */
static void normalise(const float *x, const float *weight, float epsilon, int64_t n, float *out) {
    Floats squares = zeros();
    for (int64_t i = 0; i < n; i += LANES) squares = times_plus(load(x + i), load(x + i), squares);
    const Floats rate = every(1.0f / sqrtf(sum_of(squares) / (float)n + epsilon));
    for (int64_t i = 0; i < n; i += LANES) store(out + i, times(times(load(x + i), rate), load(weight + i)));
}

/* A head's norm, where there is one, and its rotary position (Su et al. 2021), the halves of what is turned as
   coordinates. */
static void place_head(const Model *model, const float *head, const float *norm, const Turns *turns, int64_t slot,
                       float *out) {
    const int64_t half = turns->half, rest = model->size - 2 * half;
    const float *cos = turns->cos + slot * half, *sin = turns->sin + slot * half;
    float normed[model->size];
    if (norm) normalise(head, norm, model->epsilon, model->size, normed);
    else memcpy(normed, head, sizeof(normed));
    for (int64_t i = 0; i < half; i++) {
        out[i] = normed[i] * cos[i] - normed[i + half] * sin[i];
        out[i + half] = normed[i + half] * cos[i] + normed[i] * sin[i];
    }
    memcpy(out + 2 * half, normed + 2 * half, (size_t)rest * sizeof(float));
}

/* 1 / (1 + e^-x); of NaN a number, so that what it multiplies has to be NaN, too. */
SIMD Floats sigmoid_of(Floats x) {
    return over(every(1.0f), plus(exponential_of(smaller(minus(zeros(), x), every(87.0f))), every(1.0f)));
}

/* Kept numbers, from the i-th on. */
SIMD Floats kept(const void *numbers, int64_t i, const int wide) {
    return wide ? load((const float *)numbers + i) : from_bf16((const uint16_t *)numbers + i);
}

/* Keep numbers from the i-th on; where that rounds them, they become what is kept. */
static void keep(void *numbers, int64_t i, float *x, int64_t size, int wide, int writes) {
    if (wide) {
        if (writes) memcpy((float *)numbers + i, x, (size_t)size * sizeof(float));
        return;
    }
    for (int64_t j = 0; j < size; j += LANES) {
        uint16_t narrow[LANES];
        to_bf16(narrow, load(x + j));
        store(x + j, from_bf16(narrow));
        if (writes) memcpy((uint16_t *)numbers + i + j, narrow, sizeof(narrow));
    }
}

SIMD float dot_with_key(const float *q, const void *keys, int64_t at, int64_t size, const int wide) {
    Floats sum = zeros();
    for (int64_t i = 0; i < size; i += LANES) sum = times_plus(kept(keys, at + i, wide), load(q + i), sum);
    return sum_of(sum);
}

/* Scores of n keys as shares; gives one over their sum. Up to 15 places behind them are written to. */
static float exponentials(float *scores, int64_t n) {
    Floats most = every(-INFINITY), sum = zeros();
    for (int64_t i = n; i % LANES; i++) scores[i] = -INFINITY; /* as shares 2e-38, which no sum feels */
    for (int64_t i = 0; i < n; i += LANES) most = larger(most, load(scores + i));
    most = every(largest_of(most));
    for (int64_t i = 0; i < n; i += LANES) {
        const Floats shares = exponential_of(minus(load(scores + i), most));
        store(scores + i, shares);
        sum = plus(sum, shares);
    }
    return 1.0f / sum_of(sum);
}

/* c tanh(score / c) of n scores, by tanh(z) = 2 s(2 z) - 1; what is not finite becomes NaN. Up to 15 places behind them are
   written to. */
static void cap_scores(float *scores, int64_t n, float cap) {
    for (int64_t i = 0; i < n; i += LANES) {
        const Floats score = load(scores + i), part = sigmoid_of(times(score, every(2.0f / cap)));
        store(scores + i, times_plus(every(2.0f * cap), part, minus(times(score, zeros()), every(cap))));
    }
}

/* Shares of n kept values, from the at-th number on, and of a new one: out [d]. */
SIMD void weigh(const float *scores, int64_t n, float rate, const void *values, int64_t at, const float *newest,
                int64_t size, float *out, const int wide) {
    for (int64_t part = 0; part < size; part += 64) {
        const int64_t width = size - part < 64 ? size - part : 64;
        Floats sum[64 / LANES];
        for (int64_t j = 0; j < width / LANES; j++) sum[j] = times(every(scores[n]), load(newest + part + LANES * j));
        for (int64_t i = 0; i < n; i++) {
            const Floats share = every(scores[i]);
            for (int64_t j = 0; j < width / LANES; j++)
                sum[j] = times_plus(share, kept(values, at + i * size + part + LANES * j, wide), sum[j]);
        }
        for (int64_t j = 0; j < width / LANES; j++) store(out + part + LANES * j, times(sum[j], every(rate)));
    }
}

/* One head of one sequence attends to what its slot holds, as far as the window reaches, and to the new token, whose key
   and value the first head of a group puts into the cache. heads: the sequence's queries, keys and values; out: [d]. */
SIMD void attend_in(const Model *model, const Layer *layer, const Cache *cache, int64_t slot, int64_t h,
                    const float *heads, float *scores, float *out, const int wide) {
    const Attention *attention = layer->attention;
    const int64_t size = model->size, shared = model->queries / model->keys, g = h / shared;
    const int64_t each = model->gated ? 2 * size : size, held = cache->places[slot];
    const int64_t first = held >= attention->window ? held + 1 - attention->window : 0, n = held - first;
    const int64_t start = ((layer->number * cache->slots + slot) * model->keys + g) * cache->capacity * size;
    const int64_t at = start + first * size, newest = start + held * size;
    const float *query = heads + h * each, *keys = heads + model->queries * each;
    const Turns *turns = cache->turns + attention->rotary;
    const float scale = model->scale * (cache->factors ? cache->factors[slot] : 1.0f);
    const int writes = h == g * shared; /* no other thread reads this place in this step */
    float q[size], key[size], value[size];
    place_head(model, query, attention->q_norm, turns, slot, q);
    place_head(model, keys + g * size, attention->k_norm, turns, slot, key);
    memcpy(value, keys + (model->keys + g) * size, sizeof(value));
    keep(cache->keys, newest, key, size, wide, writes);
    keep(cache->values, newest, value, size, wide, writes);
    for (int64_t i = 0; i < n; i++) scores[i] = scale * dot_with_key(q, cache->keys, at + i * size, size, wide);
    scores[n] = scale * dot_with_key(q, key, 0, size, 1);
    if (model->cap > 0) cap_scores(scores, n + 1, model->cap);
    weigh(scores, n, exponentials(scores, n + 1), cache->values, at, value, size, out, wide);
    for (int64_t i = 0; i < size && model->gated; i += LANES)
        store(out + i, times(load(out + i), sigmoid_of(load(query + size + i))));
}

static void attend(const Model *model, const Layer *layer, const Cache *cache, int64_t slot, int64_t h,
                   const float *heads, float *scores, float *out) {
    if (cache->wide) attend_in(model, layer, cache, slot, h, heads, scores, out, 1);
    else attend_in(model, layer, cache, slot, h, heads, scores, out, 0);
}

#endif
