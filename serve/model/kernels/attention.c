/* A whole attention part of a layer over the paged cache, added to its input.
 *
 * normalise -> wqkv -> turn and store -> attend -> wo -> add
 *
 * A query meets its keys in stretches of 64 that begin at multiples of 64 positions, always in this
 * order: maximum and sums of what it has seen are carried along, and a stretch in which it sees
 * nothing changes no bit of them. So the result does not depend on the other queries of the step, nor
 * on the step in which a key was computed, nor on where its block lies.
 */
#include "cache.h"

#define QUERY_ROWS 168 /* queries times heads that take a stretch of keys together, or one query */
#define NOTHING (-1e30f)

/* What one thread needs to attend. */
typedef struct {
    uint32_t *queries; /* in tiles */
    stretch stretches[2]; /* that which queries meet, and the next one */
    float *scores, *sums; /* [rows][KEYS], [rows][padded head_dim] */
    float *largest, *totals, *scales; /* [rows] */
    uint32_t *chances; /* tiles of the exponentials, in bf16 */
} room;

static long most_rows(const attention *l) {
    const long group = l->n_heads / l->n_kv_heads;
    return group > QUERY_ROWS ? group : QUERY_ROWS / group * group;
}

/* The head dimension in pairs of registers; what is beyond it is not looked at. */
INLINE long padded(const attention *l) { return (l->head_dim + OUTPUTS - 1) / OUTPUTS * OUTPUTS; }

static long lay_out_room(const attention *l, char *scratch, room *r) {
    const long rows = most_rows(l), head_dim = padded(l);
    long taken = 0;
    r->queries = take(scratch, &taken, 2 * rows * head_dim);
    for (int i = 0; i < 2; i++) r->stretches[i].cut = take(scratch, &taken, 4 * LEAVES * leaf_words(l));
    r->scores = take(scratch, &taken, 4 * rows * KEYS);
    r->sums = take(scratch, &taken, 4 * rows * head_dim);
    r->largest = take(scratch, &taken, 4 * rows);
    r->totals = take(scratch, &taken, 4 * rows);
    r->scales = take(scratch, &taken, 4 * rows);
    r->chances = take(scratch, &taken, 2 * rows * KEYS);
    return taken;
}

/* Neighbouring numbers of every head turn as pairs, in fp32. */
static void turn(uint16_t *heads, const float *rotations, long num_heads, long head_dim) {
    const __m512i swapped = _mm512_set_epi32(14, 15, 12, 13, 10, 11, 8, 9, 6, 7, 4, 5, 2, 3, 0, 1);
    for (long j = 0; j < head_dim; j += 16) {
        __m512 turns = _mm512_loadu_ps(rotations + j);
        __m512 cosines = _mm512_moveldup_ps(turns), sines = _mm512_movehdup_ps(turns);
        for (long h = 0; h < num_heads; h++) {
            __m512 x = widen(heads + h * head_dim + j);
            __m512 crossed = _mm512_mul_ps(_mm512_permutexvar_ps(swapped, x), sines);
            narrow16(heads + h * head_dim + j, _mm512_fmaddsub_ps(x, cosines, crossed));
        }
    }
}

static void turn_and_store(const attention *l, const batch *b, const cache *c, long token, uint16_t *qkv) {
    const long width = l->n_kv_heads * l->head_dim, queries = l->n_heads * l->head_dim;
    turn(qkv, b->rotations + b->positions[token] * l->head_dim, l->n_heads + l->n_kv_heads, l->head_dim);
    store(l, c, b->slots[token], qkv + queries, qkv + queries + width);
}

/* low and high += leaves from a and b on times m rows. Those that are next are on their way meanwhile: a leaf
 * is too short for the processor to see by itself where reading goes on, and took 1.5 times as long. */
INLINE void dot_ahead(const uint32_t *a, const uint32_t *b, const uint32_t *next_a, const uint32_t *next_b,
                      const uint32_t *x, long pairs, __m512 *low, __m512 *high, const int m) {
    for (long j = 0; j < pairs; j++) {
        _mm_prefetch((const char *)(next_a + j * LEAF), _MM_HINT_T1);
        _mm_prefetch((const char *)(next_b + j * LEAF), _MM_HINT_T1);
        dot_pair(a + j * LEAF, b + j * LEAF, x + j * m, low, high, m);
    }
}

