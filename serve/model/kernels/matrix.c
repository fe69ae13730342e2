/* The product of a matrix in blocks with rows in tiles. */
#include "kernels.h"

#include <stdlib.h>

#define MOST_ROUNDED_ROWS 8

long block_bytes(int form, long k) {
    if (form == BF16) return k * OUTPUTS * 2;
    return k / GROUP * (form == INT8 ? INT8_GROUP_BYTES : INT4_GROUP_BYTES);
}

long num_blocks(const matrix *w) { return (w->n + OUTPUTS - 1) / OUTPUTS; }

long num_tiles(const matrix *w, long m) {
    const long most = w->form == BF16 ? MOST_ROWS : MOST_ROUNDED_ROWS;
    return (m + most - 1) / most;
}

void cut(long m, long num_tiles, long index, tile *t) {
    const long each = m / num_tiles, more = m % num_tiles;
    t->first = index * each + (index < more ? index : more);
    t->rows = (int)(each + (index < more));
}

long row_floats(const matrix *w) { return w->k / 2 + (w->form == INT4 ? w->k / GROUP : 0); }

static void sum_groups(const uint16_t *x, long num_groups, float *sums) {
    for (long g = 0; g < num_groups; g++, x += GROUP)
        sums[g] = _mm512_reduce_add_ps(_mm512_add_ps(widen(x), widen(x + 16)));
}

void fill(tile *t, const matrix *w, const uint16_t *const *rows, float *floats) {
    const long k = w->k;
    const int m = t->rows;
    if (w->form == INT4) {
        for (int i = 0; i < m; i++) sum_groups(rows[i], k / GROUP, floats + i * (k / GROUP));
        t->sums = floats;
        floats += m * (k / GROUP);
    }
    t->pairs = m > 1 ? (const uint32_t *)floats : (const uint32_t *)rows[0];
    if (m == 1) return;
    uint32_t *to = (uint32_t *)floats;
    long j = 0;
    for (; j + 16 <= k / 2; j += 16) {
        __m512i r[16];
        for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_si512(rows[i < m ? i : 0] + 2 * j);
        transpose(r);
        for (int i = 0; i < 16; i++) _mm512_mask_storeu_epi32(to + (j + i) * m, (1 << m) - 1, r[i]);
    }
    for (; j < k / 2; j++)
        for (int i = 0; i < m; i++) memcpy(to + j * m + i, rows[i] + 2 * j, 4);
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

/* -8 to 7 in bf16, twice: the fifth bit of an index does not matter. */
INLINE __m512i nibble_table(void) {
    uint16_t table[32];
    for (int i = 0; i < 32; i++) table[i] = narrow((float)(i % 16 - 8));
    return _mm512_loadu_si512(table);
}

INLINE void times_bf16(const uint8_t *w, const tile *x, long k, uint16_t *y, long stride, long num, const int m) {
    __m512 low[MOST_ROWS], high[MOST_ROWS];
    for (int i = 0; i < m; i++) low[i] = high[i] = _mm512_setzero_ps();
    dot(w, x->pairs, k / 2, low, high, m);
    for (int i = 0; i < m; i++) put(y + i * stride, num, low[i], high[i]);
}

/* 32 bytes as 32 bf16, exactly. */
INLINE __m512bh levels(const uint8_t *p) {
    __m512i low = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p));
    __m512i high = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(p + 16)));
    return _mm512_cvtne2ps_pbh(_mm512_cvtepi32_ps(high), _mm512_cvtepi32_ps(low));
}

INLINE void times_int8(const uint8_t *w, const tile *x, long k, uint16_t *y, long stride, long num, const int m) {
    __m512 low[MOST_ROUNDED_ROWS], high[MOST_ROUNDED_ROWS];
    const uint32_t *p = x->pairs;
    for (int i = 0; i < m; i++) low[i] = high[i] = _mm512_setzero_ps();
    for (long g = 0; g < k; g += GROUP, w += INT8_GROUP_BYTES) {
        __m512 gl[MOST_ROUNDED_ROWS], gh[MOST_ROUNDED_ROWS];
        for (int i = 0; i < m; i++) gl[i] = gh[i] = _mm512_setzero_ps();
        for (int j = 0; j < GROUP; j += 2, p += m) {
            _mm_prefetch((const char *)w + 2 * INT8_GROUP_BYTES + 32 * j, _MM_HINT_T0);
            __m512bh a = levels(w + 32 * j), b = levels(w + 32 * j + 32);
            for (int i = 0; i < m; i++) {
                gl[i] = _mm512_dpbf16_ps(gl[i], a, pair(p + i));
                gh[i] = _mm512_dpbf16_ps(gh[i], b, pair(p + i));
            }
        }
        const uint8_t *scales = w + GROUP * OUTPUTS;
        for (int i = 0; i < m; i++) {
            low[i] = _mm512_fmadd_ps(gl[i], widen(scales), low[i]);
            high[i] = _mm512_fmadd_ps(gh[i], widen(scales + 32), high[i]);
        }
    }
    for (int i = 0; i < m; i++) put(y + i * stride, num, low[i], high[i]);
}

