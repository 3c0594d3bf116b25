// patchify on the CPU: a band of patch rows of one frame, resized and written into its slot without a whole picture
// in between. Chooses, once, among the instruction sets that the build contains and the machine has.
#include <algorithm>
#include <vector>

#include "patchify_core.h"

namespace vrlt_patch {

namespace generic {
extern const Functions functions;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Functions functions;
}
namespace vbmi {
extern const Functions functions;
}
#endif

const Functions* functions_for(Level level) {
  if (level == Level::generic) return &generic::functions;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (level == Level::avx2 && avx2) return &avx2::functions;
  if (level == Level::vbmi && avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni"))
    return &vbmi::functions;
#endif
  return nullptr;
}

Level best_level() {
  for (const Level level : {Level::vbmi, Level::avx2})
    if (functions_for(level) != nullptr) return level;
  return Level::generic;
}

namespace {

constexpr int64_t SLACK = 256;  // bytes behind a row in the buffers here; more than any kernel reads

// One row after the rotation, as packed RGB.
class RowReader {
 public:
  RowReader(const Source& source, const Functions& kernels) : source_(source), kernels_(kernels) {
    if (source.uv != nullptr) planes_.resize(3 * static_cast<size_t>(source.columns()));
  }

  void read(int64_t r, uint8_t* rgb) {
    int64_t y, x, dy, dx;
    source_.origin(r, y, x, dy, dx);
    const int64_t count = source_.columns();
    if (source_.uv != nullptr) return read_yuv(y, x, dy, dx, count, rgb);
    const uint8_t* from = source_.data + y * source_.row + x * source_.column;
    const int64_t step = dy * source_.row + dx * source_.column;
    for (int64_t i = 0; i < count; ++i, from += step)
      for (int64_t c = 0; c < 3; ++c) rgb[3 * i + c] = from[c * source_.channel];
  }

 private:
  void read_yuv(int64_t y, int64_t x, int64_t dy, int64_t dx, int64_t count, uint8_t* rgb) {
    uint8_t *luma = planes_.data(), *u = luma + count, *v = u + count;
    for (int64_t i = 0; i < count; ++i, y += dy, x += dx) {
      const uint8_t* chroma = source_.uv + (y >> 1) * source_.uv_row + (x >> 1) * source_.uv_column;
      luma[i] = source_.data[y * source_.row + x * source_.column];
      u[i] = chroma[0];
      v[i] = chroma[source_.uv_channel];
    }
    kernels_.from_yuv(luma, u, v, count, source_.factors, rgb);
  }

  const Source& source_;
  const Functions& kernels_;
  std::vector<uint8_t> planes_;
};

// The ring of horizontally resized rows.
class Ring {
 public:
  Ring(const Source& source, const Plan& across, const Plan& down)
      : source_(source),
        across_(across),
        kernels_(*functions_for(static_cast<Level>(across.h.level))),
        reader_(source, kernels_),
        capacity_(down.h.groups),
        slot_(padded(across.h.out) * PIXEL),
        data_(static_cast<size_t>(capacity_ * slot_)),
        units_(static_cast<size_t>(capacity_)) {
    const int64_t row = 3 * source.columns();
    const bool whole = !source.direct() || !across.h.fixed || across.h.tail_base == 0;
    buffer_ = (whole ? row : row - across.h.tail_base) + SLACK + 12 * across.h.groups;
    rows_.resize(static_cast<size_t>((across.h.fixed ? 4 : 1) * buffer_));
    if (!across.h.fixed) pixels_.resize(static_cast<size_t>(source.columns() + 2 * PAD) * 4);
  }

  // The units [first, first + capacity).
  const uint8_t* const* window(int64_t first) {
    for (int64_t unit = std::max(next_, first); unit < first + capacity_; ++unit) make(unit);
    next_ = first + capacity_;
    for (int64_t i = 0; i < capacity_; ++i) units_[i] = at(first + i);
    return units_.data();
  }

 private:
  uint8_t* at(int64_t unit) { return data_.data() + unit % capacity_ * slot_; }

  void make(int64_t unit) {
    if (across_.h.fixed) return make_quad(unit);
    const uint8_t* row = source_.data + unit * source_.row;
    if (!source_.direct()) reader_.read(unit, rows_.data());
    kernels_.horizontal_float(
        across_, source_.direct() ? row : rows_.data(), pixels_.data(), reinterpret_cast<float*>(at(unit)));
  }

  void make_quad(int64_t unit) {
    const uint8_t *rows[4], *tails[4];
    const int64_t from = across_.h.tail_base, bytes = 3 * source_.columns();
    for (int64_t i = 0; i < 4; ++i) {
      const int64_t r = std::min(4 * unit + i, source_.rows() - 1);
      uint8_t* buffer = rows_.data() + i * buffer_;
      if (source_.direct()) {
        rows[i] = source_.data + r * source_.row;
        if (across_.h.tail < across_.h.blocks) memcpy(buffer, rows[i] + from, static_cast<size_t>(bytes - from));
        tails[i] = buffer - from;
      } else {
        reader_.read(r, buffer);
        rows[i] = tails[i] = buffer;
      }
    }
    kernels_.horizontal(across_, rows, tails, at(unit));
  }

  const Source& source_;
  const Plan& across_;
  const Functions& kernels_;
  RowReader reader_;
  int64_t capacity_, slot_, buffer_ = 0, next_ = 0;
  std::vector<uint8_t> data_, rows_;
  std::vector<const uint8_t*> units_;
  std::vector<float> pixels_;
};

// Spreads rows of values, one channel at a time, over the patches that they cross.
class Writer {
 public:
  Writer(const Layout& layout, int64_t slot) : l_(layout), segment_(layout.patch * layout.value_bytes) {
    const int64_t per_row = l_.width / l_.patch, wide = per_row / l_.merge;
    offsets_.resize(static_cast<size_t>(per_row));
    for (int64_t b = 0; b < per_row; ++b)
      offsets_[b] = (b / l_.merge * l_.merge * l_.merge + b % l_.merge) * l_.row_bytes;
    band_ = wide * l_.merge * l_.merge * l_.row_bytes;
    const int64_t time = slot / l_.tubelet * (l_.height / l_.patch) * per_row;
    start_ = l_.out + time * l_.row_bytes;
    in_tubelet_ = slot % l_.tubelet;
  }

  void write(int64_t y, int64_t c, const char* values) const {
    const int64_t by = y / l_.patch, line = y % l_.patch;
    char* to = start_ + by / l_.merge * band_ + by % l_.merge * l_.merge * l_.row_bytes;
    to += (((c * l_.tubelet + in_tubelet_) * l_.patch + line) * l_.patch) * l_.value_bytes;
    if (segment_ == 14)
      spread<14>(to, values);
    else if (segment_ == 16)
      spread<16>(to, values);
    else
      for (size_t b = 0; b < offsets_.size(); ++b)
        memcpy(to + offsets_[b], values + static_cast<int64_t>(b) * segment_, static_cast<size_t>(segment_));
  }

 private:
  template <int64_t BYTES>
  void spread(char* to, const char* values) const {
    const size_t count = offsets_.size();
    for (size_t b = 0; b < count; ++b, values += BYTES) memcpy(to + offsets_[b], values, BYTES);
  }

  const Layout& l_;
  int64_t segment_, band_ = 0, in_tubelet_ = 0;
  char* start_ = nullptr;
  std::vector<int64_t> offsets_;
};

}  // namespace

void patchify_rows(
    const Source& source, const Layout& layout, const Plan& across, const Plan& down, int64_t slot, int64_t begin,
    int64_t end) {
  const Functions& kernels = *functions_for(static_cast<Level>(down.h.level));
  const int64_t pixels = padded(layout.width);
  Ring ring(source, across, down);
  const Writer writer(layout, slot);
  std::vector<uint8_t> planar(static_cast<size_t>(3 * pixels));
  std::vector<float> values(layout.mean_std == nullptr ? 0 : static_cast<size_t>(pixels));
  for (int64_t y = begin * layout.patch; y < end * layout.patch; ++y) {
    const uint8_t* const* units = ring.window(down.base[y]);
    if (down.h.fixed)
      kernels.vertical(down, y, units, planar.data(), pixels);
    else
      kernels.vertical_float(down, y, reinterpret_cast<const float* const*>(units), planar.data(), pixels);
    for (int64_t c = 0; c < 3; ++c) {
      const uint8_t* line = planar.data() + c * pixels;
      if (layout.mean_std == nullptr) {
        writer.write(y, c, reinterpret_cast<const char*>(line));
        continue;
      }
      const float *mean = layout.mean_std + c, *deviation = mean + 3;
      kernels.normalise(line, layout.width, *mean, *deviation, values.data(), layout.value_bytes == 2);
      writer.write(y, c, reinterpret_cast<const char*>(values.data()));
    }
  }
}

}  // namespace vrlt_patch
