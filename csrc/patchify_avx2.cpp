// int16 weights, two taps a multiplication.
#define VRLT_SET avx2
#define VRLT_VECTOR_BYTES 32
#include <immintrin.h>

#include "patchify_kernels.h"

namespace vrlt_patch {
namespace avx2 {

extern const Functions functions;

static inline __m256i two_rows(const uint8_t* a, const uint8_t* b) {
  const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(a));
  return _mm256_inserti128_si256(
      _mm256_castsi128_si256(low), _mm_loadu_si128(reinterpret_cast<const __m128i*>(b)), 1);
}

static inline __m256i pair(const int16_t* weights) {
  int32_t both;
  memcpy(&both, weights, 4);
  return _mm256_set1_epi32(both);
}

static void horizontal(const Plan& plan, const uint8_t* const* rows, const uint8_t* const* tails, uint8_t* quad) {
  // Of 4 packed pixels the first two, and the last two, as pairs of int16: R0 R1 G0 G1 B0 B1 0 0.
  const __m256i first = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(0, -1, 3, -1, 1, -1, 4, -1, 2, -1, 5, -1, -1, -1, -1, -1));
  const __m256i second = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(6, -1, 9, -1, 7, -1, 10, -1, 8, -1, 11, -1, -1, -1, -1, -1));
  const __m256i half = _mm256_set1_epi32((1 << plan.h.precision) >> 1);
  const __m128i shift = _mm_cvtsi64_si128(plan.h.precision);
  const int64_t groups = plan.h.groups;
  const int16_t* weights = reinterpret_cast<const int16_t*>(plan.weights);
  for (int64_t x = 0; x < plan.h.out; ++x) {
    const uint8_t* const* from = x < plan.h.tail ? rows : tails;
    const int64_t at = plan.base[x];
    __m256i a = half, b = half;  // rows 0 and 1, rows 2 and 3
    for (int64_t g = 0; g < groups; ++g, weights += 4) {
      const __m256i left = pair(weights), right = pair(weights + 2);
      const __m256i p = two_rows(from[0] + at + 12 * g, from[1] + at + 12 * g);
      const __m256i q = two_rows(from[2] + at + 12 * g, from[3] + at + 12 * g);
      a = _mm256_add_epi32(a, _mm256_madd_epi16(_mm256_shuffle_epi8(p, first), left));
      a = _mm256_add_epi32(a, _mm256_madd_epi16(_mm256_shuffle_epi8(p, second), right));
      b = _mm256_add_epi32(b, _mm256_madd_epi16(_mm256_shuffle_epi8(q, first), left));
      b = _mm256_add_epi32(b, _mm256_madd_epi16(_mm256_shuffle_epi8(q, second), right));
    }
    const __m256i words = _mm256_packs_epi32(_mm256_sra_epi32(a, shift), _mm256_sra_epi32(b, shift));
    const __m256i bytes = _mm256_packus_epi16(words, words);  // rows 0 and 2, rows 1 and 3
    const __m128i mixed = _mm_unpacklo_epi8(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1));
    _mm_storeu_si128(
        reinterpret_cast<__m128i*>(quad + 16 * x), _mm_unpacklo_epi16(mixed, _mm_unpackhi_epi64(mixed, mixed)));
  }
}

// Sums of one pixel over the quads, two a value.
static inline __m256i pixel_sums(const uint8_t* const* quads, int64_t at, const int16_t* weights, int64_t groups) {
  __m256i sum = _mm256_setzero_si256();
  for (int64_t g = 0; g < groups; ++g) {
    int64_t four;
    memcpy(&four, weights + 4 * g, 8);
    const __m256i values = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(quads[g] + at)));
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(values, _mm256_set1_epi64x(four)));
  }
  return sum;
}

static void vertical(const Plan& plan, int64_t y, const uint8_t* const* quads, uint8_t* planar, int64_t pixels) {
  const int64_t groups = plan.h.groups;
  const int16_t* weights = reinterpret_cast<const int16_t*>(plan.weights) + y * groups * 4;
  const __m256i half = _mm256_set1_epi32((1 << plan.h.precision) >> 1);
  const __m128i shift = _mm_cvtsi64_si128(plan.h.precision);
  const __m128i apart = _mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
  for (int64_t x = 0; x < pixels; x += 8) {
    __m256i pairs[4];  // of pixels: R G of both in the low half, B and nothing in the high one
    for (int64_t i = 0; i < 4; ++i) {
      const __m256i one = pixel_sums(quads, 16 * (x + 2 * i), weights, groups);
      const __m256i two = pixel_sums(quads, 16 * (x + 2 * i + 1), weights, groups);
      pairs[i] = _mm256_sra_epi32(_mm256_add_epi32(_mm256_hadd_epi32(one, two), half), shift);
    }
    const __m256i bytes =
        _mm256_packus_epi16(_mm256_packs_epi32(pairs[0], pairs[1]), _mm256_packs_epi32(pairs[2], pairs[3]));
    const __m128i rg = _mm_shuffle_epi8(_mm256_castsi256_si128(bytes), apart);
    const __m128i b = _mm_shuffle_epi8(_mm256_extracti128_si256(bytes, 1), apart);
    _mm_storel_epi64(reinterpret_cast<__m128i*>(planar + x), rg);
    _mm_storel_epi64(reinterpret_cast<__m128i*>(planar + pixels + x), _mm_unpackhi_epi64(rg, rg));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(planar + 2 * pixels + x), b);
  }
}

const Functions functions = {
    4, PIXELS, horizontal, vertical, horizontal_float, vertical_float, normalise, from_yuv,
};

}  // namespace avx2
}  // namespace vrlt_patch
