// The ops `vrlt_native::*`: schemas, and their CPU implementations over row_cpu.h. What they compute: row_core.h.
#include <algorithm>
#include <cmath>
#include <tuple>

#include "cpu_binding.h"

namespace vrlt_binding {

// Raised with the schemas; _native.py refuses a library that says another number.
constexpr int64_t SCHEMA_VERSION = 5;

int64_t schema_version() {
  return SCHEMA_VERSION;
}

class Results {
 public:
  explicit Results(const Tensor& x) : data_(x.mutable_data_ptr()), wide_(x.scalar_type() == ScalarType::Double) {}
  void set(int64_t i, double value) const {
    if (wide_)
      static_cast<double*>(data_)[i] = value;
    else
      static_cast<float*>(data_)[i] = static_cast<float>(value);
  }

 private:
  void* data_;
  bool wide_;
};

struct Rows {
  Rows(const Tensor& logits, const Tensor& target, const Tensor& inverse)
      : count(logits.size(0)),
        width(logits.size(1)),
        bytes(logits.stride(0) * static_cast<int64_t>(logits.element_size())),
        targets(target),
        inverses(inverse),
        functions(vrlt_cpu::row_functions(cpu_dtype(logits, "logits"))) {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t t = targets.index(i);
      STD_TORCH_CHECK(
          t >= 0 && t < width, "target: got ", t, " in row ", i, ", needs a column of the vocabulary, 0 … ", width - 1);
      const double it = inverses[i];
      STD_TORCH_CHECK(
          it > 0 && std::isfinite(it), "inv_temperature: got ", it, " in row ", i, ", needs a positive finite number");
    }
  }

  template <typename F>
  void each(const F& f) const {
    const int64_t grain = std::max<int64_t>(1, 32768 / width);
    torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) f(i);
    });
  }

  int64_t count, width, bytes;
  Column targets, inverses;
  const vrlt_cpu::RowFunctions& functions;
};

std::tuple<Tensor, Tensor, Tensor, Tensor> row_stats(Tensor logits, Tensor target, Tensor inverse, bool want_p2) {
  check_row_arguments(logits, target, inverse);
  const Rows rows(logits, target, inverse);
  const Tensor logp = new_rows(logits, rows.count), entropy = new_rows(logits, rows.count);
  const Tensor lse = new_rows(logits, rows.count);
  const Tensor sum_p2 = new_rows(logits, want_p2 ? rows.count : 0);
  const Results to_logp(logp), to_entropy(entropy), to_lse(lse), to_p2(sum_p2);
  const char* base = static_cast<const char*>(logits.const_data_ptr());
  rows.each([&](int64_t i) {
    const auto s =
        rows.functions.stats(base + i * rows.bytes, rows.width, rows.targets.index(i), rows.inverses[i], want_p2);
    to_logp.set(i, s.logp);
    to_entropy.set(i, s.entropy);
    to_lse.set(i, s.lse);
    if (want_p2) to_p2.set(i, s.sum_p2);
  });
  return {logp, entropy, lse, sum_p2};
}

void row_grad_(
    Tensor out, Tensor logits, Tensor target, Tensor inverse, Tensor lse, Tensor entropy, Tensor a, Tensor e) {
  check_row_arguments(logits, target, inverse);
  check_gradient_arguments(out, logits, lse, entropy, a, e);
  const Rows rows(logits, target, inverse);
  const Column lses(lse), entropies(entropy), as(a), es(e);
  const char* from = static_cast<const char*>(logits.const_data_ptr());
  char* to = static_cast<char*>(out.mutable_data_ptr());
  const int64_t out_bytes = out.stride(0) * static_cast<int64_t>(out.element_size());
  rows.each([&](int64_t i) {
    rows.functions.gradient(
        to + i * out_bytes, from + i * rows.bytes, rows.width, rows.targets.index(i), rows.inverses[i],
        {as[i], es[i], lses[i], entropies[i]});
  });
}

std::tuple<Tensor, Tensor, Tensor> row_fused_(Tensor logits, Tensor target, Tensor inverse) {
  check_row_arguments(logits, target, inverse);
  check_writable(logits, "logits");
  const Rows rows(logits, target, inverse);
  const Tensor logp = new_rows(logits, rows.count), entropy = new_rows(logits, rows.count);
  const Tensor lse = new_rows(logits, rows.count);
  const Results to_logp(logp), to_entropy(entropy), to_lse(lse);
  char* base = static_cast<char*>(logits.mutable_data_ptr());
  rows.each([&](int64_t i) {
    const auto s = rows.functions.fused(base + i * rows.bytes, rows.width, rows.targets.index(i), rows.inverses[i]);
    to_logp.set(i, s.logp);
    to_entropy.set(i, s.entropy);
    to_lse.set(i, s.lse);
  });
  return {logp, entropy, lse};
}

}  // namespace vrlt_binding

STABLE_TORCH_LIBRARY(vrlt_native, m) {
  m.def("schema_version() -> int");
  m.def(
      "row_stats(Tensor logits, Tensor target, Tensor inv_temperature, bool want_p2) -> "
      "(Tensor logp, Tensor entropy, Tensor lse, Tensor sum_p2)");
  m.def(
      "row_grad_(Tensor(a!) out, Tensor logits, Tensor target, Tensor inv_temperature, Tensor lse, Tensor entropy, "
      "Tensor a, Tensor e) -> ()");
  m.def(
      "row_fused_(Tensor(a!) logits, Tensor target, Tensor inv_temperature) -> "
      "(Tensor logp, Tensor entropy, Tensor lse)");
}

STABLE_TORCH_LIBRARY_IMPL(vrlt_native, CompositeExplicitAutograd, m) {
  m.impl("schema_version", TORCH_BOX(&vrlt_binding::schema_version));
}

STABLE_TORCH_LIBRARY_IMPL(vrlt_native, CPU, m) {
  m.impl("row_stats", TORCH_BOX(&vrlt_binding::row_stats));
  m.impl("row_grad_", TORCH_BOX(&vrlt_binding::row_grad_));
  m.impl("row_fused_", TORCH_BOX(&vrlt_binding::row_fused_));
}
