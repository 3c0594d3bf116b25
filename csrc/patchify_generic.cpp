#define VRLT_SET generic
#define VRLT_VECTOR_BYTES 16
#include "patchify_kernels.h"

namespace vrlt_patch {
namespace generic {

extern const Functions functions;

static inline uint8_t level(int32_t sum, int64_t precision) {
  sum >>= precision;
  return static_cast<uint8_t>(sum < 0 ? 0 : sum > 255 ? 255 : sum);
}

static void horizontal(const Plan& plan, const uint8_t* const* rows, const uint8_t* const* tails, uint8_t* quad) {
  const int64_t taps = 4 * plan.h.groups;
  const int16_t* weights = reinterpret_cast<const int16_t*>(plan.weights);
  const int32_t half = (1 << plan.h.precision) >> 1;
  for (int64_t x = 0; x < plan.h.out; ++x, weights += taps)
    for (int64_t i = 0; i < 4; ++i) {
      const uint8_t* from = (x < plan.h.tail ? rows : tails)[i] + plan.base[x];
      int32_t sum[3] = {half, half, half};
      for (int64_t k = 0; k < taps; ++k)
        for (int64_t c = 0; c < 3; ++c) sum[c] += weights[k] * from[3 * k + c];
      for (int64_t c = 0; c < 3; ++c) quad[16 * x + 4 * c + i] = level(sum[c], plan.h.precision);
    }
}

static void vertical(const Plan& plan, int64_t y, const uint8_t* const* quads, uint8_t* planar, int64_t pixels) {
  const int64_t groups = plan.h.groups;
  const int16_t* weights = reinterpret_cast<const int16_t*>(plan.weights) + y * groups * 4;
  const int32_t half = (1 << plan.h.precision) >> 1;
  for (int64_t x = 0; x < pixels; ++x)
    for (int64_t c = 0; c < 3; ++c) {
      int32_t sum = half;
      for (int64_t g = 0; g < groups; ++g)
        for (int64_t k = 0; k < 4; ++k) sum += weights[4 * g + k] * quads[g][16 * x + 4 * c + k];
      planar[c * pixels + x] = level(sum, plan.h.precision);
    }
}

const Functions functions = {
    0, PIXELS, horizontal, vertical, horizontal_float, vertical_float, normalise, from_yuv,
};

}  // namespace generic
}  // namespace vrlt_patch
