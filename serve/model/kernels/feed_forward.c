/* A whole feed-forward part of a layer, dense or sparse, added to its input.
 *
 * normalise -> route -> sort by expert -> w1 and w3, gated -> w2 -> weighted sum -> add
 *
 * What is rounded to bf16 where is the same as when the parts are called one by one.
 */
#include "layers.h"

#define RUN 16

typedef struct {
    uint16_t *hidden, *outputs; /* of assignments, sorted by expert: for all threads */
    uint16_t *normed; /* of tokens; this and what follows is prepared */
    int64_t *chosen; /* [T][K] */
    float *weights; /* [T][K] */
    long *assignments, *places; /* sorted place -> token * K + choice, and back */
    long *starts, *in_starts, *out_starts, *active; /* first place and first tile of every expert */
    tile *in_tiles, *out_tiles;
    float *in_floats, *out_floats;
    long *num_active;
} work;

static long lay_out_prepared(const feed_forward *l, long num_tokens, char *scratch, work *w) {
    const long places = num_tokens * l->num_chosen, experts = l->num_experts + 1;
    const long tiles = num_tiles(l->w13, places) + num_tiles(l->w2, places) + l->num_experts;
    long taken = 0;
    w->num_active = take(scratch, &taken, sizeof(long));
    w->chosen = take(scratch, &taken, places * sizeof(int64_t));
    w->normed = take(scratch, &taken, 2 * num_tokens * l->dim);
    w->weights = take(scratch, &taken, places * sizeof(float));
    w->assignments = take(scratch, &taken, places * sizeof(long));
    w->places = take(scratch, &taken, places * sizeof(long));
    w->starts = take(scratch, &taken, experts * sizeof(long));
    w->in_starts = take(scratch, &taken, experts * sizeof(long));
    w->out_starts = take(scratch, &taken, experts * sizeof(long));
    w->active = take(scratch, &taken, experts * sizeof(long));
    w->in_tiles = take(scratch, &taken, tiles * sizeof(tile));
    w->out_tiles = take(scratch, &taken, tiles * sizeof(tile));
    w->in_floats = take(scratch, &taken, places * row_floats(l->w13) * sizeof(float));
    w->out_floats = take(scratch, &taken, places * row_floats(l->w2) * sizeof(float));
    return taken;
}

/* `own`: the room in use of those for what is prepared. */
static long lay_out_work(const feed_forward *l, long num_tokens, int num_threads, long own, char *scratch, work *w) {
    const long places = num_tokens * l->num_chosen;
    long taken = 0;
    w->hidden = take(scratch, &taken, 2 * places * l->hidden_dim);
    w->outputs = take(scratch, &taken, 2 * places * l->dim);
    const long each = lay_out_prepared(l, num_tokens, NULL, w);
    lay_out_prepared(l, num_tokens, (char *)((uintptr_t)scratch + taken + own * each), w);
    return taken + num_rooms(num_tokens, num_threads) * each;
}

static void route(const feed_forward *l, long token, work *w) {
    int64_t *chosen = w->chosen + token * l->num_chosen;
    float *weights = w->weights + token * l->num_chosen;
    if (!l->gate) {
        chosen[0] = 0;
        weights[0] = 1.0f;
        return;
    }
    uint16_t logits[l->num_experts];
    float floats[row_floats(l->gate)];
    const uint16_t *row = w->normed + token * l->dim;
    tile one = {.rows = 1};
    fill(&one, l->gate, &row, floats);
    for (long b = 0; b < num_blocks(l->gate); b++) multiply_tile(l->gate, b, &one, logits + b * OUTPUTS, 0);
    choose(logits, l->num_experts, l->num_chosen, chosen, weights);
}

/* Cut the rows of one expert into tiles with places for `first`. */
static long cut_all(const matrix *w, long start, long count, tile *tiles) {
    const long num = num_tiles(w, count);
    for (long t = 0; t < num; t++) {
        cut(count, num, t, tiles + t);
        tiles[t].first += start;
    }
    return num;
}

static void sort(const feed_forward *l, long num_tokens, int is_counting, work *w) {
    const long num = num_tokens * l->num_chosen;
    long place = 0, in = 0, out = 0;
    *w->num_active = 0;
    for (long e = 0; e < l->num_experts; e++) {
        w->starts[e] = place;
        w->in_starts[e] = in;
        w->out_starts[e] = out;
        for (long a = 0; a < num; a++)
            if (w->chosen[a] == e) {
                w->assignments[place] = a;
                w->places[a] = place++;
            }
        in += cut_all(l->w13, w->starts[e], place - w->starts[e], w->in_tiles + in);
        out += cut_all(l->w2, w->starts[e], place - w->starts[e], w->out_tiles + out);
        if (place > w->starts[e]) w->active[(*w->num_active)++] = e;
        if (is_counting && l->counts) l->counts[e] += place - w->starts[e];
    }
    w->starts[l->num_experts] = place;
    w->in_starts[l->num_experts] = in;
    w->out_starts[l->num_experts] = out;
}

static void fill_in(const feed_forward *l, tile *t, work *w) {
    const uint16_t *rows[MOST_ROWS];
    for (int i = 0; i < t->rows; i++)
        rows[i] = w->normed + w->assignments[t->first + i] / l->num_chosen * l->dim;
    fill(t, l->w13, rows, w->in_floats + t->first * row_floats(l->w13));
}

