#define VRLT_ISA avx2
#define VRLT_VECTOR_BYTES 32
#include "pointwise_cpu_kernels.h"
