/* The parts of layers, as they are called inside a parallel region; every part ends with a barrier. */
#include "kernels.h"

typedef struct {
    const uint16_t *norm;
    const matrix *wqkv, *wo;
    long dim, n_heads, n_kv_heads, head_dim, window, block_tokens; /* window 0: all keys are seen */
    float eps;
} attention;

typedef struct {
    const uint16_t *norm;
    const matrix *gate; /* NULL in a dense layer */
    const matrix *w13, *w2; /* of every expert: w1 lies above w3 */
    int64_t *counts; /* tokens that each expert was chosen for, to be added to; or NULL */
    long dim, hidden_dim, num_experts, num_chosen;
    float eps;
} feed_forward;

/* One row of the step. */
typedef struct {
    int64_t first, num_tokens, position, block_ids; /* the latter: where its own begin */
} span;

typedef struct {
    const float *rotations; /* [positions][head_dim]: cosine and sine of every pair */
    const int64_t *positions, *slots; /* [T] */
    const span *spans;
    const int64_t *block_ids;
    long num_tokens, num_spans;
} batch;

typedef struct {
    uint16_t *keys, *values; /* cache.h says how they lie */
} cache;

/* What the threads have taken of the two products of a part; all 0 before. */
typedef struct {
    long in, out;
} progress;

/* Bytes of scratch space that a step of so many tokens takes. */
long attention_bytes(const attention *l, long num_tokens, int num_threads);
long feed_forward_bytes(const feed_forward *l, long num_tokens, int num_threads);

/* out[T][dim] = x + the part's output; out may be x. dim and hidden_dim are multiples of 32, head_dim is
 * one of 16 and at most 1024, num_chosen at most 16. The step's keys and values are in the cache
 * afterwards. */
void attend(const attention *l, const batch *b, const cache *c, const uint16_t *x, uint16_t *out, char *scratch,
            progress *taken, int num_threads);
void feed(const feed_forward *l, const uint16_t *x, uint16_t *out, long num_tokens, char *scratch, progress *taken,
          int num_threads);