INLINE void times_int4(const uint8_t *w, const tile *x, long k, uint16_t *y, long stride, long num, const int m) {
    const __m512i table = nibble_table();
    __m512 low[MOST_ROUNDED_ROWS], high[MOST_ROUNDED_ROWS];
    const uint32_t *p = x->pairs;
    for (int i = 0; i < m; i++) low[i] = high[i] = _mm512_setzero_ps();
    for (long g = 0; g < k / GROUP; g++, w += INT4_GROUP_BYTES) {
        __m512 gl[MOST_ROUNDED_ROWS], gh[MOST_ROUNDED_ROWS];
        for (int i = 0; i < m; i++) gl[i] = gh[i] = _mm512_setzero_ps();
        for (int j = 0; j < GROUP / 2; j++, p += m) {
            _mm_prefetch((const char *)w + 3 * INT4_GROUP_BYTES + 40 * j, _MM_HINT_T0);
            /* The low halves are of the first 16 outputs. An index is the low five bits of 16. */
            __m512i bytes = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)(w + 32 * j)));
            __m512bh a = (__m512bh)_mm512_permutexvar_epi16(bytes, table);
            __m512bh b = (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(bytes, 4), table);
            for (int i = 0; i < m; i++) {
                gl[i] = _mm512_dpbf16_ps(gl[i], a, pair(p + i));
                gh[i] = _mm512_dpbf16_ps(gh[i], b, pair(p + i));
            }
        }
        const uint8_t *scales = w + GROUP * OUTPUTS / 2, *zeros = scales + 2 * OUTPUTS;
        for (int i = 0; i < m; i++) {
            __m512 sum = _mm512_set1_ps(x->sums[i * (k / GROUP) + g]);
            low[i] = _mm512_fmadd_ps(sum, widen(zeros), _mm512_fmadd_ps(gl[i], widen(scales), low[i]));
            high[i] = _mm512_fmadd_ps(sum, widen(zeros + 32), _mm512_fmadd_ps(gh[i], widen(scales + 32), high[i]));
        }
    }
    for (int i = 0; i < m; i++) put(y + i * stride, num, low[i], high[i]);
}

INLINE void times(int form, const uint8_t *w, const tile *x, long k, uint16_t *y, long stride, long num, const int m) {
    if (form == BF16) times_bf16(w, x, k, y, stride, num, m);
    else if (m > MOST_ROUNDED_ROWS) __builtin_unreachable();
    else if (form == INT8) times_int8(w, x, k, y, stride, num, m);
    else times_int4(w, x, k, y, stride, num, m);
}

void multiply_tile(const matrix *w, long block, const tile *x, uint16_t *y, long stride) {
    const uint8_t *from = w->blocks + block * block_bytes(w->form, w->k);
    const long num = w->n - block * OUTPUTS;
#define TIMES(m) times(w->form, from, x, w->k, y, stride, num, m)
    WITH_ROWS(x->rows, TIMES)
#undef TIMES
}

/* y[M][N] = x[M][K] * w[N][K]^T, all in bf16. Returns 0, or 1 when there is no memory for tiles. */
int magnetar_multiply(const matrix *w, const uint16_t *x, uint16_t *y, long m, int num_threads) {
    const long count = num_tiles(w, m), blocks = num_blocks(w), k = w->k;
    long taken = 0;
    float few[1024], *floats = few;
    tile *tiles = malloc(count * sizeof(tile));
    if (count && !tiles) return 1;
    if (m > 1 || row_floats(w) > 1024) floats = malloc(m * row_floats(w) * sizeof(float));
    if (floats) {
#pragma omp parallel num_threads(num_threads) if (num_threads > 1)
        {
#pragma omp for schedule(static)
            for (long t = 0; t < count; t++) {
                const uint16_t *rows[MOST_ROWS];
                cut(m, count, t, tiles + t);
                for (int i = 0; i < tiles[t].rows; i++) rows[i] = x + (tiles[t].first + i) * k;
                fill(tiles + t, w, rows, floats + tiles[t].first * row_floats(w));
            }
            for (long b, end; take_run(&taken, blocks, num_threads, &b, &end);)
                for (; b < end; b++)
                    for (long t = 0; t < count; t++)
                        multiply_tile(w, b, tiles + t, y + tiles[t].first * w->n + b * OUTPUTS, w->n);
        }
    }
    free(tiles);
    if (floats != few) free(floats);
    return !floats;
}
