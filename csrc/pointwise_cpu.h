// What stands between the matrix products of a layer, forward and backward, torch-free: RMSNorm and silu(gate) * up.
// The mathematics: kernels/vrlt_kernels/layers.py.
#pragma once

#include <cstdint>

#include "row_cpu.h"

namespace vrlt_pointwise {

using vrlt_cpu::DType;
using vrlt_cpu::Isa;

// Contiguous tensors [rows, dim]; rstd and sums in the compute type.
struct Norm {
  const void *x, *weight;
  void* rstd;
  int64_t dim;
};

struct Functions {
  int64_t compute_bytes;
  // Rows begin to end of out, and their rstd.
  void (*norm)(const Norm& norm, void* out, double eps, int64_t begin, int64_t end);
  // Rows begin to end of dx; adds what they give to the gradient of the weight to `sums` [dim].
  void (*norm_backward)(const Norm& norm, const void* grad, void* dx, void* sums, int64_t begin, int64_t end);
  // out[c] = sum_p parts[p * stride + c] of dim components, in the storage type.
  void (*add)(void* out, const void* parts, int64_t count, int64_t stride, int64_t dim);
  // n values.
  void (*swiglu)(void* out, const void* gate, const void* up, int64_t n);
  void (*swiglu_backward)(void* dgate, void* dup, const void* grad, const void* gate, const void* up, int64_t n);
};

const Functions& functions(DType dtype);
const Functions* functions_for(DType dtype, Isa isa);

}  // namespace vrlt_pointwise
