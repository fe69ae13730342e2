/* Products of few or many rows with a matrix held in blocks of 32 outputs.
 *
 * A block holds, for every pair of inputs, the pair of each of its 32 outputs: what two registers of
 * AVX512-BF16 dot products take. It is read once from front to back, so that with few rows the
 * product runs at the speed of memory. In 8 and 4 bits the pairs of 32 inputs are followed by the
 * scales of the 32 outputs (and their zeros) in bf16.
 *
 * Every row is summed in the same order however many there are beside it.
 *
 * y[M][N] = x[M][K] * w[N][K]^T, all in bf16; K even, in 8 and 4 bits a multiple of 32.
 */
#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define OUTPUTS 32
#define GROUP 32
#define TILE 8
#define INT8_GROUP_BYTES (GROUP * OUTPUTS + 2 * OUTPUTS)
#define INT4_GROUP_BYTES (GROUP * OUTPUTS / 2 + 4 * OUTPUTS)
#define INLINE static inline __attribute__((always_inline))

enum { BF16 = 0, INT8 = 1, INT4 = 2 };

/* Two inputs, for every output of a register. */
INLINE __m512bh pair(const uint16_t *x) {
    int32_t both;
    memcpy(&both, x, 4);
    return (__m512bh)_mm512_set1_epi32(both);
}

INLINE __m512 widen(const uint8_t *p) {
    __m256i half = _mm256_loadu_si256((const __m256i *)p);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

INLINE void put(uint16_t *y, long num, __m512 low, __m512 high) {
    uint16_t both[OUTPUTS];
    _mm256_storeu_si256((__m256i *)both, (__m256i)_mm512_cvtneps_pbh(low));
    _mm256_storeu_si256((__m256i *)(both + 16), (__m256i)_mm512_cvtneps_pbh(high));
    memcpy(y, both, 2 * (num < OUTPUTS ? num : OUTPUTS));
}

/* -8 to 7 in bf16, twice: the fifth bit of an index does not matter. */
INLINE __m512i nibble_table(void) {
    uint16_t table[32];
    for (int i = 0; i < 32; i++) {
        float level = (float)(i % 16 - 8);
        uint32_t bits;
        memcpy(&bits, &level, 4);
        table[i] = bits >> 16;
    }
    return _mm512_loadu_si512(table);
}

INLINE void tile_bf16(const uint8_t *w, const uint16_t *x, long k, uint16_t *y, long n, long num, const int m) {
    __m512 low[TILE], high[TILE];
    for (int i = 0; i < m; i++) low[i] = high[i] = _mm512_setzero_ps();
    for (long j = 0; j < k; j += 2, w += 4 * OUTPUTS) {
        _mm_prefetch((const char *)w + 2048, _MM_HINT_T0);
        _mm_prefetch((const char *)w + 2112, _MM_HINT_T0);
        __m512bh a = (__m512bh)_mm512_loadu_si512(w), b = (__m512bh)_mm512_loadu_si512(w + 64);
        for (int i = 0; i < m; i++) {
            __m512bh p = pair(x + i * k + j);
            low[i] = _mm512_dpbf16_ps(low[i], a, p);
            high[i] = _mm512_dpbf16_ps(high[i], b, p);
        }
    }
    for (int i = 0; i < m; i++) put(y + i * n, num, low[i], high[i]);
}

/* 32 bytes as 32 bf16, exactly. */
INLINE __m512bh levels(const uint8_t *p) {
    __m512i low = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p));
    __m512i high = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(p + 16)));
    return _mm512_cvtne2ps_pbh(_mm512_cvtepi32_ps(high), _mm512_cvtepi32_ps(low));
}

INLINE void tile_int8(const uint8_t *w, const uint16_t *x, long k, uint16_t *y, long n, long num, const int m) {
    __m512 low[TILE], high[TILE];
    for (int i = 0; i < m; i++) low[i] = high[i] = _mm512_setzero_ps();
    for (long g = 0; g < k; g += GROUP, w += INT8_GROUP_BYTES) {
        __m512 gl[TILE], gh[TILE];
        for (int i = 0; i < m; i++) gl[i] = gh[i] = _mm512_setzero_ps();
        for (int j = 0; j < GROUP; j += 2) {
            _mm_prefetch((const char *)w + 2 * INT8_GROUP_BYTES + 32 * j, _MM_HINT_T0);
            __m512bh a = levels(w + 32 * j), b = levels(w + 32 * j + 32);
            for (int i = 0; i < m; i++) {
                __m512bh p = pair(x + i * k + g + j);
                gl[i] = _mm512_dpbf16_ps(gl[i], a, p);
                gh[i] = _mm512_dpbf16_ps(gh[i], b, p);
            }
        }
        const uint8_t *scales = w + GROUP * OUTPUTS;
        for (int i = 0; i < m; i++) {
            low[i] = _mm512_fmadd_ps(gl[i], widen(scales), low[i]);
            high[i] = _mm512_fmadd_ps(gh[i], widen(scales + 32), high[i]);
        }
    }
    for (int i = 0; i < m; i++) put(y + i * n, num, low[i], high[i]);
}