INLINE void score(const stretch *met, const stretch *next, const uint32_t *queries, long pairs, float *scores,
                  const int m) {
    for (long k = 0; k < LEAVES; k += 2) {
        __m512 low[MOST_ROWS], high[MOST_ROWS];
        for (int i = 0; i < m; i++) low[i] = high[i] = _mm512_setzero_ps();
        dot_ahead(met->keys[k], met->keys[k + 1], next->keys[k], next->keys[k + 1], queries, pairs, low, high, m);
        for (int i = 0; i < m; i++) {
            _mm512_storeu_ps(scores + i * KEYS + k * LEAF, low[i]);
            _mm512_storeu_ps(scores + i * KEYS + k * LEAF + LEAF, high[i]);
        }
    }
}

/* sums = sums * scales + chances * values */
INLINE void weigh(const stretch *met, const stretch *next, const uint32_t *chances, const float *scales,
                  long head_dim, long width, float *sums, const int m) {
    for (long o = 0; o < width; o += OUTPUTS) {
        const long at = o * LEAF / 2, beside = o + LEAF < head_dim ? LEAF * LEAF / 2 : 0;
        __m512 low[MOST_ROWS], high[MOST_ROWS];
        for (int i = 0; i < m; i++) {
            low[i] = _mm512_mul_ps(_mm512_loadu_ps(sums + i * width + o), _mm512_set1_ps(scales[i]));
            high[i] = _mm512_mul_ps(_mm512_loadu_ps(sums + i * width + o + 16), _mm512_set1_ps(scales[i]));
        }
        for (long k = 0; k < LEAVES; k++) {
            const uint32_t *a = met->values[k] + at, *next_a = next->values[k] + at;
            const uint32_t *x = chances + k * m * LEAF / 2;
            dot_ahead(a, a + beside, next_a, next_a + beside, x, LEAF / 2, low, high, m);
        }
        for (int i = 0; i < m; i++) {
            _mm512_storeu_ps(sums + i * width + o, low[i]);
            _mm512_storeu_ps(sums + i * width + o + 16, high[i]);
        }
    }
}

/* From the scores of one query and head to weights against all that it has seen so far. */
static void weights(const float *scores, uint64_t seen, float factor, float *largest, float *total, float *scale,
                    uint16_t *chances) {
    __m512 s[KEYS / 16], most = _mm512_set1_ps(*largest);
    for (int i = 0; i < KEYS / 16; i++) {
        s[i] = _mm512_mul_ps(_mm512_loadu_ps(scores + 16 * i), _mm512_set1_ps(factor));
        most = _mm512_mask_max_ps(most, (__mmask16)(seen >> 16 * i), most, s[i]);
    }
    const float now = _mm512_reduce_max_ps(most);
    __m512 sum = _mm512_setzero_ps();
    for (int i = 0; i < KEYS / 16; i++) {
        __m512 power = exponential(_mm512_sub_ps(s[i], _mm512_set1_ps(now)));
        power = _mm512_maskz_mov_ps((__mmask16)(seen >> 16 * i), power);
        sum = _mm512_add_ps(sum, power);
        narrow16(chances + 16 * i, power);
    }
    *scale = _mm512_cvtss_f32(exponential(_mm512_set1_ps(*largest - now)));
    *total = *total * *scale + _mm512_reduce_add_ps(sum);
    *largest = now;
}

/* Which of the 64 keys from `first` on a query sees. */
INLINE uint64_t seen_by(long position, long window, long first) {
    const long last = position - first, hidden = window ? position - window + 1 - first : 0;
    uint64_t seen = last >= KEYS - 1 ? ~0ull : last < 0 ? 0 : (2ull << last) - 1;
    if (hidden >= KEYS) return 0;
    return hidden > 0 ? seen >> hidden << hidden : seen;
}

static void score_tile(const stretch *met, const stretch *next, const tile *t, long pairs, float *scores) {
#define SCORE(m) score(met, next, t->inputs, pairs, scores, m)
    WITH_ROWS(t->rows, SCORE)
#undef SCORE
}

static void weigh_tile(const stretch *met, const stretch *next, const tile *t, const float *scales, long head_dim,
                       long width, float *sums) {
#define WEIGH(m) weigh(met, next, t->inputs, scales, head_dim, width, sums, m)
    WITH_ROWS(t->rows, WEIGH)
#undef WEIGH
}

