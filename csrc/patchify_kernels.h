// Body of the kernels that every instruction set has alike, compiled once for each: patchify_<set>.cpp defines VRLT_SET
// and VRLT_VECTOR_BYTES. Uses the vector extensions of GCC and Clang.
#include <cmath>

#include "patchify_core.h"

namespace vrlt_patch {
namespace VRLT_SET {

constexpr int64_t LANES = VRLT_VECTOR_BYTES / 4;
constexpr int64_t PIXELS = LANES / 4;  // R G B 0 in fp32
typedef float Floats __attribute__((vector_size(VRLT_VECTOR_BYTES)));
typedef int32_t Ints __attribute__((vector_size(VRLT_VECTOR_BYTES)));
typedef float Pixel __attribute__((vector_size(16)));

static inline Floats load(const float* x) {
  Floats v;
  memcpy(&v, x, sizeof(v));
  return v;
}

// The sum of the pixels of a vector.
static inline Pixel fold(Floats v) {
  Pixel parts[PIXELS];
  memcpy(parts, &v, sizeof(v));
  Pixel sum = parts[0];
  for (int64_t i = 1; i < PIXELS; ++i) sum += parts[i];
  return sum;
}

static void horizontal_float(const Plan& plan, const uint8_t* row, float* scratch, float* to) {
  const int64_t source = plan.h.source, out = plan.h.out, groups = plan.h.groups;
  for (int64_t x = 0; x < source; ++x) {
    scratch[4 * x] = row[3 * x];
    scratch[4 * x + 1] = row[3 * x + 1];
    scratch[4 * x + 2] = row[3 * x + 2];
    scratch[4 * x + 3] = 0;
  }
  memset(scratch + 4 * source, 0, static_cast<size_t>(2 * PAD * PIXEL));
  const float* weights = reinterpret_cast<const float*>(plan.weights);
  for (int64_t x = 0; x < out; ++x) {
    const float* from = scratch + 4 * plan.base[x];
    Floats sum = {};
    for (int64_t g = 0; g < groups; ++g, from += LANES, weights += LANES) sum += load(from) * load(weights);
    const Pixel pixel = fold(sum);
    memcpy(to + 4 * x, &pixel, sizeof(pixel));
  }
}

// Half to even: adding this leaves no room for a fraction.
constexpr float TO_INTEGER = 12582912.0f;

static void vertical_float(const Plan& plan, int64_t y, const float* const* rows, uint8_t* planar, int64_t pixels) {
  const int64_t groups = plan.h.groups;
  const float* weights = reinterpret_cast<const float*>(plan.weights) + y * groups;
  for (int64_t x = 0; x < pixels; x += 16) {
    int32_t whole[64];
    for (int64_t at = 0; at < 64; at += LANES) {
      Floats sum = {};
      for (int64_t g = 0; g < groups; ++g) sum += load(rows[g] + 4 * x + at) * weights[g];
      const Floats top = 255.0f - Floats{};
      sum = sum > 0.0f ? sum : Floats{};
      sum = sum < top ? sum : top;
      const Ints rounded = (Ints)(sum + TO_INTEGER) & 0xff;
      memcpy(whole + at, &rounded, sizeof(rounded));
    }
    for (int64_t c = 0; c < 3; ++c)
      for (int64_t i = 0; i < 16; ++i) planar[c * pixels + x + i] = static_cast<uint8_t>(whole[4 * i + c]);
  }
}

static void normalise(const uint8_t* x, int64_t count, float mean, float deviation, void* to, bool bf16) {
  if (!bf16) {
    float* out = static_cast<float*>(to);
    for (int64_t i = 0; i < count; ++i) out[i] = (static_cast<float>(x[i]) - mean) / deviation;
    return;
  }
  uint16_t* out = static_cast<uint16_t*>(to);
  for (int64_t i = 0; i < count; ++i) {
    const float value = (static_cast<float>(x[i]) - mean) / deviation;
    uint32_t bits;
    memcpy(&bits, &value, 4);
    out[i] = static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
  }
}

static inline uint8_t level_of(int32_t x) {
  x >>= YUV_BITS;
  return static_cast<uint8_t>(x < 0 ? 0 : x > 255 ? 255 : x);
}

static void from_yuv(
    const uint8_t* y, const uint8_t* u, const uint8_t* v, int64_t count, const int32_t* factors, uint8_t* rgb) {
  const int32_t half = 1 << (YUV_BITS - 1);
  for (int64_t i = 0; i < count; ++i) {
    const int32_t base = (y[i] - factors[5]) * factors[0] + half, cu = u[i] - 128, cv = v[i] - 128;
    rgb[3 * i] = level_of(base + factors[1] * cv);
    rgb[3 * i + 1] = level_of(base + factors[2] * cu + factors[3] * cv);
    rgb[3 * i + 2] = level_of(base + factors[4] * cu);
  }
}

}  // namespace VRLT_SET
}  // namespace vrlt_patch
