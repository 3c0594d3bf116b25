// For a table of functions in each instruction set's namespace: chooses, once, among those that the build contains and
// the machine has. VRLT_DISPATCH(T) stands inside the namespace that `T` and the tables, by DType, are of.
#pragma once

#include "row_cpu.h"

#define VRLT_TABLES(T, ISA)            \
  namespace ISA {                      \
  extern const T* const functions;     \
  }
#if defined(__x86_64__)
#define VRLT_ALL_TABLES(T) VRLT_TABLES(T, generic) VRLT_TABLES(T, avx2) VRLT_TABLES(T, avx512)
#define VRLT_X86(isa, tables)                                       \
  if (isa == vrlt_cpu::Isa::avx2) tables = avx2::functions;         \
  if (isa == vrlt_cpu::Isa::avx512) tables = avx512::functions;
#else
#define VRLT_ALL_TABLES(T) VRLT_TABLES(T, generic)
#define VRLT_X86(isa, tables)
#endif

#define VRLT_DISPATCH(T)                                                 \
  VRLT_ALL_TABLES(T)                                                     \
  const T* functions_for(vrlt_cpu::DType dtype, vrlt_cpu::Isa isa) {     \
    if (!vrlt_cpu::supports(isa)) return nullptr;                        \
    const T* tables = generic::functions;                                \
    VRLT_X86(isa, tables)                                                \
    return tables + static_cast<int>(dtype);                             \
  }                                                                      \
  const T& functions(vrlt_cpu::DType dtype) {                            \
    static const vrlt_cpu::Isa isa = vrlt_cpu::best_isa();               \
    return *(functions_for)(dtype, isa); /* no lookup by argument */    \
  }
