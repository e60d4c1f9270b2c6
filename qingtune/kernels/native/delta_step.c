/* One new token of each of several sequences through a gated delta net, on a CPU; a head belongs to one thread, so that
   results do not depend on the number of threads. */

#include "delta_token.h"

/* Writes out, and changes rows and states. */
void delta_step(const DeltaStep *step, int64_t kind, int64_t threads) {
    const int64_t heads = step->key_heads * step->share;
    PARALLEL
    for (int64_t item = 0; item < step->sequences * heads; item++)
        BY_KIND(one_head, kind, step, item / heads, item % heads);
    PARALLEL
    for (int64_t sequence = 0; sequence < step->sequences; sequence++) BY_KIND(keep_newest, kind, step, sequence);
}
