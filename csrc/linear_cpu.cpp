// Chooses, once, among the instruction sets that the build contains and the machine has.
#include "linear_cpu.h"

namespace vrlt_linear {

namespace generic {
extern const Functions* const functions;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Functions* const functions;
}
namespace avx512 {
extern const Functions* const functions;
}
#endif

const Functions* functions_for(DType dtype, Isa isa) {
  if (!vrlt_cpu::supports(isa)) return nullptr;
  const Functions* tables = generic::functions;
#if defined(__x86_64__)
  if (isa == Isa::avx2) tables = avx2::functions;
  if (isa == Isa::avx512) tables = avx512::functions;
#endif
  return tables + static_cast<int>(dtype);
}

const Functions& functions(DType dtype) {
  static const Isa isa = vrlt_cpu::best_isa();
  return *vrlt_linear::functions_for(dtype, isa);
}

}  // namespace vrlt_linear
