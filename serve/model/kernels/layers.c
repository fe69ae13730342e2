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
        const attention *l = parts[p].attention;
        const long bytes = l ? attention_bytes(l, b->num_tokens, num_threads)
                             : feed_forward_bytes(parts[p].feed_forward, b->num_tokens, num_threads);
        if (bytes > most) most = bytes;
    }
    const long progress_bytes = num_parts * (long)sizeof(progress);
    if (!scratch || !b->num_tokens) return most + progress_bytes;
    progress *taken = (progress *)(scratch + most);
    memset(taken, 0, progress_bytes);
#pragma omp parallel num_threads(num_threads) if (num_threads > 1)
    for (long p = 0; p < num_parts; p++) {
        const attention *l = parts[p].attention;
        const uint16_t *from = p ? out : x;
        if (l) attend(l, b, &parts[p].cache, from, out, scratch, taken + p, num_threads);
        else feed(parts[p].feed_forward, from, out, b->num_tokens, scratch, taken + p, num_threads);
    }
    return most + progress_bytes;
}
