/* What the compiled functions of a stage share: how matrices and their inputs are held, and sums.
 *
 * A matrix is held in blocks of 32 outputs. A block holds, for every pair of inputs, the pair of
 * each of its 32 outputs: what two registers of AVX512-BF16 dot products take. It is read once from
 * front to back, so that with few rows a product runs at the speed of memory.
 *
 * In 8, 5 and 4 bits it is four inputs instead of pairs, for dot products of whole numbers (VNNI). A
 * block begins with a float for each of its outputs; 32 inputs are followed by the outputs' scales,
 * a byte each, and in 5 and 4 bits by their zeros: both count in units of that float (quantise.py).
 * Levels are not negative: 8 bits are kept with 128 added. In 4 bits the low halves of the bytes are of
 * the first 16 outputs; in 5 these come first, then the fifth bits in the order of the bytes they go to.
 *
 * Inputs come in tiles of rows, again pair by pair or four by four: what the registers of one block are multiplied
 * with lies side by side, whatever the distance of the rows in memory was.
 *
 * Every number is summed in one fixed order, however many rows there are beside it and however many
 * threads compute; nothing here depends on what a step holds besides the row itself.
 */
#include <immintrin.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>

#define MOST_CHOSEN 16
#define OUTPUTS 32
#define FEW 2
#define GROUP 32
#define INT8_GROUP_BYTES (GROUP * OUTPUTS + OUTPUTS)
#define INT4_GROUP_BYTES (GROUP * OUTPUTS / 2 + 2 * OUTPUTS)
#define INT5_GROUP_BYTES (INT4_GROUP_BYTES + GROUP * OUTPUTS / 8)
#define ZERO_STEP 4
#define MOST_ROWS 14
#define MOST_ROUNDED_ROWS 6
#define FEW_INT4 4
#define AHEAD 2048
#define INLINE static inline __attribute__((always_inline))

enum { BF16 = 0, INT8 = 1, INT4 = 2, INT5 = 3 };

/* w[N][K]; K even, where it is rounded a multiple of 32. */
typedef struct {
    const uint8_t *blocks;
    long n, k;
    int form;
} matrix;

/* Rows of inputs: pairs[K / 2][rows], or for rounded weights words[K / 32][words of a group][rows]. */
typedef struct {
    const uint32_t *inputs;
    long first;
    int rows;
} tile;

INLINE long group_bytes(int form) {
    return form == INT8 ? INT8_GROUP_BYTES : form == INT5 ? INT5_GROUP_BYTES : INT4_GROUP_BYTES;
}
INLINE long block_bytes(int form, long k) {
    if (form == BF16) return k * OUTPUTS * 2;
    return 4 * OUTPUTS + k / GROUP * group_bytes(form);
}
long num_blocks(const matrix *w);

/* How many tiles M rows of inputs of the matrix make, and the rows of one: as equal as can be. */
long num_tiles(const matrix *w, long m);
void cut(long m, long num_tiles, long index, tile *t);

/* Floats that `fill` may need for every row of a tile. */
long row_floats(const matrix *w);
/* Fill it from rows that lie anywhere. A single row for a matrix in bf16 stays where it is. */
void fill(tile *t, const matrix *w, const uint16_t *const *rows, float *floats);

/* The same for a matrix that is rounded, and how many words a row takes there for every group. */
void fill_rounded(tile *t, const matrix *w, const uint16_t *const *rows, float *floats);
void multiply_rounded(const matrix *w, long block, const tile *x, uint16_t *y, long stride);
long rounded_words(int form);

/* y[rows][stride] = the outputs of one block for one tile, in bf16; fewer than 32 at the end. */
void multiply_tile(const matrix *w, long block, const tile *x, uint16_t *y, long stride);

/* y[K] = x / sqrt(mean(x^2) + eps) * weight, in fp32 and rounded once; K a multiple of 16. */
void normalise(const uint16_t *x, const uint16_t *weight, uint16_t *y, long k, float eps);
/* y[K] = silu(gates) * ups, in fp32 and rounded once; K a multiple of 16. */
void gate(const uint16_t *gates, const uint16_t *ups, uint16_t *y, long k);
/* The `num_chosen` largest of the logits, the first of equal ones first, and their softmax. */
void choose(const uint16_t *logits, long num, long num_chosen, int64_t *chosen, float *weights);
/* Where the next array of a scratch space lies, and how many bytes are taken so far. */
void *take(char *scratch, long *taken, long bytes);

/* The next items of work that no thread has taken, until there are none: long runs at first, for
 * memory is read faster without a jump, and single ones at last, so that all threads end together. */
