// CUDA implementations of the ops of binding.cpp over row_cluster.h. Only built where torch has CUDA and nvcc is there.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <cstdint>
#include <limits>
#include <tuple>

#include "binding.h"
#include "row_cluster.h"

namespace vrlt_binding {
namespace {

vrlt_cuda::DType row_dtype(const Tensor& logits) {
  switch (logits.scalar_type()) {
    case ScalarType::Float:
      return vrlt_cuda::DType::f32;
    case ScalarType::Half:
      return vrlt_cuda::DType::f16;
    case ScalarType::BFloat16:
      return vrlt_cuda::DType::bf16;
    default:
      STD_TORCH_CHECK(
          false, "logits: got ", torch::headeronly::toString(logits.scalar_type()),
          ", needs float32, float16 or bfloat16 on CUDA");
  }
}

// Contiguous, of the type that the kernels read.
Tensor column(const Tensor& x, ScalarType type) {
  return torch::stable::contiguous(torch::stable::to(x, type));
}

float* floats(const Tensor& x) {
  return static_cast<float*>(x.mutable_data_ptr());
}

// Checked arguments, converted, on the device and stream of the logits.
struct Launch {
  Launch(const Tensor& logits, const Tensor& target_, const Tensor& inverse_)
      : guard(logits.get_device_index()),
        target(column(target_, ScalarType::Long)),
        inverse(column(inverse_, ScalarType::Float)) {
    STD_TORCH_CHECK(
        logits.size(1) <= std::numeric_limits<int32_t>::max() - 64, "logits: got V = ", logits.size(1),
        ", needs less than 2^31");
    rows = {
        row_dtype(logits),
        logits.size(0),
        logits.stride(0),
        static_cast<int>(logits.size(1)),
        static_cast<const int64_t*>(target.const_data_ptr()),
        static_cast<const float*>(inverse.const_data_ptr()),
        inverse.numel() != 1,
    };
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(logits.get_device_index(), &stream));
  }
  cudaStream_t cuda_stream() const { return static_cast<cudaStream_t>(stream); }

  torch::stable::accelerator::DeviceGuard guard;
  Tensor target, inverse;
  vrlt_cuda::Rows rows;
  void* stream = nullptr;
};

void check_launch(const char* message) {
  STD_TORCH_CHECK(message == nullptr, message);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> cluster_stats(
    Tensor logits, Tensor target, Tensor inverse, bool want_p2, bool replace) {
  const Launch launch(logits, target, inverse);
  const int64_t count = logits.size(0);
  Tensor logp = new_rows(logits, count), entropy = new_rows(logits, count), lse = new_rows(logits, count);
  Tensor sum_p2 = new_rows(logits, want_p2 ? count : 0);
  check_launch(vrlt_cuda::launch_row_cluster(
      logits.data_ptr(), launch.rows, {floats(logp), floats(entropy), floats(lse), want_p2 ? floats(sum_p2) : nullptr},
      replace, launch.cuda_stream()));
  return {logp, entropy, lse, sum_p2};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> row_stats_cuda(Tensor logits, Tensor target, Tensor inverse, bool want_p2) {
  check_row_arguments(logits, target, inverse);
  return cluster_stats(logits, target, inverse, want_p2, false);
}

std::tuple<Tensor, Tensor, Tensor> row_fused_cuda_(Tensor logits, Tensor target, Tensor inverse) {
  check_row_arguments(logits, target, inverse);
  check_writable(logits, "logits");
  const auto [logp, entropy, lse, sum_p2] = cluster_stats(logits, target, inverse, false, true);
  return {logp, entropy, lse};
}

void row_grad_cuda_(
    Tensor out, Tensor logits, Tensor target, Tensor inverse, Tensor lse, Tensor entropy, Tensor a, Tensor e) {
  check_row_arguments(logits, target, inverse);
  check_gradient_arguments(out, logits, lse, entropy, a, e);
  const Launch launch(logits, target, inverse);
  const Tensor lses = column(lse, ScalarType::Float), entropies = column(entropy, ScalarType::Float);
  const Tensor as = column(a, ScalarType::Float), es = column(e, ScalarType::Float);
  check_launch(vrlt_cuda::launch_row_gradient(
      logits.const_data_ptr(), launch.rows,
      {floats(lses), floats(entropies), floats(as), floats(es), out.mutable_data_ptr(), out.stride(0)},
      launch.cuda_stream()));
}

}  // namespace
}  // namespace vrlt_binding

STABLE_TORCH_LIBRARY_IMPL(vrlt_native, CUDA, m) {
  m.impl("row_stats", TORCH_BOX(&vrlt_binding::row_stats_cuda));
  m.impl("row_grad_", TORCH_BOX(&vrlt_binding::row_grad_cuda_));
  m.impl("row_fused_", TORCH_BOX(&vrlt_binding::row_fused_cuda_));
}
