/* NF4 weights unpacked (QLoRA, Dettmers et al. 2023, https://arxiv.org/abs/2305.14314): two numbers a byte, the first
   one in the high bits, and a scale for each block of numbers, itself in 8 bits where scales are quantised too.

   The 16 values of a block are scaled and rounded once; its numbers are then looked up among them, with AVX-512 32 at a
   time in bf16 and 16 in fp32, with AVX2 8 in fp32. Products are rounded before sums (-ffp-contract=off), so that the
   result is bit for bit that of the same operations one after the other. */

#include <omp.h>

#include "numbers.h"

#if defined(__AVX512BW__) || defined(__AVX2__)
#include <immintrin.h>
#endif

/* Vectors of 16 scaled values, and how many numbers are looked up at a time (0 where no instruction does that). An index
   takes its lowest bits from one half of a byte; those above, which may be of the other half, are ignored. */
#ifdef __AVX512BW__
typedef __m512i Table;

INLINE int64_t at_a_time(int kind) { return kind == FP32 ? 16 : 32; }

INLINE Table scaled(const float *values, float scale, int kind) {
    const __m512i bits = _mm512_castps_si512(_mm512_mul_ps(_mm512_loadu_ps(values), _mm512_set1_ps(scale)));
    if (kind == FP32) return bits;
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i nearest_even = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    return _mm512_broadcast_i64x4(_mm512_cvtepi32_epi16(_mm512_srli_epi32(nearest_even, 16)));
}

INLINE void look_up(const uint8_t *packed, Table table, void *out, int kind) {
    if (kind == FP32) {
        const __m512i byte = _mm512_cvtepu8_epi64(_mm_loadl_epi64((const __m128i *)packed));
        const __m512i index = _mm512_or_si512(_mm512_srli_epi64(byte, 4), _mm512_slli_epi64(byte, 32));
        _mm512_storeu_si512(out, _mm512_permutexvar_epi32(index, table));
    } else {
        const __m512i byte = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)packed));
        const __m512i index = _mm512_or_si512(_mm512_srli_epi32(byte, 4), _mm512_slli_epi32(byte, 16));
        _mm512_storeu_si512(out, _mm512_permutexvar_epi16(index, table));
    }
}
#elif defined(__AVX2__)
typedef struct {
    __m256 lower, upper;
} Table;

INLINE int64_t at_a_time(int kind) { return kind == FP32 ? 8 : 0; }

INLINE Table scaled(const float *values, float scale, int kind) {
    const __m256 factor = _mm256_set1_ps(scale);
    (void)kind;
    return (Table){_mm256_mul_ps(_mm256_loadu_ps(values), factor), _mm256_mul_ps(_mm256_loadu_ps(values + 8), factor)};
}

INLINE void look_up(const uint8_t *packed, Table table, void *out, int kind) {
    int32_t bytes;
    memcpy(&bytes, packed, 4);
    const __m256i byte = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(bytes));
    const __m256i index = _mm256_or_si256(_mm256_srli_epi64(byte, 4), _mm256_slli_epi64(byte, 32));
    const __m256 lower = _mm256_permutevar8x32_ps(table.lower, index);
    const __m256 upper = _mm256_permutevar8x32_ps(table.upper, index);
    _mm256_storeu_ps(out, _mm256_blendv_ps(lower, upper, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28))));
    (void)kind;
}
#else
typedef int Table;

INLINE int64_t at_a_time(int kind) { return (void)kind, 0; }
INLINE Table scaled(const float *values, float scale, int kind) { return (void)values, (void)scale, (void)kind, 0; }
INLINE void look_up(const uint8_t *packed, Table table, void *out, int kind) {
    (void)packed, (void)table, (void)out, (void)kind;
}
#endif

INLINE void unpack_block(const uint8_t *packed, const float *values, float scale, char *out, int64_t count, int kind) {
    const int64_t some = at_a_time(kind);
    const Table table = scaled(values, scale, kind);
    int64_t i = 0;
    if (some)
        for (; i + some <= count; i += some) look_up(packed + i / 2, table, out + bytes(i, 1, kind), kind);
    for (; i < count; i++) put(out, i, values[i % 2 ? packed[i / 2] & 15 : packed[i / 2] >> 4] * scale, kind);
}

/* out, [numbers]: values[code] * scale of the block of `size` numbers.

   codes: of the scales, which are scale_values[code] * scales[block / scale_size] + offset; NULL where `scales` holds the
   blocks' own. */
void unpack(const uint8_t *packed, const float *values, const uint8_t *codes, const float *scale_values,
            const float *scales, int64_t scale_size, float offset, char *out, int64_t numbers, int64_t size,
            int64_t kind, int64_t threads) {
    const int64_t blocks = (numbers + size - 1) / size;
    PARALLEL
    for (int64_t b = 0; b < blocks; b++) {
        const int64_t start = b * size, count = numbers - start < size ? numbers - start : size;
        const float scale = codes ? scale_values[codes[b]] * scales[b / scale_size] + offset : scales[b];
        BY_KIND(unpack_block, kind, packed + start / 2, values, scale, out + bytes(start, 1, kind), count);
    }
}
