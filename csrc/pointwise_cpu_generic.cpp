#define VRLT_ISA generic
#define VRLT_VECTOR_BYTES 16
#include "pointwise_cpu_kernels.h"
