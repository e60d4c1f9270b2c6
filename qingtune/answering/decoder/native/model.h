/* A decoder as answer_step.py describes it, and what it keeps of the sequences that it reads.

   Shapes: T sequences with a new token each, D hidden size, I size of an MLP, H query heads, G key-value heads, d head
   size, V vocabulary; of delta nets M channels, w tokens that the convolution sees, R value heads, k and e the sizes of
   keys and values. */

#ifndef MODEL_H
#define MODEL_H

#include "matrices.h"

enum { SILU, GELU_TANH };

typedef struct {
    Matrix qkv, o;                  /* qkv gives all queries, of a gated model each head's gate behind them, keys, values */
    const float *q_norm, *k_norm;   /* [d], or NULL */
    int64_t window;                 /* tokens that a row sees at most, itself among them */
    int64_t rotary;                 /* the number of its table */
} Attention;

typedef struct {
    Matrix qkv_z, b_a, out;
    const float *taps, *rate, *bias, *weight; /* as in delta_token.h */
} DeltaNet;

typedef struct {
    Matrix gate_up, down; /* [2 I, D], [D, I] */
    int64_t activation;
} MLP;

typedef struct {
    Matrix router;                     /* [E, D], filled up */
    const MLP *experts;                /* [E] */
    const MLP *shared;                 /* all rows go through it; NULL where there is none */
    Matrix shared_gate;                /* its first row gives the logit of the share */
    int64_t count, chosen, normalised; /* E; of each row; whether the chosen ones' shares are divided by their sum */
} Mixture;

typedef struct {
    const float *input_norm, *mlp_norm;                /* [D] */
    const float *mixer_output_norm, *mlp_output_norm;  /* [D], or NULL */
    const Attention *attention;                        /* this one or the next */
    const DeltaNet *net;
    const MLP *mlp;                                    /* likewise */
    const Mixture *mixture;
    int64_t number;                                    /* among the layers with such a mixer */
} Layer;

typedef struct {
    const Layer *layers;
    Matrix head;
    const float *norm; /* [D] */
    int64_t count, hidden, queries, keys, size, gated;
    int64_t key_heads, value_heads, key_size, value_size, seen; /* of delta nets: k, e and w last */
    float scale, epsilon, length_epsilon; /* of scores, of norms, of a delta net's queries and keys */
    float cap;                            /* c of c tanh(score / c), 0 for scores as they are */
} Model;

/* Rotary positions of new tokens: cos and sin, [T, half]; of a head's numbers the first 2 half are turned. */
typedef struct {
    const float *cos, *sin;
    int64_t half;
} Turns;

typedef struct {
    void *keys, *values;    /* bf16 or fp32 [layers, slots, G, capacity, d] */
    int64_t wide;           /* whether they are fp32 */
    int64_t slots, capacity;
    const int64_t *places;  /* [T]: tokens that each of the first slots holds */
    float *rows, *states;   /* of delta nets, [layers, slots, w - 1, M] and [layers, slots, R, k, e] */
    const Turns *turns;     /* of each table */
    const float *factors;   /* [T], of queries; NULL for 1 */
} Cache;

#endif
