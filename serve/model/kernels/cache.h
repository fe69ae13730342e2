/* Keys and values of one layer as `attend` multiplies with them, from front to back and never laid out again.
 *
 * 16 neighbouring slots, which are of one block, have a leaf of keys and one of values for every KV head. A
 * leaf of keys holds, for every pair of numbers of a key, that pair of each of the 16 keys; a leaf of values
 * holds, for every 16 numbers of a value, each of them of the first two values, of the next two, and so on.
 */
#include "layers.h"

#define LEAF 16
#define KEYS 64 /* that queries meet together */
#define LEAVES (KEYS / LEAF)
#define MOST_HEAD_DIM 1024

/* Where the leaves of 64 positions are, and room for those that hold more than may be seen. */
typedef struct {
    const uint32_t *keys[LEAVES], *values[LEAVES];
    uint32_t *cut;
} stretch;

INLINE long leaf_words(const attention *l) { return l->head_dim * LEAF / 2; }

INLINE uint32_t *leaf(const attention *l, uint16_t *of, long slot, long head) {
    return (uint32_t *)of + (slot / LEAF * l->n_kv_heads + head) * leaf_words(l);
}

/* One token; neighbours may be stored at the same time. */
static void store(const attention *l, const cache *c, long slot, const uint16_t *keys, const uint16_t *values) {
    const long head_dim = l->head_dim, at = slot % LEAF;
    const __mmask32 half = at % 2 ? 0xaaaaaaaa : 0x55555555;
    for (long h = 0; h < l->n_kv_heads; h++, keys += head_dim, values += head_dim) {
        uint32_t *key = leaf(l, c->keys, slot, h) + at, *value = leaf(l, c->values, slot, h) + at / 2 * 16;
        for (long j = 0; j < head_dim / 2; j++) memcpy(key + j * LEAF, keys + 2 * j, 4);
        for (long o = 0; o < head_dim; o += 16) {
            __m512i numbers = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(values + o)));
            if (at % 2) numbers = _mm512_slli_epi32(numbers, 16);
            _mm512_mask_storeu_epi16(value + o * LEAF / 2, half, numbers);
        }
    }
}

/* Those of the values of a leaf that are not before `first` nor from `end` on; zeros for the others. */
static void cut_leaf(const attention *l, const uint32_t *values, long first, long end, uint32_t *to) {
    for (long i = 0; i < LEAF; i += 2) {
        const uint32_t even = i >= first && i < end ? 0xffff : 0, odd = i + 1 >= first && i + 1 < end ? 0xffff0000 : 0;
        const __m512i kept = _mm512_set1_epi32((int)(even | odd));
        for (long o = i / 2 * 16; o < leaf_words(l); o += LEAF / 2 * 16)
            _mm512_storeu_si512(to + o, _mm512_and_si512(_mm512_loadu_si512(values + o), kept));
    }
}

/* The positions first .. first + 64 of a span. What nobody wrote counts nothing, but it may be no number, and
 * so would nothing times it be: values before `begin` and from `end` on are zero. */
static void find(const attention *l, const batch *b, const cache *c, const span *s, long head, long first, long begin,
                 long end, stretch *found) {
    static const uint32_t nothing[MOST_HEAD_DIM * LEAF / 2];
    for (long i = 0; i < LEAVES; i++) {
        const long position = first + i * LEAF;
        found->keys[i] = found->values[i] = nothing;
        if (position >= end || position + LEAF <= begin) continue;
        const long block = b->block_ids[s->block_ids + position / l->block_tokens];
        const long slot = block * l->block_tokens + position % l->block_tokens;
        found->keys[i] = leaf(l, c->keys, slot, head);
        found->values[i] = leaf(l, c->values, slot, head);
        if (position >= begin && position + LEAF <= end) continue;
        uint32_t *to = found->cut + i * leaf_words(l);
        cut_leaf(l, found->values[i], begin - position, end - position, to);
        found->values[i] = to;
    }
}
