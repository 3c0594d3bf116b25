#include "decode_cpu.h"

#include "cpu_dispatch.h"

namespace vrlt_decode {
VRLT_DISPATCH(Functions)
}  // namespace vrlt_decode
