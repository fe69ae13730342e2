/* Weights of a checkpoint, rounded and put into blocks while they are loaded. */
#include "kernels.h"

/* 32 inputs of output o into its places in a group: quantise.py says what is rounded how. */
INLINE void put_int8(const uint16_t *w, uint8_t *group, int o) {
    __m512 low = widen(w), high = widen(w + 16);
    float largest = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(low), _mm512_abs_ps(high)));
    uint16_t scale = narrow(largest / 127.0f);
    __m512 divisor = _mm512_set1_ps(scale ? wide(scale) : 1.0f);
    const __m512i most = _mm512_set1_epi32(127), least = _mm512_set1_epi32(-127);
    __m512i a = _mm512_cvtps_epi32(_mm512_div_ps(low, divisor));
    __m512i b = _mm512_cvtps_epi32(_mm512_div_ps(high, divisor));
    uint8_t q[GROUP];
    _mm_storeu_si128((__m128i *)q, _mm512_cvtepi32_epi8(_mm512_max_epi32(_mm512_min_epi32(a, most), least)));
    _mm_storeu_si128((__m128i *)(q + 16), _mm512_cvtepi32_epi8(_mm512_max_epi32(_mm512_min_epi32(b, most), least)));
    for (int j = 0; j < GROUP / 2; j++) memcpy(group + 2 * OUTPUTS * j + 2 * o, q + 2 * j, 2);
    memcpy(group + GROUP * OUTPUTS + 2 * o, &scale, 2);
}

INLINE __m128i to_nibble(__m512 value, __m512 zero, __m512 divisor) {
    __m512 level = _mm512_add_ps(_mm512_div_ps(_mm512_sub_ps(value, zero), divisor), _mm512_set1_ps(8.0f));
    __m512i q = _mm512_cvtps_epi32(level);
    q = _mm512_max_epi32(_mm512_min_epi32(q, _mm512_set1_epi32(15)), _mm512_setzero_si512());
    return _mm512_cvtepi32_epi8(q);
}

INLINE void put_int4(const uint16_t *w, uint8_t *group, int o) {
    __m512 low = widen(w), high = widen(w + 16);
    float least = _mm512_reduce_min_ps(_mm512_min_ps(low, high));
    float largest = _mm512_reduce_max_ps(_mm512_max_ps(low, high));
    uint16_t scale = narrow((largest - least) / 15.0f);
    uint16_t zero = narrow(least + 8.0f * wide(scale));
    __m512 divisor = _mm512_set1_ps(scale ? wide(scale) : 1.0f), zeros = _mm512_set1_ps(wide(zero));
    uint8_t q[GROUP];
    _mm_storeu_si128((__m128i *)q, to_nibble(low, zeros, divisor));
    _mm_storeu_si128((__m128i *)(q + 16), to_nibble(high, zeros, divisor));
    uint8_t *pairs = group + 2 * (o % 16);
    for (int j = 0; j < GROUP; j++) {
        uint8_t *place = pairs + OUTPUTS * (j / 2) + j % 2;
        *place = o < 16 ? q[j] : *place | q[j] << 4;
    }
    uint8_t *scales = group + GROUP * OUTPUTS / 2;
    memcpy(scales + 2 * o, &scale, 2);
    memcpy(scales + 2 * OUTPUTS + 2 * o, &zero, 2);
}

/* From w[N][K] in bf16 to blocks, which must be zero where the last one has no outputs. */
void magnetar_lay_out(int form, const uint16_t *w, uint8_t *blocks, long n, long k, int num_threads) {
    const long count = (n + OUTPUTS - 1) / OUTPUTS, bytes = block_bytes(form, k);
#pragma omp parallel for schedule(static) num_threads(num_threads) if (num_threads > 1)
    for (long b = 0; b < count; b++) {
        uint8_t *block = blocks + b * bytes;
        for (long first = 0; first < k; first += GROUP)
            for (int o = 0; o < OUTPUTS && b * OUTPUTS + o < n; o++) {
                const uint16_t *inputs = w + (b * OUTPUTS + o) * k + first;
                if (form == INT8) put_int8(inputs, block + first / GROUP * INT8_GROUP_BYTES, o);
                else if (form == INT4) put_int4(inputs, block + first / GROUP * INT4_GROUP_BYTES, o);
                else
                    for (long j = 0; j < GROUP && first + j < k; j += 2)
                        memcpy(block + 2 * OUTPUTS * (first + j) + 4 * o, inputs + j, 4);
            }
    }
}
