/* Weights of a checkpoint, rounded and put into blocks while they are loaded. */
#include "kernels.h"

INLINE int most_level(int form) { return form == INT5 ? 31 : 15; }
/* The level that stands for the zero of a group. */
INLINE int middle_level(int form) { return form == INT5 ? 16 : 8; }

/* What one output's weights of a group are divided by, and around which value: exactly. */
typedef struct {
    float scale, zero;
} grid;

INLINE grid grid_of(int form, const uint16_t *w) {
    const __m512 low = widen(w), high = widen(w + 16);
    if (form == INT8) {
        const __m512 largest = _mm512_max_ps(_mm512_abs_ps(low), _mm512_abs_ps(high));
        return (grid){_mm512_reduce_max_ps(largest) / 127.0f, 0.0f};
    }
    const float least = _mm512_reduce_min_ps(_mm512_min_ps(low, high));
    const float scale = (_mm512_reduce_max_ps(_mm512_max_ps(low, high)) - least) / most_level(form);
    return (grid){scale, least + middle_level(form) * scale};
}

/* The float that all scales and zeros of one output are counted in. */
static float unit_of(int form, const uint16_t *w, long k) {
    float scale = 0.0f, zero = 0.0f;
    for (long first = 0; first < k; first += GROUP) {
        const grid g = grid_of(form, w + first);
        scale = g.scale > scale ? g.scale : scale;
        zero = __builtin_fabsf(g.zero) > zero ? __builtin_fabsf(g.zero) : zero;
    }
    const float by_scale = scale / 255.0f, by_zero = zero / (127.0f * ZERO_STEP);
    const float unit = by_scale > by_zero ? by_scale : by_zero;
    return unit > 0.0f ? unit : 1.0f;
}

INLINE __m128i to_levels(__m512 value, float zero, float scale, int shift, int least, int most) {
    const __m512 steps = _mm512_div_ps(_mm512_sub_ps(value, _mm512_set1_ps(zero)), _mm512_set1_ps(scale));
    const __m512i q = _mm512_add_epi32(_mm512_cvtps_epi32(steps), _mm512_set1_epi32(shift));
    return _mm512_cvtepi32_epi8(
        _mm512_max_epi32(_mm512_min_epi32(q, _mm512_set1_epi32(most)), _mm512_set1_epi32(least)));
}

/* 32 inputs of output o into its places in a group: quantise.py says what is rounded how. */
INLINE void put_int8(const uint16_t *w, float unit, uint8_t *group, int o) {
    float scale = __builtin_ceilf(grid_of(INT8, w).scale / unit);
    scale = scale > 255.0f ? 255.0f : scale;
    const float divisor = scale > 0.0f ? scale * unit : 1.0f;
    uint8_t q[GROUP];
    _mm_storeu_si128((__m128i *)q, to_levels(widen(w), 0.0f, divisor, 128, 1, 255));
    _mm_storeu_si128((__m128i *)(q + 16), to_levels(widen(w + 16), 0.0f, divisor, 128, 1, 255));
    for (int j = 0; j < GROUP; j += 4) memcpy(group + OUTPUTS * j + 4 * o, q + j, 4);
    group[GROUP * OUTPUTS + o] = (uint8_t)scale;
}

/* In 4 bits, or 5. */
INLINE void put_levels(int form, const uint16_t *w, float unit, uint8_t *group, int o) {
    const grid exact = grid_of(form, w);
    const int middle = middle_level(form), most = most_level(form);
    const float scale = __builtin_rintf(exact.scale / unit), zero_unit = ZERO_STEP * unit;
    const float zero = __builtin_rintf(exact.zero / zero_unit);
    const float divisor = scale > 0.0f ? scale * unit : 1.0f;
    uint32_t quads[GROUP / 4];
    _mm_storeu_si128((__m128i *)quads, to_levels(widen(w), zero * zero_unit, divisor, middle, 0, most));
    _mm_storeu_si128((__m128i *)(quads + 4), to_levels(widen(w + 16), zero * zero_unit, divisor, middle, 0, most));
    uint8_t *after = group + GROUP * OUTPUTS / 2;
    for (int j = 0; form == INT5 && j < GROUP; j++) {
        const uint8_t bit = quads[j / 4] >> 8 * (j % 4) >> 4 & 1;
        uint8_t *place = after + 16 * (j / 4) + o / 2, shift = 4 * (o % 2) + j % 4;
        *place = (*place & ~(1 << shift)) | bit << shift;
    }
    if (form == INT5) after += GROUP * OUTPUTS / 8;
    for (int j = 0; j < GROUP / 4; j++) {
        uint8_t *place = group + 2 * OUTPUTS * j + 4 * (o % 16);
        const uint32_t levels = quads[j] & 0x0f0f0f0f;
        uint32_t quad = 0;
        if (o >= 16) memcpy(&quad, place, 4);
        quad |= o < 16 ? levels : levels << 4;
        memcpy(place, &quad, 4);
    }
    after[o] = (uint8_t)scale;
    after[OUTPUTS + o] = (uint8_t)(int8_t)zero;
}

INLINE void put_output(int form, const uint16_t *w, uint8_t *block, int o, long k) {
    const float unit = unit_of(form, w, k);
    memcpy(block + 4 * o, &unit, 4);
    block += 4 * OUTPUTS;
    for (long first = 0; first < k; first += GROUP, block += group_bytes(form))
        if (form == INT8) put_int8(w + first, unit, block, o);
        else put_levels(form, w + first, unit, block, o);
}

/* From w[N][K] in bf16 to blocks, which must be zero where the last one has no outputs. */
void magnetar_lay_out(int form, const uint16_t *w, uint8_t *blocks, long n, long k, int num_threads) {
    const long count = (n + OUTPUTS - 1) / OUTPUTS, bytes = block_bytes(form, k);
#pragma omp parallel for schedule(static) num_threads(num_threads) if (num_threads > 1)
    for (long b = 0; b < count; b++) {
        uint8_t *block = blocks + b * bytes;
        const uint16_t *inputs = w + b * OUTPUTS * k;
        const long outputs = n - b * OUTPUTS < OUTPUTS ? n - b * OUTPUTS : OUTPUTS;
        for (int o = 0; form != BF16 && o < outputs; o++) put_output(form, inputs + o * k, block, o, k);
        for (long first = 0; form == BF16 && first < k; first += GROUP)
            for (int o = 0; o < outputs; o++)
                for (long j = first; j < first + GROUP && j < k; j += 2)
                    memcpy(block + 2 * OUTPUTS * j + 4 * o, inputs + o * k + j, 4);
    }
}