/* The queries first .. first + num of a span, those heads that share one of the KV heads. */
static void attend_some(const attention *l, const batch *b, const cache *c, const span *s, long first, long num,
                        long head, const uint16_t *qkv, uint16_t *out, room *r) {
    const long head_dim = l->head_dim, group = l->n_heads / l->n_kv_heads, rows = num * group;
    const matrix queries_as_inputs = {.k = head_dim}, chances_as_inputs = {.k = KEYS};
    const long tiles = num_tiles(&queries_as_inputs, rows);
    const long width = (l->n_heads + 2 * l->n_kv_heads) * head_dim;
    const float factor = 1.0f / __builtin_sqrtf(head_dim);
    tile queries[tiles];
    for (long t = 0; t < tiles; t++) {
        const uint16_t *each[MOST_ROWS];
        cut(rows, tiles, t, queries + t);
        for (int i = 0; i < queries[t].rows; i++) {
            const long row = queries[t].first + i;
            each[i] = qkv + (s->first + first + row / group) * width + (head * group + row % group) * head_dim;
        }
        fill(queries + t, &queries_as_inputs, each, (float *)r->queries + queries[t].first * (head_dim / 2));
    }
    for (long i = 0; i < rows; i++) {
        r->largest[i] = NOTHING;
        r->totals[i] = 0;
    }
    memset(r->sums, 0, 4 * rows * padded(l));
    const long position = s->position + first, end = s->position + s->num_tokens;
    const long begin = l->window && s->position >= l->window ? s->position - l->window + 1 : 0;
    long key = l->window && position >= l->window ? (position - l->window + 1) / KEYS * KEYS : 0;
    stretch *met = r->stretches, *next = r->stretches + 1;
    find(l, b, c, s, head, key, begin, end, met);
    for (; key < position + num; key += KEYS) {
        find(l, b, c, s, head, key + KEYS, begin, end, next);
        for (long t = 0; t < tiles; t++) {
            uint16_t chances[MOST_ROWS][KEYS];
            const uint16_t *each[MOST_ROWS];
            score_tile(met, next, queries + t, head_dim / 2, r->scores + queries[t].first * KEYS);
            for (int i = 0; i < queries[t].rows; i++) {
                const long row = queries[t].first + i;
                weights(r->scores + row * KEYS, seen_by(position + row / group, l->window, key), factor,
                        r->largest + row, r->totals + row, r->scales + row, chances[i]);
                each[i] = chances[i];
            }
            tile weighed = queries[t];
            fill(&weighed, &chances_as_inputs, each, (float *)r->chances);
            weigh_tile(met, next, &weighed, r->scales + weighed.first, head_dim, padded(l),
                       r->sums + weighed.first * padded(l));
        }
        stretch *const done = met;
        met = next;
        next = done;
    }
    for (long row = 0; row < rows; row++) {
        uint16_t *to = out + ((s->first + first + row / group) * l->n_heads + head * group + row % group) * head_dim;
        for (long d = 0; d < head_dim; d += 16)
            narrow16(to + d, _mm512_div_ps(_mm512_loadu_ps(r->sums + row * padded(l) + d),
                                           _mm512_set1_ps(r->totals[row])));
    }
}

/* y = w times x for all rows, or y = added + that, which may be y. */
static void multiply(const matrix *w, const uint16_t *x, long m, const preparer *me, tile *tiles, float *floats,
                     const uint16_t *added, uint16_t *y, long *taken) {
    const long count = num_tiles(w, m), blocks = num_blocks(w);
    EACH_OWN(t, me, count) {
        const uint16_t *rows[MOST_ROWS];
        cut(m, count, t, tiles + t);
        for (int i = 0; i < tiles[t].rows; i++) rows[i] = x + (tiles[t].first + i) * w->k;
        fill(tiles + t, w, rows, floats + tiles[t].first * row_floats(w));
    }
    meet(me);
    for (long b, end; take_run(taken, blocks, me->num_threads, &b, &end);)
        for (; b < end; b++)
            for (long t = 0; t < count; t++) {
                const long at = tiles[t].first * w->n + b * OUTPUTS;
                if (!added) {
                    multiply_tile(w, b, tiles + t, y + at, w->n);
                    continue;
                }
                uint16_t products[MOST_ROWS][OUTPUTS];
                multiply_tile(w, b, tiles + t, products[0], OUTPUTS);
                for (int i = 0; i < tiles[t].rows; i++)
                    for (long o = 0; o < OUTPUTS; o += 16) {
                        __m512 sum = _mm512_add_ps(widen(added + at + i * w->n + o), widen(products[i] + o));
                        narrow16(y + at + i * w->n + o, sum);
                    }
            }
#pragma omp barrier
}

