// What the CPU bindings share beside binding.h.
#pragma once

#include <algorithm>
#include <atomic>

#include "binding.h"
#include "row_cpu.h"

namespace vrlt_binding {

// A vector of N numbers, or one number for all rows, of either type and any stride.
class Column {
 public:
  explicit Column(const Tensor& x)
      : data_(x.const_data_ptr()), stride_(x.numel() == 1 ? 0 : x.stride(0)), type_(x.scalar_type()) {}
  double operator[](int64_t i) const {
    return type_ == ScalarType::Double ? static_cast<const double*>(data_)[i * stride_]
                                       : static_cast<const float*>(data_)[i * stride_];
  }
  int64_t index(int64_t i) const {
    return type_ == ScalarType::Long ? static_cast<const int64_t*>(data_)[i * stride_]
                                     : static_cast<const int32_t*>(data_)[i * stride_];
  }

 private:
  const void* data_;
  int64_t stride_;
  ScalarType type_;
};

inline vrlt_cpu::DType cpu_dtype(const Tensor& x, const char* name) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return vrlt_cpu::DType::f32;
    case ScalarType::BFloat16:
      return vrlt_cpu::DType::bf16;
    case ScalarType::Double:
      return vrlt_cpu::DType::f64;
    default:
      STD_TORCH_CHECK(
          false, name, ": got ", torch::headeronly::toString(x.scalar_type()),
          ", needs float32, bfloat16 or float64 on the CPU");
  }
}

// Threads take the next unit as soon as they are free; few products are done by one.
template <typename F>
void spread(int64_t count, int64_t work, const F& f) {
  constexpr int64_t WORTH_A_THREAD = 1 << 20;  // multiplications
  const int64_t threads = std::min<int64_t>({torch::stable::get_num_threads(), count, 1 + work / WORTH_A_THREAD});
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (; begin < end; ++begin)
      for (int64_t i = next++; i < count; i = next++) f(i);
  });
}

}  // namespace vrlt_binding
