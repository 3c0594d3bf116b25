// x W^T + b for a few rows of x, torch-free: W is read once, as it lies, and the bits of a row depend on that row alone.
#pragma once

#include <cstdint>

#include "row_cpu.h"

namespace vrlt_linear {

using vrlt_cpu::DType;
using vrlt_cpu::Isa;

struct Matrix {
  void* data;
  int64_t rows, columns, stride;  // stride of a row, in elements
};

struct Functions {
  int64_t (*packed_bytes)(int64_t rows, int64_t columns);
  // x as `multiply` wants it.
  void (*pack)(void* packed, const Matrix& x);
  // Columns `begin` to `end` of out, from those rows of the weight; bias may be null. `add`: to what out holds.
  void (*multiply)(
      const Matrix& out, const void* packed, const Matrix& weight, const void* bias, bool add, int64_t begin,
      int64_t end);
  // gate = silu(gate) * up, n values.
  void (*silu_multiply)(void* gate, const void* up, int64_t n);
};

const Functions& functions(DType dtype);
const Functions* functions_for(DType dtype, Isa isa);

}  // namespace vrlt_linear
