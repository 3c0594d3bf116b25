#include "linear_cpu.h"

#include "cpu_dispatch.h"

namespace vrlt_linear {
VRLT_DISPATCH(Functions)
}  // namespace vrlt_linear
