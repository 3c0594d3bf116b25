// AVX-512 with VBMI and VNNI. A weight w = 256 high + low is two int8; four taps of 16 values are multiplied at once,
// exactly, after one byte permutation has brought them from anywhere in 64 bytes of a row to their lanes.
#define VRLT_SET vbmi
#define VRLT_VECTOR_BYTES 64
#include <immintrin.h>

#include "patchify_kernels.h"

namespace vrlt_patch {
namespace vbmi {

extern const Functions functions;

struct Sums {
  __m512i low, high;
};

static inline __m512i load64(const void* x) {
  return _mm512_loadu_si512(x);
}

static inline __m512i shifted(const Sums& s, __m128i shift) {
  return _mm512_sra_epi32(_mm512_add_epi32(s.low, _mm512_slli_epi32(s.high, 8)), shift);
}

// Four vectors of sums to bytes: in each 128 bits the four bytes of the first, of the second, ...
static inline __m512i bytes_of(const Sums* s, __m128i shift) {
  return _mm512_packus_epi16(
      _mm512_packs_epi32(shifted(s[0], shift), shifted(s[1], shift)),
      _mm512_packs_epi32(shifted(s[2], shift), shifted(s[3], shift)));
}

template <int64_t GROUPS>
static void horizontal_groups(
    const Plan& plan, const uint8_t* const* rows, const uint8_t* const* tails, uint8_t* quad) {
  const int64_t groups = GROUPS ? GROUPS : plan.h.groups;
  const __m512i half = _mm512_set1_epi32((1 << plan.h.precision) >> 1);
  const __m128i shift = _mm_cvtsi64_si128(plan.h.precision);
  const __m512i across = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  const int64_t step = PIXEL * plan.h.per_block;
  const __mmask16 used = static_cast<__mmask16>((1u << (4 * plan.h.per_block)) - 1);
  const char* weights = plan.weights;
  for (int64_t b = 0; b < plan.h.blocks; ++b) {
    const uint8_t* const* from = b < plan.h.tail ? rows : tails;
    const int64_t at = plan.base[b];
    const __m512i index = load64(plan.index + 64 * b);
    Sums sums[4];
    for (int64_t i = 0; i < 4; ++i) sums[i] = {half, _mm512_setzero_si512()};
    for (int64_t g = 0; g < groups; ++g, weights += 128) {
      const __m512i low = load64(weights), high = load64(weights + 64);
      for (int64_t i = 0; i < 4; ++i) {
        const __m512i values = _mm512_permutexvar_epi8(index, load64(from[i] + at + 12 * g));
        sums[i].low = _mm512_dpbusd_epi32(sums[i].low, values, low);
        sums[i].high = _mm512_dpbusd_epi32(sums[i].high, values, high);
      }
    }
    _mm512_mask_storeu_epi32(quad + step * b, used, _mm512_shuffle_epi8(bytes_of(sums, shift), across));
  }
}

static void horizontal(const Plan& plan, const uint8_t* const* rows, const uint8_t* const* tails, uint8_t* quad) {
  switch (plan.h.groups) {
    case 1:
      return horizontal_groups<1>(plan, rows, tails, quad);
    case 2:
      return horizontal_groups<2>(plan, rows, tails, quad);
    case 3:
      return horizontal_groups<3>(plan, rows, tails, quad);
    default:
      return horizontal_groups<0>(plan, rows, tails, quad);
  }
}

static inline __m512i four_weights(const char* weights) {
  int32_t all;
  memcpy(&all, weights, 4);
  return _mm512_set1_epi32(all);
}

template <int64_t GROUPS>
static void vertical_groups(
    const Plan& plan, int64_t y, const uint8_t* const* quads, uint8_t* planar, int64_t pixels) {
  const int64_t groups = GROUPS ? GROUPS : plan.h.groups;
  const char* weights = plan.weights + y * groups * 8;
  const __m512i half = _mm512_set1_epi32((1 << plan.h.precision) >> 1);
  const __m128i shift = _mm_cvtsi64_si128(plan.h.precision);
  // Byte 16 i + 4 k + c of the packed sums is channel c of pixel 4 k + i.
  alignas(64) uint8_t order[64];
  for (int c = 0; c < 4; ++c)
    for (int x = 0; x < 16; ++x) order[16 * c + x] = static_cast<uint8_t>(16 * (x % 4) + 4 * (x / 4) + c);
  const __m512i planes = load64(order);
  for (int64_t x = 0; x < pixels; x += 16) {
    Sums sums[4];
    for (int64_t i = 0; i < 4; ++i) sums[i] = {half, _mm512_setzero_si512()};
    for (int64_t g = 0; g < groups; ++g) {
      const __m512i low = four_weights(weights + 8 * g), high = four_weights(weights + 8 * g + 4);
      for (int64_t i = 0; i < 4; ++i) {
        const __m512i values = load64(quads[g] + 16 * x + 64 * i);
        sums[i].low = _mm512_dpbusd_epi32(sums[i].low, values, low);
        sums[i].high = _mm512_dpbusd_epi32(sums[i].high, values, high);
      }
    }
    const __m512i all = _mm512_permutexvar_epi8(planes, bytes_of(sums, shift));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(planar + x), _mm512_castsi512_si128(all));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(planar + pixels + x), _mm512_extracti32x4_epi32(all, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(planar + 2 * pixels + x), _mm512_extracti32x4_epi32(all, 2));
  }
}

static void vertical(const Plan& plan, int64_t y, const uint8_t* const* quads, uint8_t* planar, int64_t pixels) {
  switch (plan.h.groups) {
    case 1:
      return vertical_groups<1>(plan, y, quads, planar, pixels);
    case 2:
      return vertical_groups<2>(plan, y, quads, planar, pixels);
    case 3:
      return vertical_groups<3>(plan, y, quads, planar, pixels);
    default:
      return vertical_groups<0>(plan, y, quads, planar, pixels);
  }
}

const Functions functions = {
    52, PIXELS, horizontal, vertical, horizontal_float, vertical_float, normalise, from_yuv,
};

}  // namespace vbmi
}  // namespace vrlt_patch
