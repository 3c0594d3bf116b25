// Row kernels for the CPU, torch-free. A row is contiguous; every call handles one row on one thread, so a row's result
// depends neither on its neighbours nor on the number of threads.
#pragma once

#include <cstdint>

namespace vrlt_cpu {

enum class DType { f32, bf16, f64 };
enum class Isa { generic, avx2, avx512 };

struct Stats {
  double logp, entropy, lse, sum_p2;  // sum_p2 is 0 unless asked for
};

// Coefficients of a row's gradient, see row_core.h; lse and entropy as `stats` gave them, lse possibly rounded to fp32.
struct Coefficients {
  double a, e, lse, entropy;
};

struct RowFunctions {
  Stats (*stats)(const void* logits, int64_t width, int64_t target, double inverse_temperature, bool want_p2);
  // out may be logits. a = e = 0 gives zeros, whatever the logits hold.
  void (*gradient)(
      void* out, const void* logits, int64_t width, int64_t target, double inverse_temperature,
      const Coefficients& row);
  // Replaces the logits by onehot - p.
  Stats (*fused)(void* logits, int64_t width, int64_t target, double inverse_temperature);
};

// Whether the build contains an instruction set and the machine has it.
bool supports(Isa isa);
Isa best_isa();

// The fastest this machine runs; `functions_for` returns nullptr where the machine or the build lacks the instructions.
const RowFunctions& row_functions(DType dtype);
const RowFunctions* functions_for(DType dtype, Isa isa);

}  // namespace vrlt_cpu