static void fill_out(const feed_forward *l, tile *t, work *w) {
    const uint16_t *rows[MOST_ROWS];
    for (int i = 0; i < t->rows; i++) rows[i] = w->hidden + (t->first + i) * l->hidden_dim;
    fill(t, l->w2, rows, w->out_floats + t->first * row_floats(l->w2));
}

/* Some blocks of w1, then the same of w3, for all rows of an expert, gated. */
static void multiply_w13(const feed_forward *l, long e, long first, long num, work *w) {
    uint16_t gates[MOST_ROWS * RUN * OUTPUTS], ups[MOST_ROWS * RUN * OUTPUTS];
    for (long t = w->in_starts[e]; t < w->in_starts[e + 1]; t++) {
        const tile *x = w->in_tiles + t;
        for (long b = 0; b < num; b++)
            multiply_tile(l->w13 + e, first + b, x, gates + b * OUTPUTS, RUN * OUTPUTS);
        for (long b = 0; b < num; b++)
            multiply_tile(l->w13 + e, l->hidden_dim / OUTPUTS + first + b, x, ups + b * OUTPUTS, RUN * OUTPUTS);
        uint16_t *y = w->hidden + x->first * l->hidden_dim + first * OUTPUTS;
        for (int i = 0; i < x->rows; i++)
            gate(gates + i * RUN * OUTPUTS, ups + i * RUN * OUTPUTS, y + i * l->hidden_dim, num * OUTPUTS);
    }
}

/* Those blocks of w1 and w3, of all experts one after the other, that a thread has taken. With one tile
 * memory is the limit, and it is faster the longer it is read without a jump; with several a block stays
 * in the cache for all of them, but a run would not. */
static void multiply_taken(const feed_forward *l, long i, long end, work *w) {
    const long blocks = l->hidden_dim / OUTPUTS;
    while (i < end) {
        const long e = w->active[i / blocks], first = i % blocks;
        const long most = w->in_starts[e + 1] - w->in_starts[e] > 1 ? 1 : RUN;
        const long left = end - i < blocks - first ? end - i : blocks - first, num = left < most ? left : most;
        multiply_w13(l, e, first, num, w);
        i += num;
    }
}

static void multiply_w2(const feed_forward *l, long e, long block, work *w) {
    for (long t = w->out_starts[e]; t < w->out_starts[e + 1]; t++) {
        const tile *x = w->out_tiles + t;
        multiply_tile(l->w2 + e, block, x, w->outputs + x->first * l->dim + block * OUTPUTS, l->dim);
    }
}

/* out = x + the weighted sum of a token's outputs, in the order in which its experts were chosen. */
static void add(const feed_forward *l, long token, long column, const uint16_t *x, uint16_t *out, const work *w) {
    __m512 sum = _mm512_setzero_ps();
    for (long c = 0; c < l->num_chosen; c++) {
        const long a = token * l->num_chosen + c;
        __m512 y = _mm512_mul_ps(widen(w->outputs + w->places[a] * l->dim + column), _mm512_set1_ps(w->weights[a]));
        sum = _mm512_add_ps(sum, y);
    }
    uint16_t rounded[16];
    narrow16(rounded, sum);
    const long at = token * l->dim + column;
    narrow16(out + at, _mm512_add_ps(widen(x + at), widen(rounded)));
}

long feed_forward_bytes(const feed_forward *l, long num_tokens, int num_threads) {
    work w;
    return lay_out_work(l, num_tokens, num_threads, 0, NULL, &w);
}

void feed(const feed_forward *l, const uint16_t *x, uint16_t *out, long num_tokens, char *scratch, progress *taken,
          int num_threads) {
    const long in_blocks = l->hidden_dim / OUTPUTS, out_blocks = num_blocks(l->w2);
    const preparer me = this_thread(num_tokens);
    work w;
    lay_out_work(l, num_tokens, num_threads, own_room(&me), scratch, &w);
    EACH_OWN(t, &me, num_tokens) {
        normalise(x + t * l->dim, l->norm, w.normed + t * l->dim, l->dim, l->eps);
        route(l, t, &w);
    }
    meet(&me);
    if (me.is_alone || me.index == 0) sort(l, num_tokens, me.index == 0, &w);
    meet(&me);
    EACH_OWN(t, &me, w.in_starts[l->num_experts]) fill_in(l, w.in_tiles + t, &w);
    meet(&me);
    for (long i, end; take_run(&taken->in, *w.num_active * in_blocks, num_threads, &i, &end);)
        multiply_taken(l, i, end, &w);
#pragma omp barrier
    EACH_OWN(t, &me, w.out_starts[l->num_experts]) fill_out(l, w.out_tiles + t, &w);
    meet(&me);
    for (long i, end; take_run(&taken->out, *w.num_active * out_blocks, num_threads, &i, &end);)
        for (; i < end; i++) multiply_w2(l, w.active[i / out_blocks], i % out_blocks, &w);
#pragma omp barrier
#pragma omp for schedule(static)
    for (long i = 0; i < num_tokens * (l->dim / 16); i++)
        add(l, i / (l->dim / 16), i % (l->dim / 16) * 16, x, out, &w);
}
