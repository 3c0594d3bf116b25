// Argument checks that the CPU and the CUDA binding share. Written against PyTorch's stable ABI (2.11 and later), so
// that one build serves every later release.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>

namespace vrlt_binding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// fp64 for fp64 logits, else fp32: the type of every per-row result.
inline ScalarType result_type(const Tensor& logits) {
  return logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline Tensor new_rows(const Tensor& logits, int64_t rows) {
  return torch::stable::new_empty(logits, {rows}, result_type(logits));
}

inline void check_logits(const Tensor& logits, const char* name) {
  STD_TORCH_CHECK(logits.dim() == 2, name, ": got ", logits.dim(), " dimensions, needs [N, V]");
  STD_TORCH_CHECK(logits.size(1) > 0, name, ": got V = 0, needs at least one column");
  STD_TORCH_CHECK(
      logits.stride(1) == 1 || logits.size(1) == 1, name, ": got column stride ", logits.stride(1),
      ", needs 1 (rows contiguous)");
}

// Two rows that share memory can't both be written.
inline void check_writable(const Tensor& out, const char* name) {
  STD_TORCH_CHECK(
      out.size(0) < 2 || out.stride(0) >= out.size(1), name, ": got row stride ", out.stride(0),
      ", needs at least V = ", out.size(1));
}

inline void check_rows(const Tensor& x, const Tensor& logits, const char* name, bool one_will_do = false) {
  const bool single = one_will_do && x.numel() == 1 && x.dim() <= 1;
  STD_TORCH_CHECK(
      single || (x.dim() == 1 && x.size(0) == logits.size(0)), name, ": got ", x.numel(), " values in ", x.dim(),
      " dimensions, needs ", one_will_do ? "[1] or " : "", "[N] with N = ", logits.size(0));
  STD_TORCH_CHECK(
      x.device().type() == logits.device().type() && x.get_device_index() == logits.get_device_index(), name,
      ": is on another device than the logits");
}

inline void check_float(const Tensor& x, const char* name) {
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(
      type == ScalarType::Float || type == ScalarType::Double, name, ": got ", torch::headeronly::toString(type),
      ", needs float32 or float64");
}

inline void check_target(const Tensor& target, const Tensor& logits) {
  check_rows(target, logits, "target");
  const ScalarType type = target.scalar_type();
  STD_TORCH_CHECK(
      type == ScalarType::Int || type == ScalarType::Long, "target: got ", torch::headeronly::toString(type),
      ", needs int32 or int64");
}

inline void check_column(const Tensor& x, const Tensor& logits, const char* name) {
  check_rows(x, logits, name);
  check_float(x, name);
}

inline void check_inverse_temperature(const Tensor& inverse, const Tensor& logits) {
  check_rows(inverse, logits, "inv_temperature", true);
  check_float(inverse, "inv_temperature");
}

inline void check_same(const Tensor& out, const Tensor& logits) {
  check_logits(out, "out");
  check_writable(out, "out");
  STD_TORCH_CHECK(
      out.size(0) == logits.size(0) && out.size(1) == logits.size(1), "out: got [", out.size(0), ", ", out.size(1),
      "], needs the shape of the logits, [", logits.size(0), ", ", logits.size(1), "]");
  STD_TORCH_CHECK(
      out.scalar_type() == logits.scalar_type(), "out: got ", torch::headeronly::toString(out.scalar_type()),
      ", needs the type of the logits, ", torch::headeronly::toString(logits.scalar_type()));
  STD_TORCH_CHECK(
      out.const_data_ptr() != logits.const_data_ptr() || out.size(0) < 2 || out.stride(0) == logits.stride(0),
      "out: shares memory with the logits but has another row stride");
}

inline void check_row_arguments(const Tensor& logits, const Tensor& target, const Tensor& inverse) {
  check_logits(logits, "logits");
  check_target(target, logits);
  check_inverse_temperature(inverse, logits);
}

inline void check_gradient_arguments(
    const Tensor& out, const Tensor& logits, const Tensor& lse, const Tensor& entropy, const Tensor& a,
    const Tensor& e) {
  check_same(out, logits);
  check_column(lse, logits, "lse");
  check_column(entropy, logits, "entropy");
  check_column(a, logits, "a");
  check_column(e, logits, "e");
}

}  // namespace vrlt_binding