INLINE int take_run(long *taken, long total, int num_threads, long *first, long *end) {
    *first = __atomic_load_n(taken, __ATOMIC_RELAXED);
    do {
        if (*first >= total) return 0;
        const long run = (total - *first) / (4 * num_threads);
        *end = *first + (run > 1 ? run : 1);
    } while (!__atomic_compare_exchange_n(taken, first, *end, 1, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
    return 1;
}

/* Who prepares what the products of a step take: the norm, the routing, the tiles. Of one token every
 * thread prepares all, in memory of its own: it takes no longer than where one does it and the others
 * wait, and spares half the barriers of a layer, at each of which a thread that fell asleep costs more
 * than the work. Of more tokens they share it. */
typedef struct {
    int is_alone, index, num_threads;
} preparer;

INLINE int is_alone(long num_tokens) { return num_tokens == 1; }

INLINE preparer this_thread(long num_tokens) {
    return (preparer){is_alone(num_tokens), omp_get_thread_num(), omp_get_num_threads()};
}

/* Memory for what is prepared comes in rooms: how many there are, and which one is this thread's. */
INLINE long num_rooms(long num_tokens, int num_threads) { return is_alone(num_tokens) ? num_threads : 1; }
INLINE long own_room(const preparer *p) { return p->is_alone ? p->index : 0; }

/* Where the items of a thread begin, of `count` to be prepared; they end where those of the next one do. */
INLINE long own_first(const preparer *p, long count, int index) {
    if (p->is_alone) return index > p->index ? count : 0;
    return count * index / p->num_threads;
}
#define EACH_OWN(i, p, count)                                                                                     \
    for (long i = own_first(p, count, (p)->index), end_##i = own_first(p, count, (p)->index + 1); i < end_##i; i++)

/* Until all have prepared what they share. */
INLINE void meet(const preparer *p) {
    if (p->is_alone) return;
#pragma omp barrier
}

/* Two inputs, for every output of a register. */
INLINE __m512bh pair(const uint32_t *x) { return (__m512bh)_mm512_set1_epi32((int)*x); }

INLINE __m512 widen(const void *p) {
    __m256i half = _mm256_loadu_si256((const __m256i *)p);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

INLINE void narrow16(uint16_t *y, __m512 value) {
    _mm256_storeu_si256((__m256i *)y, (__m256i)_mm512_cvtneps_pbh(value));
}

INLINE float wide(uint16_t value) {
    uint32_t bits = (uint32_t)value << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

INLINE uint16_t narrow(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

/* low and high += two registers of bf16 times a pair of inputs of each of m rows. */
INLINE void dot_pair(const void *a, const void *b, const uint32_t *x, __m512 *low, __m512 *high, const int m) {
    const __m512bh of_low = (__m512bh)_mm512_loadu_si512(a), of_high = (__m512bh)_mm512_loadu_si512(b);
    for (int i = 0; i < m; i++) {
        __m512bh p = pair(x + i);
        low[i] = _mm512_dpbf16_ps(low[i], of_low, p);
        high[i] = _mm512_dpbf16_ps(high[i], of_high, p);
    }
}

/* low and high += one block of bf16 times m rows, pair after pair. */
INLINE void dot(const uint8_t *w, const uint32_t *x, long pairs, __m512 *low, __m512 *high, const int m) {
    for (long j = 0; j < pairs; j++, w += 4 * OUTPUTS, x += m) {
        if (m > FEW) {
            _mm_prefetch((const char *)w + 2048, _MM_HINT_T0);
            _mm_prefetch((const char *)w + 2112, _MM_HINT_T0);
        }
        dot_pair(w, w + 64, x, low, high, m);
    }
}

INLINE void put(uint16_t *y, long num, __m512 low, __m512 high) {
    if (num >= OUTPUTS) {
        narrow16(y, low);
        narrow16(y + 16, high);
        return;
    }
    uint16_t both[OUTPUTS];
    narrow16(both, low);
    narrow16(both + 16, high);
    memcpy(y, both, 2 * num);
}

/* CALL(m) with the number of rows known to the compiler. */
#define WITH_ROWS(rows, CALL)                                                                                     \
    switch (rows) {                                                                                               \
    case 1: CALL(1); break;                                                                                       \
    case 2: CALL(2); break;                                                                                       \
    case 3: CALL(3); break;                                                                                       \
    case 4: CALL(4); break;                                                                                       \
    case 5: CALL(5); break;                                                                                       \
    case 6: CALL(6); break;                                                                                       \
    case 7: CALL(7); break;                                                                                       \
    case 8: CALL(8); break;                                                                                       \
    case 9: CALL(9); break;                                                                                       \
    case 10: CALL(10); break;                                                                                     \
    case 11: CALL(11); break;                                                                                     \
    case 12: CALL(12); break;                                                                                     \
    case 13: CALL(13); break;                                                                                     \
    default: CALL(14); break;                                                                                     \
    }

/* To the last bits of fp32 between -87 and 88, and the nearer of those beyond; NaN stays. */
INLINE __m512 exponential(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-87.0f), _mm512_min_ps(_mm512_set1_ps(88.0f), x));
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.0f / 720);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 120));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 24));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 6));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.5f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, n);
}

/* 16 registers of 16 numbers, columns for rows. */
INLINE void transpose(__m512i *r) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int j = 0; j < 4; j++) {
        t[j] = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x88);
        t[4 + j] = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x88);
        t[8 + j] = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xdd);
        t[12 + j] = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xdd);
    }
    for (int j = 0; j < 4; j++) {
        r[j] = _mm512_shuffle_i32x4(t[j], t[4 + j], 0x88);
        r[8 + j] = _mm512_shuffle_i32x4(t[j], t[4 + j], 0xdd);
        r[4 + j] = _mm512_shuffle_i32x4(t[8 + j], t[12 + j], 0x88);
        r[12 + j] = _mm512_shuffle_i32x4(t[8 + j], t[12 + j], 0xdd);
    }
}
