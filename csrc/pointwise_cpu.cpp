#include "pointwise_cpu.h"

#include "cpu_dispatch.h"

namespace vrlt_pointwise {
VRLT_DISPATCH(Functions)
}  // namespace vrlt_pointwise
