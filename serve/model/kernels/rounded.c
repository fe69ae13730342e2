/* The product of a matrix in 8, 5 or 4 bits, with whole numbers as long as a group of inputs goes on.
 *
 * Inputs are rounded too: 32 of a row to 255 levels with a scale of their own. Products and sums of a
 * group are then exact, and only what the scales make of them is rounded, in fp32.
 */
#include "kernels.h"

#define QUADS (GROUP / 4)
/* Of a group and a row: the inputs, their scale, where the sum of products begins, and but for 8 bits what
 * the zero of the weights is multiplied with. */
#define INT8_WORDS (QUADS + 2)
#define ZERO_WORDS (QUADS + 3)

long rounded_words(int form) { return form == INT8 ? INT8_WORDS : ZERO_WORDS; }

/* 32 inputs of a row; neighbouring words of it lie `rows` apart. What is not a finite number makes a
 * scale that is none. */
INLINE void round_inputs(int form, const uint16_t *x, uint32_t *to, int rows) {
    const __m512 low = widen(x), high = widen(x + 16), nothing = _mm512_setzero_ps();
    const float largest = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(low), _mm512_abs_ps(high)));
    const float poison = _mm512_reduce_add_ps(_mm512_fmadd_ps(low, nothing, _mm512_mul_ps(high, nothing)));
    const float scale = largest / 127.0f + poison;
    const __m512 divisor = _mm512_set1_ps(scale > 0 ? scale : 1.0f);
    const __m512i a = _mm512_cvtps_epi32(_mm512_div_ps(low, divisor));
    const __m512i b = _mm512_cvtps_epi32(_mm512_div_ps(high, divisor));
    const int32_t sum = _mm512_reduce_add_epi32(_mm512_add_epi32(a, b));
    const int32_t begin = (form == INT8 ? -128 : form == INT5 ? -16 : -8) * sum;
    const float for_zero = ZERO_STEP * scale * (float)sum;
    uint32_t quads[QUADS];
    _mm_storeu_si128((__m128i *)quads, _mm512_cvtsepi32_epi8(a));
    _mm_storeu_si128((__m128i *)(quads + QUADS / 2), _mm512_cvtsepi32_epi8(b));
    for (int j = 0; j < QUADS; j++) to[j * rows] = quads[j];
    memcpy(to + QUADS * rows, &scale, 4);
    memcpy(to + (QUADS + 1) * rows, &begin, 4);
    if (form != INT8) memcpy(to + (QUADS + 2) * rows, &for_zero, 4);
}

void fill_rounded(tile *t, const matrix *w, const uint16_t *const *rows, float *floats) {
    uint32_t *to = (uint32_t *)floats;
    t->inputs = to;
    for (long g = 0; g < w->k / GROUP; g++, to += rounded_words(w->form) * t->rows)
        for (int i = 0; i < t->rows; i++) round_inputs(w->form, rows[i] + g * GROUP, to + i, t->rows);
}

INLINE __m512 wide_scales(const uint8_t *p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p)));
}

INLINE __m512 wide_zeros(const uint8_t *p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
}

INLINE __m512 all(const uint32_t *word) {
    float value;
    memcpy(&value, word, 4);
    return _mm512_set1_ps(value);
}

INLINE __mmask64 mask_of(const uint8_t *p) {
    uint64_t bits;
    memcpy(&bits, p, 8);
    return bits;
}