/* sums[M][K / GROUP] are the sums of the inputs of every group. */
INLINE void tile_int4(const uint8_t *w, const uint16_t *x, const float *sums, long k, uint16_t *y, long n,
                      long num, const int m) {
    const __m512i table = nibble_table();
    __m512 low[TILE], high[TILE];
    for (int i = 0; i < m; i++) low[i] = high[i] = _mm512_setzero_ps();
    for (long g = 0; g < k / GROUP; g++, w += INT4_GROUP_BYTES) {
        __m512 gl[TILE], gh[TILE];
        for (int i = 0; i < m; i++) gl[i] = gh[i] = _mm512_setzero_ps();
        for (int j = 0; j < GROUP / 2; j++) {
            _mm_prefetch((const char *)w + 3 * INT4_GROUP_BYTES + 40 * j, _MM_HINT_T0);
            /* The low halves are of the first 16 outputs. An index is the low five bits of 16. */
            __m512i bytes = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)(w + 32 * j)));
            __m512bh a = (__m512bh)_mm512_permutexvar_epi16(bytes, table);
            __m512bh b = (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(bytes, 4), table);
            for (int i = 0; i < m; i++) {
                __m512bh p = pair(x + i * k + g * GROUP + 2 * j);
                gl[i] = _mm512_dpbf16_ps(gl[i], a, p);
                gh[i] = _mm512_dpbf16_ps(gh[i], b, p);
            }
        }
        const uint8_t *scales = w + GROUP * OUTPUTS / 2, *zeros = scales + 2 * OUTPUTS;
        for (int i = 0; i < m; i++) {
            __m512 sum = _mm512_set1_ps(sums[i * (k / GROUP) + g]);
            low[i] = _mm512_fmadd_ps(sum, widen(zeros), _mm512_fmadd_ps(gl[i], widen(scales), low[i]));
            high[i] = _mm512_fmadd_ps(sum, widen(zeros + 32), _mm512_fmadd_ps(gh[i], widen(scales + 32), high[i]));
        }
    }
    for (int i = 0; i < m; i++) put(y + i * n, num, low[i], high[i]);
}

INLINE void tile(int form, const uint8_t *w, const uint16_t *x, const float *sums, long k, uint16_t *y, long n,
                 long num, const int m) {
    if (form == BF16) tile_bf16(w, x, k, y, n, num, m);
    else if (form == INT8) tile_int8(w, x, k, y, n, num, m);
    else tile_int4(w, x, sums, k, y, n, num, m);
}

static void tiles(int form, const uint8_t *w, const uint16_t *x, const float *sums, long k, uint16_t *y, long n,
                  long num, long m) {
    for (; m > 0; m -= TILE, x += TILE * k, y += TILE * n, sums += TILE * (k / GROUP)) {
        switch (m) {
        case 1: tile(form, w, x, sums, k, y, n, num, 1); break;
        case 2: tile(form, w, x, sums, k, y, n, num, 2); break;
        case 3: tile(form, w, x, sums, k, y, n, num, 3); break;
        case 4: tile(form, w, x, sums, k, y, n, num, 4); break;
        case 5: tile(form, w, x, sums, k, y, n, num, 5); break;
        case 6: tile(form, w, x, sums, k, y, n, num, 6); break;
        case 7: tile(form, w, x, sums, k, y, n, num, 7); break;
        default: tile(form, w, x, sums, k, y, n, num, 8); break;
        }
    }
}

static void sum_groups(const uint16_t *x, long num_groups, float *sums) {
    for (long g = 0; g < num_groups; g++) {
        float sum = 0;
        for (int i = 0; i < GROUP; i++) {
            uint32_t bits = (uint32_t)x[g * GROUP + i] << 16;
            float value;
            memcpy(&value, &bits, 4);
            sum += value;
        }
        sums[g] = sum;
    }
}