typedef struct {
    uint16_t *qkv, *attended; /* of tokens: for all threads */
    long *item_spans; /* items of work: some queries of a span and one KV head each */
    char *rooms;
    uint16_t *normed; /* of tokens; this and what follows is prepared */
    tile *tiles;
    float *floats;
} work;

static long lay_out_prepared(const attention *l, long num_tokens, char *scratch, work *w) {
    const long floats = row_floats(l->wqkv) > row_floats(l->wo) ? row_floats(l->wqkv) : row_floats(l->wo);
    long taken = 0;
    w->normed = take(scratch, &taken, 2 * num_tokens * l->dim);
    w->tiles = take(scratch, &taken, num_tokens * sizeof(tile));
    w->floats = take(scratch, &taken, num_tokens * floats * sizeof(float));
    return taken;
}

/* `own`: the room in use of those for what is prepared. */
static long lay_out_work(const attention *l, long num_tokens, int num_threads, long own, char *scratch, work *w) {
    room none;
    long taken = 0;
    w->qkv = take(scratch, &taken, 2 * num_tokens * l->wqkv->n);
    w->attended = take(scratch, &taken, 2 * num_tokens * l->n_heads * l->head_dim);
    w->item_spans = take(scratch, &taken, 2 * num_tokens * l->n_kv_heads * sizeof(long));
    w->rooms = take(scratch, &taken, num_threads * lay_out_room(l, NULL, &none));
    const long each = lay_out_prepared(l, num_tokens, NULL, w);
    lay_out_prepared(l, num_tokens, (char *)((uintptr_t)scratch + taken + own * each), w);
    return taken + num_rooms(num_tokens, num_threads) * each;
}

long attention_bytes(const attention *l, long num_tokens, int num_threads) {
    work w;
    return lay_out_work(l, num_tokens, num_threads, 0, NULL, &w);
}

void attend(const attention *l, const batch *b, const cache *c, const uint16_t *x, uint16_t *out, char *scratch,
            progress *taken, int num_threads) {
    const long num_tokens = b->num_tokens, queries = most_rows(l) / (l->n_heads / l->n_kv_heads);
    work w;
    room own;
    const preparer me = this_thread(num_tokens);
    lay_out_work(l, num_tokens, num_threads, own_room(&me), scratch, &w);
    lay_out_room(l, w.rooms + me.index * lay_out_room(l, NULL, &own), &own);
    long items = 0;
    for (long s = 0; s < b->num_spans; s++)
        items += (b->spans[s].num_tokens + queries - 1) / queries * l->n_kv_heads;
    if (me.index == 0)
        for (long s = 0, i = 0; s < b->num_spans; s++)
            for (long q = 0; q < b->spans[s].num_tokens; q += queries)
                for (long h = 0; h < l->n_kv_heads; h++, i++) {
                    w.item_spans[2 * i] = s;
                    w.item_spans[2 * i + 1] = q * l->n_kv_heads + h;
                }
    EACH_OWN(t, &me, num_tokens) normalise(x + t * l->dim, l->norm, w.normed + t * l->dim, l->dim, l->eps);
    meet(&me);
    multiply(l->wqkv, w.normed, num_tokens, &me, w.tiles, w.floats, NULL, w.qkv, &taken->in);
#pragma omp for schedule(static)
    for (long t = 0; t < num_tokens; t++) turn_and_store(l, b, c, t, w.qkv + t * l->wqkv->n);
#pragma omp for schedule(dynamic)
    for (long i = 0; i < items; i++) {
        /* The last queries have the most keys: they begin. */
        const long *item = w.item_spans + 2 * (items - 1 - i);
        const span *s = b->spans + item[0];
        const long first = item[1] / l->n_kv_heads, left = s->num_tokens - first;
        attend_some(l, b, c, s, first, left < queries ? left : queries, item[1] % l->n_kv_heads, w.qkv, w.attended,
                    &own);
    }
    multiply(l->wo, w.attended, num_tokens, &me, w.tiles, w.floats, x, out, &taken->out);
}
