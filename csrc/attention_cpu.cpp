#include "attention_cpu.h"

#include "cpu_dispatch.h"

namespace vrlt_attention {
VRLT_DISPATCH(Functions)
}  // namespace vrlt_attention