static long block_bytes(int form, long k) {
    if (form == BF16) return k * OUTPUTS * 2;
    return k / GROUP * (form == INT8 ? INT8_GROUP_BYTES : INT4_GROUP_BYTES);
}

/* form: 0 bf16, 1 int8, 2 int4. Returns 0, or 1 when there is no memory for the sums. */
int magnetar_multiply(int form, const uint8_t *w, const uint16_t *x, uint16_t *y, long m, long n, long k,
                      int num_threads) {
    float few[1024], *sums = few;
    if (form == INT4) {
        long num = m * (k / GROUP);
        if (num > 1024 && !(sums = malloc(num * sizeof(float)))) return 1;
        sum_groups(x, num, sums);
    }
    const long blocks = (n + OUTPUTS - 1) / OUTPUTS, bytes = block_bytes(form, k);
#pragma omp parallel for schedule(static) num_threads(num_threads) if (num_threads > 1)
    for (long b = 0; b < blocks; b++)
        tiles(form, w + b * bytes, x, sums, k, y + b * OUTPUTS, n, n - b * OUTPUTS, m);
    if (sums != few) free(sums);
    return 0;
}

static uint16_t narrow(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

static float wide(uint16_t value) {
    uint32_t bits = (uint32_t)value << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

/* 32 inputs of output o into its places in a group: quantise.py says what is rounded how. */
INLINE void put_int8(const uint16_t *w, uint8_t *group, int o) {
    __m512 low = widen((const uint8_t *)w), high = widen((const uint8_t *)(w + 16));
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
    __m512 low = widen((const uint8_t *)w), high = widen((const uint8_t *)(w + 16));
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
    const long num_blocks = (n + OUTPUTS - 1) / OUTPUTS, bytes = block_bytes(form, k);
#pragma omp parallel for schedule(static) num_threads(num_threads) if (num_threads > 1)
    for (long b = 0; b < num_blocks; b++) {
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

/* y = x / sqrt(mean(x^2) + eps) * weight for every row, in fp32 and rounded once; k a multiple of 16. */
void magnetar_rms_norm(const uint16_t *x, const uint16_t *weight, uint16_t *y, long m, long k, float eps,
                       int num_threads) {
#pragma omp parallel for schedule(static) num_threads(num_threads) if (num_threads > 1 && m > 16)
    for (long row = 0; row < m; row++) {
        const uint16_t *in = x + row * k;
        __m512 sum = _mm512_setzero_ps();
        for (long j = 0; j < k; j += 16) {
            __m512 value = widen((const uint8_t *)(in + j));
            sum = _mm512_fmadd_ps(value, value, sum);
        }
        __m512 factor = _mm512_set1_ps(1.0f / __builtin_sqrtf(_mm512_reduce_add_ps(sum) / k + eps));
        for (long j = 0; j < k; j += 16) {
            __m512 value = _mm512_mul_ps(widen((const uint8_t *)(in + j)), factor);
            value = _mm512_mul_ps(value, widen((const uint8_t *)(weight + j)));
            _mm256_storeu_si256((__m256i *)(y + row * k + j), (__m256i)_mm512_cvtneps_pbh(value));
        }
    }
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

/* y[M][K] = silu(h[M][:K]) * h[M][K:], in fp32 and rounded once; k a multiple of 16. */
void magnetar_gated(const uint16_t *h, uint16_t *y, long m, long k, int num_threads) {
    const __m512 one = _mm512_set1_ps(1.0f);
#pragma omp parallel for schedule(static) num_threads(num_threads) if (num_threads > 1 && m > 16)
    for (long row = 0; row < m; row++) {
        const uint16_t *gates = h + 2 * row * k;
        for (long j = 0; j < k; j += 16) {
            __m512 gate = widen((const uint8_t *)(gates + j)), up = widen((const uint8_t *)(gates + k + j));
            __m512 below = _mm512_add_ps(one, exponential(_mm512_sub_ps(_mm512_setzero_ps(), gate)));
            __m512 value = _mm512_mul_ps(_mm512_div_ps(gate, below), up);
            _mm256_storeu_si256((__m256i *)(y + row * k + j), (__m256i)_mm512_cvtneps_pbh(value));
        }
    }
}