INLINE void times(const int form, const uint8_t *w, const uint32_t *x, long num_groups, uint16_t *y, long stride,
                  long num, const int m) {
    const __m512 of_low = _mm512_loadu_ps(w), of_high = _mm512_loadu_ps(w + 64);
    const __m512i four = _mm512_set1_epi8(15), fifth = _mm512_set1_epi8(16);
    const int quad_bytes = form == INT8 ? 4 * OUTPUTS : 2 * OUTPUTS;
    const int words = form == INT8 ? INT8_WORDS : ZERO_WORDS;
    const uint8_t *bits = w + 4 * OUTPUTS + QUADS * quad_bytes;
    __m512 low[MOST_ROUNDED_ROWS], high[MOST_ROUNDED_ROWS];
    for (int i = 0; i < m; i++) low[i] = high[i] = _mm512_setzero_ps();
    w += 4 * OUTPUTS;
    for (long g = 0; g < num_groups; g++, w += group_bytes(form), bits += group_bytes(form), x += words * m) {
        __m512i gl[MOST_ROUNDED_ROWS], gh[MOST_ROUNDED_ROWS];
        for (int i = 0; i < m; i++) gl[i] = gh[i] = _mm512_set1_epi32((int)x[(QUADS + 1) * m + i]);
        for (int j = 0; j < QUADS; j++) {
            const uint8_t *quad = w + j * quad_bytes;
            /* Where reading is the limit the processor fetches ahead by itself, and faster than when told. */
            if (form != INT8 && m > FEW_INT4) _mm_prefetch((const char *)quad + AHEAD, _MM_HINT_T0);
            const __m512i first = _mm512_loadu_si512(quad);
            __m512i a = form == INT8 ? first : _mm512_and_si512(first, four);
            __m512i b = form == INT8 ? _mm512_loadu_si512(quad + 64)
                                     : _mm512_and_si512(_mm512_srli_epi16(first, 4), four);
            if (form == INT5) {
                a = _mm512_mask_add_epi8(a, mask_of(bits + 16 * j), a, fifth);
                b = _mm512_mask_add_epi8(b, mask_of(bits + 16 * j + 8), b, fifth);
            }
            for (int i = 0; i < m; i++) {
                const __m512i p = _mm512_set1_epi32((int)x[j * m + i]);
                gl[i] = _mm512_dpbusd_epi32(gl[i], a, p);
                gh[i] = _mm512_dpbusd_epi32(gh[i], b, p);
            }
        }
        const uint8_t *scales = bits + (form == INT5 ? GROUP * OUTPUTS / 8 : 0), *zeros = scales + OUTPUTS;
        const __m512 sl = wide_scales(scales), sh = wide_scales(scales + 16);
        for (int i = 0; i < m; i++) {
            const __m512 scale = all(x + QUADS * m + i);
            low[i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(gl[i]), _mm512_mul_ps(sl, scale), low[i]);
            high[i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(gh[i]), _mm512_mul_ps(sh, scale), high[i]);
        }
        if (form == INT8) continue;
        const __m512 zl = wide_zeros(zeros), zh = wide_zeros(zeros + 16);
        for (int i = 0; i < m; i++) {
            const __m512 factor = all(x + (QUADS + 2) * m + i);
            low[i] = _mm512_fmadd_ps(zl, factor, low[i]);
            high[i] = _mm512_fmadd_ps(zh, factor, high[i]);
        }
    }
    for (int i = 0; i < m; i++)
        put(y + i * stride, num, _mm512_mul_ps(low[i], of_low), _mm512_mul_ps(high[i], of_high));
}

void multiply_rounded(const matrix *w, long block, const tile *x, uint16_t *y, long stride) {
    const uint8_t *from = w->blocks + block * block_bytes(w->form, w->k);
    const long num = w->n - block * OUTPUTS, num_groups = w->k / GROUP;
#define TIMES(m)                                                                                                  \
    if (m > MOST_ROUNDED_ROWS) __builtin_unreachable();                                                           \
    else if (w->form == INT8) times(INT8, from, x->inputs, num_groups, y, stride, num, m);                        \
    else if (w->form == INT5) times(INT5, from, x->inputs, num_groups, y, stride, num, m);                        \
    else times(INT4, from, x->inputs, num_groups, y, stride, num, m)
    WITH_ROWS(x->rows, TIMES)
#undef TIMES
}
