// Plans of patchify: weights in the order in which the kernels of an instruction set read them.
#include <algorithm>
#include <vector>

#include "patchify_core.h"

namespace vrlt_patch {

namespace {

// The axis with its weights shifted so that `low` never decreases and low + taps never passes the source.
struct Shifted {
  std::vector<int32_t> low;
  int64_t taps;

  Shifted(const Axis& axis, int64_t unit) : low(axis.low, axis.low + axis.out), taps(0) {
    for (int64_t i = axis.out - 1; i-- > 0;) low[i] = std::min(low[i], low[i + 1]);
    const int64_t units = (axis.source + unit - 1) / unit;
    for (int64_t i = 0; i < axis.out; ++i) {
      low[i] /= unit;
      taps = std::max<int64_t>(taps, (axis.end[i] - 1) / unit + 1 - low[i]);
    }
    for (auto& at : low) at = std::min<int32_t>(at, static_cast<int32_t>(units - taps));
  }
};

template <typename T>
T weight(const Axis& axis, int64_t out, int64_t pixel) {
  if (pixel < axis.low[out] || pixel >= axis.end[out]) return T(0);
  return static_cast<const T*>(axis.weights)[out * axis.taps + pixel - axis.low[out]];
}

int64_t up(int64_t value, int64_t unit) {
  return (value + unit - 1) / unit * unit;
}

// Bytes of two's complement: w = 256 * high + low, both within int8. A weight above 32639 has no such pair.
void split(int16_t w, int8_t* low, int8_t* high) {
  *low = static_cast<int8_t>(w & 0xff);
  *high = static_cast<int8_t>((w - *low) >> 8);
}

bool splits(const Axis& axis) {
  const int16_t* w = static_cast<const int16_t*>(axis.weights);
  return std::all_of(w, w + axis.out * axis.taps, [](int16_t x) { return x <= 32639; });
}

// Outputs of a block whose taps of one step lie within 64 bytes.
int64_t block_of(const Axis& axis) {
  for (const int64_t n : {4, 2}) {
    bool fits = true;
    for (int64_t b = 0; b < axis.out; b += n) {
      const auto [least, most] = std::minmax_element(axis.low + b, axis.low + std::min(b + n, axis.out));
      fits = fits && 3 * (*most - *least) + 12 <= 64;
    }
    if (fits) return n;
  }
  return 1;
}

int64_t weight_bytes(const Header& h, int64_t pixels) {
  const bool vbmi = h.level == static_cast<int64_t>(Level::vbmi);
  if (!h.fixed) return h.blocks * h.groups * (h.vertical ? 4 : 16 * pixels);
  if (h.vertical) return h.blocks * h.groups * 8;
  return h.blocks * h.groups * (vbmi ? 128 : 8);
}

Header header_of(const Axis& axis, bool vertical, Level level) {
  const Functions& kernels = *functions_for(level);
  Header h = {};
  h.magic = MAGIC, h.level = static_cast<int64_t>(level), h.fixed = axis.fixed, h.vertical = vertical;
  h.source = axis.source, h.out = axis.out, h.precision = axis.precision, h.per_block = 1;
  const bool vbmi = level == Level::vbmi;
  if (vertical) {
    h.groups = Shifted(axis, axis.fixed ? 4 : 1).taps;
  } else if (axis.fixed) {
    h.groups = (axis.taps + 3) / 4;
    if (vbmi) h.per_block = block_of(axis);
  } else {
    h.groups = (axis.taps + kernels.pixels - 1) / kernels.pixels;
  }
  h.blocks = (axis.out + h.per_block - 1) / h.per_block;
  h.index_at = up(sizeof(Header) + h.blocks * 4, 64);
  h.weights_at = h.index_at + (vbmi && axis.fixed && !vertical ? h.blocks * 64 : 0);
  h.bytes = up(h.weights_at + weight_bytes(h, kernels.pixels), 64);
  return h;
}

void fill_vertical(const Axis& axis, const Header& h, int32_t* base, char* weights) {
  const Shifted shifted(axis, axis.fixed ? 4 : 1);
  std::copy(shifted.low.begin(), shifted.low.end(), base);
  for (int64_t y = 0; y < h.out; ++y)
    for (int64_t g = 0; g < h.groups; ++g) {
      if (!axis.fixed) {
        reinterpret_cast<float*>(weights)[y * h.groups + g] = weight<float>(axis, y, base[y] + g);
        continue;
      }
      char* at = weights + (y * h.groups + g) * 8;
      for (int64_t k = 0; k < 4; ++k) {
        const int16_t w = weight<int16_t>(axis, y, 4 * (base[y] + g) + k);
        if (h.level == static_cast<int64_t>(Level::vbmi))
          split(w, reinterpret_cast<int8_t*>(at) + k, reinterpret_cast<int8_t*>(at) + 4 + k);
        else
          memcpy(at + 2 * k, &w, 2);
      }
    }
}

void fill_blocks(const Axis& axis, const Header& h, int32_t* base, uint8_t* index, int8_t* weights) {
  for (int64_t b = 0; b < h.blocks; ++b) {
    const int64_t first = b * h.per_block, count = std::min(h.per_block, h.out - first);
    const int32_t from = *std::min_element(axis.low + first, axis.low + first + count);
    base[b] = 3 * from;
    for (int64_t i = 0; i < count; ++i)
      for (int64_t c = 0; c < 3; ++c)
        for (int64_t k = 0; k < 4; ++k) {
          const int64_t lane = (i * 4 + c) * 4 + k, low = axis.low[first + i];
          index[b * 64 + lane] = static_cast<uint8_t>(3 * (low - from + k) + c);
          for (int64_t g = 0; g < h.groups; ++g) {
            int8_t* at = weights + (b * h.groups + g) * 128 + lane;
            split(weight<int16_t>(axis, first + i, low + 4 * g + k), at, at + 64);
          }
        }
  }
}

void fill_float(const Axis& axis, const Header& h, int64_t pixels, int32_t* base, float* weights) {
  const int64_t taps = h.groups * pixels;
  for (int64_t x = 0; x < h.out; ++x) {
    base[x] = static_cast<int32_t>(std::min<int64_t>(axis.low[x], axis.source - axis.taps));
    for (int64_t k = 0; k < taps; ++k)
      for (int64_t c = 0; c < 4; ++c) weights[(x * taps + k) * 4 + c] = weight<float>(axis, x, base[x] + k);
  }
}

}  // namespace

// The two-byte split of the widest set doesn't hold every weight.
static Level level_for(const Axis& axis, Level level) {
  return level == Level::vbmi && axis.fixed && !splits(axis) ? Level::avx2 : level;
}

int64_t plan_bytes(const Axis& axis, bool vertical, Level level) {
  return header_of(axis, vertical, level_for(axis, level)).bytes;
}

void build_plan(const Axis& axis, bool vertical, Level level, void* plan) {
  level = level_for(axis, level);
  Header h = header_of(axis, vertical, level);
  const Functions& kernels = *functions_for(level);
  char* data = static_cast<char*>(plan);
  memset(data, 0, static_cast<size_t>(h.bytes));
  int32_t* base = reinterpret_cast<int32_t*>(data + sizeof(Header));
  char* weights = data + h.weights_at;
  if (vertical) {
    fill_vertical(axis, h, base, weights);
  } else if (!axis.fixed) {
    fill_float(axis, h, kernels.pixels, base, reinterpret_cast<float*>(weights));
  } else if (level == Level::vbmi) {
    fill_blocks(axis, h, base, reinterpret_cast<uint8_t*>(data + h.index_at), reinterpret_cast<int8_t*>(weights));
  } else {
    for (int64_t x = 0; x < h.out; ++x) {
      base[x] = 3 * axis.low[x];
      for (int64_t k = 0; k < 4 * h.groups; ++k)
        reinterpret_cast<int16_t*>(weights)[x * 4 * h.groups + k] = weight<int16_t>(axis, x, axis.low[x] + k);
    }
  }
  if (!vertical && axis.fixed) {  // from block `tail` on, a step may read behind the row
    h.tail = h.blocks;
    for (int64_t b = h.blocks; b-- > 0;)
      if (base[b] + 12 * h.groups + kernels.slack > 3 * axis.source) h.tail = b;
    h.tail_base = h.tail < h.blocks ? *std::min_element(base + h.tail, base + h.blocks) : 0;
  }
  memcpy(data, &h, sizeof(h));
}

}  // namespace vrlt_patch
