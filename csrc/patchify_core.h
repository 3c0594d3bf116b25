// What the CPU kernels of patchify share, torch-free: sources of pixels, and the plan of an axis, which holds its
// weights in the order that one instruction set reads them.
//
// A resize goes horizontal first. Rows that were resized so stay in a ring until no output row needs them: of the fixed
// point route four rows at a time ("a quad": the 4 bytes of four rows side by side, R G B and nothing for a pixel), of
// the fp32 route single rows (R G B 0 a pixel). Both take 16 bytes a pixel.
#pragma once

#include <cstdint>
#include <cstring>

namespace vrlt_patch {

constexpr int64_t MAGIC = 0x76726c7470617431;
constexpr int64_t PIXEL = 16;  // bytes of a pixel in the ring
constexpr int64_t PAD = 16;    // pixels: rows of the ring are a multiple of this
constexpr int YUV_BITS = 21;

enum class Level : int64_t { generic, avx2, vbmi };

// One axis as `axis` of patchify_ref.py makes it: weights [out][taps], int16 or fp32.
struct Axis {
  const int32_t* low;
  const int32_t* end;
  const void* weights;
  int64_t out, taps, source;
  int precision;
  bool fixed;
};

struct Header {
  int64_t magic, level, fixed, vertical, source, out, precision;
  int64_t groups;     // vertical: units of the ring an output reads; horizontal: steps over its taps
  int64_t per_block;  // outputs of a horizontal step
  int64_t blocks, tail, tail_base;
  int64_t index_at, weights_at, bytes;  // offsets in the plan
};

// A view of a plan. `base`: of each block (vertical: output) the first byte (fp32: pixel; vertical: unit) it reads.
struct Plan {
  explicit Plan(const void* data)
      : h(*static_cast<const Header*>(data)),
        base(reinterpret_cast<const int32_t*>(static_cast<const char*>(data) + sizeof(Header))),
        index(static_cast<const uint8_t*>(data) + h.index_at),
        weights(static_cast<const char*>(data) + h.weights_at) {}
  Header h;
  const int32_t* base;
  const uint8_t* index;
  const char* weights;
};

inline int64_t padded(int64_t pixels) {
  return (pixels + PAD - 1) / PAD * PAD;
}

// The kernels of one instruction set. Rows may be read `slack` bytes behind their last one.
struct Functions {
  int64_t slack;
  int64_t pixels;  // that the fp32 pass takes at a time
  void (*horizontal)(const Plan& plan, const uint8_t* const* rows, const uint8_t* const* tails, uint8_t* quad);
  void (*vertical)(const Plan& plan, int64_t y, const uint8_t* const* quads, uint8_t* planar, int64_t pixels);
  // `scratch` holds source + 2 * PAD pixels; it and `to` have 16 bytes a pixel.
  void (*horizontal_float)(const Plan& plan, const uint8_t* row, float* scratch, float* to);
  void (*vertical_float)(const Plan& plan, int64_t y, const float* const* rows, uint8_t* planar, int64_t pixels);
  void (*normalise)(const uint8_t* x, int64_t count, float mean, float deviation, void* to, bool bf16);
  void (*from_yuv)(
      const uint8_t* y, const uint8_t* u, const uint8_t* v, int64_t count, const int32_t* factors, uint8_t* rgb);
};

const Functions* functions_for(Level level);  // nullptr: not in this build, or the machine lacks it
Level best_level();

// Pictures of one call. With `uv`, `data` is the luma plane; strides in bytes, of any sign.
struct Source {
  const uint8_t* data;
  const uint8_t* uv;
  int64_t row, column, channel;           // of data
  int64_t uv_row, uv_column, uv_channel;  // of uv
  int64_t height, width, rotation;        // before the rotation, which is 0, 90, 180 or 270 degrees counter-clockwise
  const int32_t* factors;                 // of yuv_coefficients, 6

  bool turned() const { return rotation == 90 || rotation == 270; }
  int64_t rows() const { return turned() ? width : height; }
  int64_t columns() const { return turned() ? height : width; }
  bool direct() const { return uv == nullptr && rotation == 0 && column == 3 && channel == 1; }
  // Where pixel (r, c) after the rotation comes from: it, and one step in c.
  void origin(int64_t r, int64_t& y, int64_t& x, int64_t& dy, int64_t& dx) const {
    y = x = dy = dx = 0;
    if (rotation == 0) y = r, dx = 1;
    if (rotation == 90) x = width - 1 - r, dy = 1;
    if (rotation == 180) y = height - 1 - r, x = width - 1, dx = -1;
    if (rotation == 270) x = r, y = height - 1, dy = -1;
  }
};

struct Layout {
  int64_t height, width, patch, merge, tubelet;
  char* out;
  int64_t row_bytes;    // between rows of out
  int64_t value_bytes;  // 1, or 2 and 4 for bf16 and fp32
  const float* mean_std;  // 255 mean, 255 std; nullptr for uint8
};

int64_t plan_bytes(const Axis& axis, bool vertical, Level level);
void build_plan(const Axis& axis, bool vertical, Level level, void* plan);
// Patch rows [begin, end) of one frame, into its slot. The plans fit the source and the layout.
void patchify_rows(
    const Source& source, const Layout& layout, const Plan& across, const Plan& down, int64_t slot, int64_t begin,
    int64_t end);

}  // namespace vrlt_patch
