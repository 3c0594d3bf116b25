// Launchers of the CUDA row kernels, torch-free. Each returns nullptr, or a message that says what is wrong.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace vrlt_cuda {

enum class DType { f32, f16, bf16 };

struct Rows {
  DType dtype;
  int64_t count, stride;  // stride in elements between rows; columns are contiguous
  int width;
  const int64_t* target;         // [count]; outside 0 … width - 1 gives a log-prob of NaN and no onehot
  const float* inverse_temperature;
  bool inverse_per_row;  // else one for all
};

struct Results {
  float *logp, *entropy, *lse;  // [count]
  float* sum_p2;                // [count] or nullptr
};

struct Gradient {
  const float *lse, *entropy, *a, *e;  // [count]
  void* out;
  int64_t out_stride;
};

// Reads each logit once into the registers of a cluster of 8 CTAs. Needs compute capability 9.0. `replace`: leaves
// onehot - p where the logits were.
const char* launch_row_cluster(
    void* logits, const Rows& rows, const Results& results, bool replace, cudaStream_t stream);

// Reads each logit once and writes its gradient once, from the row's log-sum-exp. Where that has lost digits to
// rounding, two more reads of the row restore them. Any device.
const char* launch_row_gradient(const void* logits, const Rows& rows, const Gradient& gradient, cudaStream_t stream);

}  // namespace vrlt_cuda
