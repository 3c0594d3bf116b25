// The ops `vrlt_native::rms_norm` and `vrlt_native::swiglu` with their backward passes, over pointwise_cpu.h.
#include <algorithm>
#include <tuple>
#include <vector>

#include "cpu_binding.h"
#include "pointwise_cpu.h"

namespace vrlt_binding {

using vrlt_pointwise::Functions;
using vrlt_pointwise::Norm;

static void check_like(const Tensor& x, const Tensor& like, const char* name) {
  STD_TORCH_CHECK(
      x.scalar_type() == like.scalar_type() && x.numel() == like.numel() && x.is_contiguous() &&
          x.device().type() == torch::headeronly::DeviceType::CPU,
      name, ": needs a contiguous tensor of ", like.numel(), " values on the CPU, of the first one's dtype");
}

static Norm norm_of(const Tensor& x, const Tensor& weight, const Tensor& rstd) {
  check_like(x, x, "x");
  STD_TORCH_CHECK(x.dim() == 2, "x: needs [rows, dim]");
  STD_TORCH_CHECK(
      weight.dim() == 1 && weight.size(0) == x.size(1) && weight.scalar_type() == x.scalar_type() &&
          weight.is_contiguous(),
      "weight: needs a contiguous [", x.size(1), "] of the dtype of x");
  STD_TORCH_CHECK(
      rstd.dim() == 1 && rstd.size(0) == x.size(0) && rstd.is_contiguous() && rstd.scalar_type() == result_type(x),
      "rstd: needs what rms_norm gave");
  return {x.const_data_ptr(), weight.const_data_ptr(), const_cast<void*>(rstd.const_data_ptr()), x.size(1)};
}

constexpr int64_t ROWS = 64;  // of a unit: fixed, so that sums over rows don't depend on threads

std::tuple<Tensor, Tensor> rms_norm(Tensor x, Tensor weight, double eps) {
  STD_TORCH_CHECK(x.dim() == 2, "x: needs [rows, dim]");
  const Tensor out = torch::stable::new_empty(x, {x.size(0), x.size(1)});
  const Tensor rstd = torch::stable::new_empty(x, {x.size(0)}, result_type(x));
  const Norm norm = norm_of(x, weight, rstd);
  const Functions& functions = vrlt_pointwise::functions(cpu_dtype(x, "x"));
  const int64_t rows = x.size(0);
  spread((rows + ROWS - 1) / ROWS, 8 * x.numel(), [&](int64_t i) {
    functions.norm(norm, out.mutable_data_ptr(), eps, i * ROWS, std::min(rows, (i + 1) * ROWS));
  });
  return {out, rstd};
}

std::tuple<Tensor, Tensor> rms_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor rstd) {
  const Norm norm = norm_of(x, weight, rstd);
  check_like(grad, x, "grad");
  const Tensor dx = torch::stable::new_empty(x, {x.size(0), x.size(1)});
  const Tensor dweight = torch::stable::new_empty(x, {x.size(1)});
  const Functions& functions = vrlt_pointwise::functions(cpu_dtype(x, "x"));
  const int64_t rows = x.size(0), units = (rows + ROWS - 1) / ROWS, bytes = norm.dim * functions.compute_bytes;
  std::vector<char> sums(units * bytes);
  spread(units, 16 * x.numel(), [&](int64_t i) {
    functions.norm_backward(
        norm, grad.const_data_ptr(), dx.mutable_data_ptr(), sums.data() + i * bytes, i * ROWS,
        std::min(rows, (i + 1) * ROWS));
  });
  functions.add(dweight.mutable_data_ptr(), sums.data(), units, norm.dim, norm.dim);
  return {dx, dweight};
}

constexpr int64_t VALUES = 1 << 14;  // of a unit

template <typename F>
static void pieces(const Tensor& x, int64_t cost, const F& f) {
  const int64_t n = x.numel(), bytes = static_cast<int64_t>(x.element_size());
  spread((n + VALUES - 1) / VALUES, cost * n, [&](int64_t i) {
    f(i * VALUES * bytes, std::min(VALUES, n - i * VALUES));
  });
}

static const char* from(const Tensor& x, int64_t byte) {
  return static_cast<const char*>(x.const_data_ptr()) + byte;
}

static char* into(const Tensor& x, int64_t byte) {
  return static_cast<char*>(x.mutable_data_ptr()) + byte;
}

Tensor swiglu(Tensor gate, Tensor up) {
  check_like(gate, gate, "gate");
  check_like(up, gate, "up");
  const Functions& functions = vrlt_pointwise::functions(cpu_dtype(gate, "gate"));
  const Tensor out = torch::stable::empty_like(gate);
  pieces(gate, 32, [&](int64_t at, int64_t n) { functions.swiglu(into(out, at), from(gate, at), from(up, at), n); });
  return out;
}

std::tuple<Tensor, Tensor> swiglu_backward(Tensor grad, Tensor gate, Tensor up) {
  check_like(gate, gate, "gate");
  check_like(up, gate, "up");
  check_like(grad, gate, "grad");
  const Functions& functions = vrlt_pointwise::functions(cpu_dtype(gate, "gate"));
  const Tensor dgate = torch::stable::empty_like(gate), dup = torch::stable::empty_like(gate);
  pieces(gate, 48, [&](int64_t at, int64_t n) {
    functions.swiglu_backward(into(dgate, at), into(dup, at), from(grad, at), from(gate, at), from(up, at), n);
  });
  return {dgate, dup};
}

}  // namespace vrlt_binding

STABLE_TORCH_LIBRARY_FRAGMENT(vrlt_native, m) {
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor out, Tensor rstd)");
  m.def("rms_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor rstd) -> (Tensor x, Tensor weight)");
  m.def("swiglu(Tensor gate, Tensor up) -> Tensor");
  m.def("swiglu_backward(Tensor grad, Tensor gate, Tensor up) -> (Tensor gate, Tensor up)");
}

STABLE_TORCH_LIBRARY_IMPL(vrlt_native, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&vrlt_binding::rms_norm));
  m.impl("rms_norm_backward", TORCH_BOX(&vrlt_binding::rms_norm_backward));
  m.impl("swiglu", TORCH_BOX(&vrlt_binding::swiglu));
  m.impl("swiglu_backward", TORCH_BOX(&vrlt_binding::swiglu_backward));
}
