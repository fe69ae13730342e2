/* What is done to every row between the products: normalisation, gating, routing. */
#include "kernels.h"

void normalise(const uint16_t *x, const uint16_t *weight, uint16_t *y, long k, float eps) {
    __m512 sum = _mm512_setzero_ps();
    for (long j = 0; j < k; j += 16) {
        __m512 value = widen(x + j);
        sum = _mm512_fmadd_ps(value, value, sum);
    }
    __m512 factor = _mm512_set1_ps(1.0f / __builtin_sqrtf(_mm512_reduce_add_ps(sum) / k + eps));
    for (long j = 0; j < k; j += 16)
        narrow16(y + j, _mm512_mul_ps(_mm512_mul_ps(widen(x + j), factor), widen(weight + j)));
}

void gate(const uint16_t *gates, const uint16_t *ups, uint16_t *y, long k) {
    const __m512 one = _mm512_set1_ps(1.0f);
    for (long j = 0; j < k; j += 16) {
        __m512 value = widen(gates + j);
        __m512 below = _mm512_add_ps(one, exponential(_mm512_sub_ps(_mm512_setzero_ps(), value)));
        narrow16(y + j, _mm512_mul_ps(_mm512_div_ps(value, below), widen(ups + j)));
    }
}

void choose(const uint16_t *logits, long num, long num_chosen, int64_t *chosen, float *weights) {
    float values[MOST_CHOSEN];
    for (long c = 0; c < num_chosen; c++) {
        long best = -1;
        for (long e = 0; e < num; e++) {
            int is_taken = 0;
            for (long i = 0; i < c; i++) is_taken |= chosen[i] == e;
            if (!is_taken && (best < 0 || wide(logits[e]) > wide(logits[best]))) best = e;
        }
        chosen[c] = best;
        values[c] = wide(logits[best]);
    }
    const __mmask16 used = (1u << num_chosen) - 1;
    __m512 shifted = _mm512_sub_ps(_mm512_maskz_loadu_ps(used, values), _mm512_set1_ps(values[0]));
    __m512 powers = _mm512_maskz_mov_ps(used, exponential(shifted));
    __m512 sum = _mm512_set1_ps(_mm512_reduce_add_ps(powers));
    _mm512_mask_storeu_ps(weights, used, _mm512_div_ps(powers, sum));
}

void *take(char *scratch, long *taken, long bytes) {
    char *array = (char *)((uintptr_t)scratch + *taken);
    *taken += (bytes + 63) & ~63L;
    return array;
}

/* Of all rows of x[M][K]. */
void magnetar_rms_norm(const uint16_t *x, const uint16_t *weight, uint16_t *y, long m, long k, float eps,
                       int num_threads) {
#pragma omp parallel for schedule(static) num_threads(num_threads) if (num_threads > 1 && m > 16)
    for (long row = 0; row < m; row++) normalise(x + row * k, weight, y + row * k, k, eps);
}

/* y[M][K] from h[M][2 * K], which has the gates before the rest. */
void magnetar_gated(const uint16_t *h, uint16_t *y, long m, long k, int num_threads) {
#pragma omp parallel for schedule(static) num_threads(num_threads) if (num_threads > 1 && m > 16)
    for (long row = 0; row < m; row++) gate(h + 2 * row * k, h + (2 * row + 1) * k, y + row * k, k);
}

/* chosen[M][num_chosen] and weights[M][num_chosen] from logits[M][num]. */
void magnetar_route(const uint16_t *logits, long m, long num, long num_chosen, int64_t *chosen, float *weights) {
    for (long row = 0; row < m; row++)
        choose(logits + row * num, num, num_chosen, chosen + row * num_chosen, weights + row * num_chosen);
}
