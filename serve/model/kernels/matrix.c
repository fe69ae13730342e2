/* The product of a matrix in blocks with rows in tiles. */
#include "kernels.h"

#include <stdlib.h>

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

long row_floats(const matrix *w) {
    return w->form == BF16 ? w->k / 2 : w->k / GROUP * rounded_words(w->form);
}

void fill(tile *t, const matrix *w, const uint16_t *const *rows, float *floats) {
    const long k = w->k;
    const int m = t->rows;
    if (w->form != BF16) {
        fill_rounded(t, w, rows, floats);
        return;
    }
    t->inputs = m > 1 ? (const uint32_t *)floats : (const uint32_t *)rows[0];
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

INLINE void times(const uint8_t *w, const tile *x, long k, uint16_t *y, long stride, long num, const int m) {
    __m512 low[MOST_ROWS], high[MOST_ROWS];
    for (int i = 0; i < m; i++) low[i] = high[i] = _mm512_setzero_ps();
    dot(w, x->inputs, k / 2, low, high, m);
    for (int i = 0; i < m; i++) put(y + i * stride, num, low[i], high[i]);
}

void multiply_tile(const matrix *w, long block, const tile *x, uint16_t *y, long stride) {
    if (w->form != BF16) {
        multiply_rounded(w, block, x, y, stride);
        return;
    }
    const uint8_t *from = w->blocks + block * block_bytes(w->form, w->k);
    const long num = w->n - block * OUTPUTS;
#define TIMES(m) times(from, x, w->k, y, stride, num, m)
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
