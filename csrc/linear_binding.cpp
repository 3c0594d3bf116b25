// The op `vrlt_native::linear_rows` over linear_cpu.h.
#include <memory>
#include <optional>

#include "cpu_ops.h"

namespace vrlt_binding {

Matrix matrix(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(
      x.dim() == 2 && (x.size(1) < 2 || x.stride(1) == 1), name, ": needs two dimensions and contiguous rows");
  return {const_cast<void*>(x.const_data_ptr()), x.size(0), x.size(1), x.stride(0)};
}

void multiply_all(
    const vrlt_linear::Functions& functions, const Matrix& x, const std::vector<Product>& products, bool add) {
  constexpr int64_t COLUMNS = 64;  // of a unit
  const std::unique_ptr<char[]> packed(new char[functions.packed_bytes(x.rows, x.columns)]);
  functions.pack(packed.get(), x);
  int64_t units = 0, columns = 0;
  for (const Product& p : products) {
    units += (p.weight.rows + COLUMNS - 1) / COLUMNS;
    columns += p.weight.rows;
  }
  spread(units, x.rows * x.columns * columns, [&](int64_t i) {
    const Product* p = products.data();
    for (int64_t here; i >= (here = (p->weight.rows + COLUMNS - 1) / COLUMNS); ++p) i -= here;
    functions.multiply(
        p->out, packed.get(), p->weight, p->bias, add, i * COLUMNS, std::min((i + 1) * COLUMNS, p->weight.rows));
  });
}

Tensor linear_rows(Tensor x, Tensor weight, std::optional<Tensor> bias) {
  const auto& functions = vrlt_linear::functions(cpu_dtype(x, "x"));
  const Matrix rows = matrix(x, "x"), weights = matrix(weight, "weight");
  STD_TORCH_CHECK(
      rows.columns == weights.columns, "weight: got ", weights.columns, " columns, x has ", rows.columns);
  STD_TORCH_CHECK(
      weight.scalar_type() == x.scalar_type() && weight.device().type() == x.device().type(),
      "weight: needs dtype and device of x");
  const void* shift = nullptr;
  if (bias.has_value()) {
    STD_TORCH_CHECK(
        bias->dim() == 1 && bias->size(0) == weights.rows && bias->is_contiguous() &&
            bias->scalar_type() == x.scalar_type() && bias->device().type() == x.device().type(),
        "bias: needs a contiguous [", weights.rows, "] of dtype and device of x");
    shift = bias->const_data_ptr();
  }
  const Tensor out = torch::stable::new_empty(x, {rows.rows, weights.rows});
  if (rows.rows > 0 && weights.rows > 0) multiply_all(functions, rows, {{matrix(out, "out"), weights, shift}});
  return out;
}

}  // namespace vrlt_binding

STABLE_TORCH_LIBRARY_FRAGMENT(vrlt_native, m) {
  m.def("linear_rows(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(vrlt_native, CPU, m) {
  m.impl("linear_rows", TORCH_BOX(&vrlt_binding::linear_rows));
}
