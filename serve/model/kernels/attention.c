/* A whole attention part of a layer over the paged cache, added to its input.
 *
 * normalise -> wqkv -> turn and store -> attend -> wo -> add
 *
 * A query meets its keys in stretches of 64 that begin at multiples of 64 positions, always in this
 * order: maximum and sums of what it has seen are carried along, and a stretch in which it sees
 * nothing changes no bit of them. So the result does not depend on the other queries of the step, nor
 * on the step in which a key was computed, nor on where its block lies.
 */
#include "layers.h"

#define KEYS 64
#define KEY_BLOCKS (KEYS / OUTPUTS)
#define QUERY_ROWS 168 /* queries times heads that take a stretch of keys together, or one query */
#define NOTHING (-1e30f)

/* What one thread needs to attend. */
typedef struct {
    uint32_t *queries, *keys, *values; /* tiles of queries; blocks of keys; blocks of values */
    float *scores, *sums; /* [rows][KEYS], [rows][padded head_dim] */
    float *largest, *totals, *scales; /* [rows] */
    uint32_t *chances; /* tiles of the exponentials, in bf16 */
} room;

static long most_rows(const attention *l) {
    const long group = l->n_heads / l->n_kv_heads;
    return group > QUERY_ROWS ? group : QUERY_ROWS / group * group;
}

/* The head dimension in whole blocks; what is beyond it comes to nothing. */
INLINE long padded(const attention *l) { return (l->head_dim + OUTPUTS - 1) / OUTPUTS * OUTPUTS; }

static long lay_out_room(const attention *l, char *scratch, room *r) {
    const long rows = most_rows(l), head_dim = padded(l);
    long taken = 0;
    r->queries = take(scratch, &taken, 2 * rows * head_dim);
    r->keys = take(scratch, &taken, 2 * KEYS * head_dim);
    r->values = take(scratch, &taken, 2 * KEYS * head_dim);
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
    memcpy(c->keys + b->slots[token] * width, qkv + queries, 2 * width);
    memcpy(c->values + b->slots[token] * width, qkv + queries + width, 2 * width);
}

/* Where the key of a position lies, beside those of the other heads. */
INLINE long slot(const attention *l, const batch *b, const span *s, long position) {
    return b->block_ids[s->block_ids + position / l->block_tokens] * l->block_tokens + position % l->block_tokens;
}

/* Keys and values of the positions first .. first + 64 into blocks; those from `end` on are zero. */
static void fetch(const attention *l, const batch *b, const cache *c, const span *s, long head, long first, long begin,
                  long end, room *r) {
    const long head_dim = l->head_dim, width = l->n_kv_heads * head_dim, at = head * head_dim;
    static const uint16_t zeros[1024];
    const uint16_t *keys[KEYS], *values[KEYS];
    for (long i = 0; i < KEYS; i++) {
        const long position = first + i;
        const int is_there = position >= begin && position < end;
        const long place = is_there ? slot(l, b, s, position) * width + at : 0;
        keys[i] = is_there ? c->keys + place : zeros;
        values[i] = is_there ? c->values + place : zeros;
    }
    for (long i = 0; i < KEYS; i += 16)
        for (long j = 0; j < head_dim / 2; j += 16) {
            __m512i t[16];
            const int pairs = head_dim / 2 - j < 16 ? (int)(head_dim / 2 - j) : 16;
            for (int k = 0; k < 16; k++) t[k] = _mm512_maskz_loadu_epi32((1 << pairs) - 1, keys[i + k] + 2 * j);
            transpose(t);
            uint32_t *to = r->keys + i / OUTPUTS * OUTPUTS * (head_dim / 2) + i % OUTPUTS;
            for (int k = 0; k < 16; k++)
                if (k < pairs) _mm512_storeu_si512(to + (j + k) * OUTPUTS, t[k]);
        }
    for (long i = 0; i < KEYS; i += 2)
        for (long o = 0; o < head_dim; o += 16) {
            __m512i even = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(values[i] + o)));
            __m512i odd = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(values[i + 1] + o)));
            uint32_t *to = r->values + o / OUTPUTS * OUTPUTS * (KEYS / 2) + i / 2 * OUTPUTS + o % OUTPUTS;
            _mm512_storeu_si512(to, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
        }
}

INLINE void score(const uint32_t *keys, const uint32_t *queries, long pairs, float *scores, const int m) {
    for (long b = 0; b < KEY_BLOCKS; b++) {
        __m512 low[MOST_ROWS], high[MOST_ROWS];
        for (int i = 0; i < m; i++) low[i] = high[i] = _mm512_setzero_ps();
        dot((const uint8_t *)(keys + b * OUTPUTS * pairs), queries, pairs, low, high, m);
        for (int i = 0; i < m; i++) {
            _mm512_storeu_ps(scores + i * KEYS + b * OUTPUTS, low[i]);
            _mm512_storeu_ps(scores + i * KEYS + b * OUTPUTS + 16, high[i]);
        }
    }
}

/* sums = sums * scales + chances * values */
INLINE void weigh(const uint32_t *values, const uint32_t *chances, const float *scales, long width, float *sums,
                  const int m) {
    for (long o = 0; o < width; o += OUTPUTS) {
        __m512 low[MOST_ROWS], high[MOST_ROWS];
        for (int i = 0; i < m; i++) {
            low[i] = _mm512_mul_ps(_mm512_loadu_ps(sums + i * width + o), _mm512_set1_ps(scales[i]));
            high[i] = _mm512_mul_ps(_mm512_loadu_ps(sums + i * width + o + 16), _mm512_set1_ps(scales[i]));
        }
        dot((const uint8_t *)(values + o * (KEYS / 2)), chances, KEYS / 2, low, high, m);
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

static void score_tile(const room *r, const tile *t, long pairs) {
    float *scores = r->scores + t->first * KEYS;
#define SCORE(m) score(r->keys, t->inputs, pairs, scores, m)
    WITH_ROWS(t->rows, SCORE)
#undef SCORE
}

static void weigh_tile(const room *r, const tile *t, long width) {
    float *sums = r->sums + t->first * width;
#define WEIGH(m) weigh(r->values, t->inputs, r->scales + t->first, width, sums, m)
    WITH_ROWS(t->rows, WEIGH)
#undef WEIGH
}

/* The queries first .. first + num of a span, those heads that share one of the KV heads. */
static void attend_some(const attention *l, const batch *b, const cache *c, const span *s, long first, long num,
                        long head, const uint16_t *qkv, uint16_t *out, const room *r) {
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
    for (; key < position + num; key += KEYS) {
        fetch(l, b, c, s, head, key, begin, end, (room *)r);
        for (long t = 0; t < tiles; t++) {
            uint16_t chances[MOST_ROWS][KEYS];
            const uint16_t *each[MOST_ROWS];
            score_tile(r, queries + t, head_dim / 2);
            for (int i = 0; i < queries[t].rows; i++) {
                const long row = queries[t].first + i;
                weights(r->scores + row * KEYS, seen_by(position + row / group, l->window, key), factor,
                        r->largest + row, r->totals + row, r->scales + row, chances[i]);
                each[i] = chances[i];
            }
            tile weighed = queries[t];
            fill(&weighed, &chances_as_inputs, each, (float *)r->chances);
            weigh_tile(r, &weighed, padded(l));
        }
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
