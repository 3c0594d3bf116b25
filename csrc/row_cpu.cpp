// Chooses, once, among the instruction sets that the build contains and the machine has.
#include "row_cpu.h"

#include <initializer_list>

namespace vrlt_cpu {

namespace generic {
extern const RowFunctions* const functions;
}
#if defined(__x86_64__)
namespace avx2 {
extern const RowFunctions* const functions;
}
namespace avx512 {
extern const RowFunctions* const functions;
}
#endif

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

const RowFunctions* functions_for(DType dtype, Isa isa) {
  if (!supports(isa)) return nullptr;
  const RowFunctions* tables = generic::functions;
#if defined(__x86_64__)
  if (isa == Isa::avx2) tables = avx2::functions;
  if (isa == Isa::avx512) tables = avx512::functions;
#endif
  return tables + static_cast<int>(dtype);
}

const RowFunctions& row_functions(DType dtype) {
  static const Isa isa = best_isa();
  return *functions_for(dtype, isa);
}

}  // namespace vrlt_cpu
