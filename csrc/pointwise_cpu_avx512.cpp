#define VRLT_ISA avx512
#define VRLT_VECTOR_BYTES 64
#include "pointwise_cpu_kernels.h"
