/* Parts of layers one after the other: all that a stage computes of a step in one parallel region. */
#include "layers.h"

/* One of the two is NULL. */
typedef struct {
    const attention *attention;
    const feed_forward *feed_forward;
    cache cache; /* of an attention part */
} part;

/* out[T][dim] = x after all parts. Returns the bytes of scratch space that they take, and does nothing else
 * where there is none. */
long magnetar_layers(const part *parts, long num_parts, const batch *b, const uint16_t *x, uint16_t *out,
                     char *scratch, int num_threads) {
    long most = 0;
    for (long p = 0; p < num_parts; p++) {
        const long bytes = parts[p].attention ? attention_bytes(parts[p].attention, b->num_tokens, num_threads)
                                              : feed_forward_bytes(parts[p].feed_forward, b->num_tokens);
        if (bytes > most) most = bytes;
    }
    if (!scratch || !b->num_tokens) return most;
#pragma omp parallel num_threads(num_threads) if (num_threads > 1)
    for (long p = 0; p < num_parts; p++) {
        const uint16_t *from = p ? out : x;
        if (parts[p].attention) attend(parts[p].attention, b, &parts[p].cache, from, out, scratch, num_threads);
        else feed(parts[p].feed_forward, from, out, b->num_tokens, scratch, num_threads);
    }
    return most;
}
