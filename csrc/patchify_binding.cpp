// The ops `vrlt_native::patchify_plan` and `patchify_` over patchify_core.h.
#include "binding.h"

#include <algorithm>
#include <array>

#include "patchify_core.h"

namespace vrlt_binding {

using vrlt_patch::Axis;
using vrlt_patch::Layout;
using vrlt_patch::Level;
using vrlt_patch::Plan;
using vrlt_patch::Source;

static void check_vector(const Tensor& x, ScalarType type, int64_t count, const char* name) {
  STD_TORCH_CHECK(
      x.dim() == 1 && x.scalar_type() == type && x.is_contiguous() && (count < 0 || x.size(0) == count), name,
      ": needs a contiguous vector of ", torch::headeronly::toString(type), ", ", count, " long");
}

// Where the weights of one axis lie in the memory that the kernels of `level` (-1: the best there is) want them in.
Tensor patchify_plan(
    Tensor low, Tensor end, Tensor weights, int64_t precision, int64_t source, bool vertical, int64_t level) {
  check_vector(low, ScalarType::Int, -1, "low");
  check_vector(end, ScalarType::Int, low.size(0), "end");
  const bool fixed = weights.scalar_type() == ScalarType::Short;
  STD_TORCH_CHECK(fixed || weights.scalar_type() == ScalarType::Float, "weights: needs int16 or float32");
  STD_TORCH_CHECK(
      weights.dim() == 2 && weights.is_contiguous() && weights.size(0) == low.size(0) && low.size(0) > 0 &&
          weights.size(1) > 0 && weights.size(1) <= source,
      "weights: needs a contiguous [out, taps], at most as many taps as pixels");
  STD_TORCH_CHECK(precision >= 0 && precision <= 22, "precision: got ", precision, ", needs 0 to 22");
  const Axis axis = {static_cast<const int32_t*>(low.const_data_ptr()), static_cast<const int32_t*>(end.const_data_ptr()),
                     weights.const_data_ptr(), low.size(0), weights.size(1), source, static_cast<int>(precision), fixed};
  for (int64_t i = 0; i < axis.out; ++i)
    STD_TORCH_CHECK(
        axis.low[i] >= 0 && axis.low[i] < axis.end[i] && axis.end[i] <= source &&
            axis.end[i] - axis.low[i] <= axis.taps,
        "low, end: output ", i, " reads pixels ", axis.low[i], " to ", axis.end[i], " of ", source);
  const Level chosen = level < 0 ? vrlt_patch::best_level() : static_cast<Level>(level);
  STD_TORCH_CHECK(
      level <= static_cast<int64_t>(Level::vbmi) && vrlt_patch::functions_for(chosen) != nullptr, "level: ", level,
      " isn't in this build, or the machine lacks it");
  const Tensor plan =
      torch::stable::new_empty(low, {vrlt_patch::plan_bytes(axis, vertical, chosen)}, ScalarType::Byte);
  vrlt_patch::build_plan(axis, vertical, chosen, plan.mutable_data_ptr());
  return plan;
}

static Plan plan_of(const Tensor& x, bool vertical, int64_t source, int64_t out, const char* name) {
  check_vector(x, ScalarType::Byte, -1, name);
  STD_TORCH_CHECK(x.numel() >= static_cast<int64_t>(sizeof(vrlt_patch::Header)), name, ": isn't a plan");
  const Plan plan(x.const_data_ptr());
  STD_TORCH_CHECK(
      plan.h.magic == vrlt_patch::MAGIC && plan.h.bytes == x.numel() && (plan.h.vertical != 0) == vertical &&
          plan.h.source == source && plan.h.out == out,
      name, ": is a plan for ", plan.h.source, " to ", plan.h.out, " pixels, needs ", source, " to ", out);
  return plan;
}

static Source source_of(const Tensor& frames, const Tensor& uv, int64_t rotation, const Tensor& factors) {
  const bool rgb = uv.numel() == 0;
  STD_TORCH_CHECK(frames.scalar_type() == ScalarType::Byte, "frames: needs uint8");
  STD_TORCH_CHECK(
      rgb ? frames.dim() == 4 && frames.size(3) == 3 : frames.dim() == 3,
      "frames: needs [F, H, W, 3], or [F, H, W] with uv");
  STD_TORCH_CHECK(rotation >= 0 && rotation < 360 && rotation % 90 == 0, "rotation: got ", rotation);
  Source s = {};
  s.data = static_cast<const uint8_t*>(frames.const_data_ptr());
  s.height = frames.size(1), s.width = frames.size(2), s.rotation = rotation;
  s.row = frames.stride(1), s.column = frames.stride(2);
  check_vector(factors, ScalarType::Int, 6, "factors");
  s.factors = static_cast<const int32_t*>(factors.const_data_ptr());
  if (rgb) {
    s.channel = frames.stride(3);
    return s;
  }
  STD_TORCH_CHECK(
      uv.scalar_type() == ScalarType::Byte && uv.dim() == 4 && uv.size(0) == frames.size(0) &&
          uv.size(1) == (s.height + 1) / 2 && uv.size(2) == (s.width + 1) / 2 && uv.size(3) == 2,
      "uv: needs uint8 [F, ceil(H / 2), ceil(W / 2), 2]");
  s.uv = static_cast<const uint8_t*>(uv.const_data_ptr());
  s.uv_row = uv.stride(1), s.uv_column = uv.stride(2), s.uv_channel = uv.stride(3);
  return s;
}

static Layout layout_of(
    const Tensor& out, const std::array<int64_t, 5>& size, const Tensor& slots, int64_t frames,
    const Tensor& mean_std) {
  Layout l = {size[0], size[1], size[2], size[3], size[4], nullptr, 0, 1, nullptr};
  STD_TORCH_CHECK(
      l.patch > 0 && l.merge > 0 && l.tubelet > 0 && l.height > 0 && l.width > 0 &&
          l.height % (l.patch * l.merge) == 0 && l.width % (l.patch * l.merge) == 0,
      "size: needs multiples of patch * merge");
  const ScalarType type = out.scalar_type();
  const bool plain = mean_std.numel() == 0;
  STD_TORCH_CHECK(
      plain ? type == ScalarType::Byte : type == ScalarType::Float || type == ScalarType::BFloat16, "out: got ",
      torch::headeronly::toString(type), ", needs uint8, or float32 or bfloat16 with mean_std");
  if (!plain) {
    check_vector(mean_std, ScalarType::Float, 6, "mean_std");
    l.mean_std = static_cast<const float*>(mean_std.const_data_ptr());
    l.value_bytes = static_cast<int64_t>(out.element_size());
  }
  const int64_t rows = l.height / l.patch * (l.width / l.patch), columns = 3 * l.tubelet * l.patch * l.patch;
  STD_TORCH_CHECK(
      out.dim() == 2 && out.size(0) % rows == 0 && out.size(1) == columns && out.stride(1) == 1 &&
          (out.size(0) < 2 || out.stride(0) >= columns),
      "out: needs [multiple of ", rows, ", ", columns, "] with contiguous rows");
  l.out = static_cast<char*>(out.mutable_data_ptr());
  l.row_bytes = out.stride(0) * l.value_bytes;
  check_vector(slots, ScalarType::Long, frames, "slots");
  const int64_t* slot = static_cast<const int64_t*>(slots.const_data_ptr());
  for (int64_t i = 0; i < frames; ++i)
    STD_TORCH_CHECK(
        slot[i] >= 0 && slot[i] < out.size(0) / rows * l.tubelet, "slots: got ", slot[i], " in a clip of ",
        out.size(0) / rows * l.tubelet, " frames");
  return l;
}

void patchify_(
    Tensor out, Tensor frames, Tensor uv, Tensor slots, Tensor across, Tensor down, int64_t height, int64_t width,
    int64_t patch, int64_t merge, int64_t tubelet, int64_t rotation, Tensor factors, Tensor mean_std) {
  const Source first = source_of(frames, uv, rotation, factors);
  const int64_t count = frames.size(0);
  const Layout layout = layout_of(out, {height, width, patch, merge, tubelet}, slots, count, mean_std);
  const Plan x = plan_of(across, false, first.columns(), width, "across");
  const Plan y = plan_of(down, true, first.rows(), height, "down");
  STD_TORCH_CHECK(x.h.fixed == y.h.fixed, "across, down: one is fixed-point, the other is not");
  const int64_t* slot = static_cast<const int64_t*>(slots.const_data_ptr());
  const int64_t bands = height / patch, frame = frames.stride(0), chroma = uv.numel() == 0 ? 0 : uv.stride(0);
  // A band costs again the source rows it shares with the one before: threads get several.
  torch::stable::parallel_for(0, count * bands, std::min<int64_t>(bands, 8), [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t i = begin / bands, stop = std::min(end, (i + 1) * bands);
      Source source = first;
      source.data += i * frame;
      if (source.uv != nullptr) source.uv += i * chroma;
      vrlt_patch::patchify_rows(source, layout, x, y, slot[i], begin - i * bands, stop - i * bands);
      begin = stop;
    }
  });
}

}  // namespace vrlt_binding

STABLE_TORCH_LIBRARY_FRAGMENT(vrlt_native, m) {
  m.def(
      "patchify_plan(Tensor low, Tensor end, Tensor weights, int precision, int source, bool vertical, int level) -> "
      "Tensor");
  m.def(
      "patchify_(Tensor(a!) out, Tensor frames, Tensor uv, Tensor slots, Tensor across, Tensor down, int height, "
      "int width, int patch, int merge, int tubelet, int rotation, Tensor factors, Tensor mean_std) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(vrlt_native, CPU, m) {
  m.impl("patchify_plan", TORCH_BOX(&vrlt_binding::patchify_plan));
  m.impl("patchify_", TORCH_BOX(&vrlt_binding::patchify_));
}
