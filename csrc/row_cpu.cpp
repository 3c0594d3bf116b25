// Which instruction set the machine has, and the row kernels of it.
#include "row_cpu.h"

#include <initializer_list>

#include "cpu_dispatch.h"

namespace vrlt_cpu {

bool supports(Isa isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (isa == Isa::avx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (isa == Isa::avx512)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
  return isa == Isa::generic;
}

Isa best_isa() {
  for (const Isa isa : {Isa::avx512, Isa::avx2})
    if (supports(isa)) return isa;
  return Isa::generic;
}

VRLT_DISPATCH(RowFunctions)

const RowFunctions& row_functions(DType dtype) { return functions(dtype); }

}  // namespace vrlt_cpu
