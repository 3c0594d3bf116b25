// The op `vrlt_native::decode_layer`: a decoder layer of the Qwen2 and Qwen3 language models on one new token a row.
#include <cmath>
#include <cstring>
#include <optional>
#include <vector>

#include "cpu_ops.h"

namespace vrlt_binding {

// The weights of a layer in the order of decode_layer.py; an empty tensor is one that the layer doesn't have.
enum Weight {
  INPUT_NORM, Q, Q_BIAS, K, K_BIAS, V, V_BIAS, Q_NORM, K_NORM, O, O_BIAS, POST_NORM, GATE, UP, DOWN, WEIGHTS
};

static int64_t check(const Tensor& x, ScalarType type, std::vector<int64_t> size, const char* name) {
  bool fits = x.scalar_type() == type && x.is_contiguous() && x.dim() == static_cast<int64_t>(size.size()) &&
              x.device().type() == torch::headeronly::DeviceType::CPU;
  for (size_t i = 0; fits && i < size.size(); ++i) fits = size[i] < 0 || x.size(i) == size[i];
  STD_TORCH_CHECK(fits, name, ": needs a contiguous CPU tensor of the right size and the dtype of hidden");
  return x.size(0);
}

// w x / sqrt(mean(x^2) + eps)
template <typename T>
static void rms_norm(T* out, const T* x, const T* weight, int64_t columns, T eps) {
  constexpr int64_t LANES = 8;
  T squares[LANES] = {};
  int64_t c = 0;
  for (; c + LANES <= columns; c += LANES)
    for (int64_t l = 0; l < LANES; ++l) squares[l] += x[c + l] * x[c + l];
  for (; c < columns; ++c) squares[0] += x[c] * x[c];
  T sum = 0;
  for (const T part : squares) sum += part;
  const T inverse = T(1) / std::sqrt(sum / static_cast<T>(columns) + eps);
  for (c = 0; c < columns; ++c) out[c] = weight[c] * (x[c] * inverse);
}

template <typename T>
static void rms_norm_rows(const Tensor& out, const Tensor& x, const Tensor& weight, double eps) {
  auto* to = static_cast<T*>(out.mutable_data_ptr());
  const auto* from = static_cast<const T*>(x.const_data_ptr());
  const auto* by = static_cast<const T*>(weight.const_data_ptr());
  const int64_t columns = x.size(1);
  for (int64_t i = 0; i < x.size(0); ++i)
    rms_norm(to + i * columns, from + i * columns, by, columns, static_cast<T>(eps));
}

template <typename T>
static void rotate(T* x, const T* cos, const T* sin, int64_t dim) {
  const int64_t half = dim / 2;
  for (int64_t c = 0; c < half; ++c) {
    const T a = x[c], b = x[c + half];
    x[c] = a * cos[c] - b * sin[c];
    x[c + half] = b * cos[c + half] + a * sin[c + half];
  }
}

struct Sizes {
  int64_t rows, hidden, heads, kv_heads, dim, inner;
};

template <typename T>
class Layer {
 public:
  Layer(const Sizes& n, const std::vector<Tensor>& weights, double eps)
      : n_(n), weights_(weights), eps_(static_cast<T>(eps)), functions_(vrlt_linear::functions(dtype())) {}

  void multiply(const Tensor& x, int64_t columns, std::vector<Product> products, bool add = false) const {
    multiply_all(functions_, rows_of(x, columns), products, add);
  }
  Product product(const Tensor& out, Weight weight, Weight bias = WEIGHTS) const {
    const Tensor& w = weights_[weight];
    const bool with = bias != WEIGHTS && weights_[bias].numel() > 0;
    return {rows_of(out, w.size(0)), matrix(w, "weight"), with ? weights_[bias].const_data_ptr() : nullptr};
  }
  // Norm of each head, where the layer has one, and rotation.
  void heads(Tensor& x, int64_t count, Weight norm, const Tensor& cos, const Tensor& sin) const {
    for (int64_t i = 0; i < n_.rows * count; ++i) {
      T* head = data(x) + i * n_.dim;
      const int64_t row = i / count;
      if (weights_[norm].numel() > 0) rms_norm(head, head, data(weights_[norm]), n_.dim, eps_);
      rotate(head, data(cos) + row * n_.dim, data(sin) + row * n_.dim, n_.dim);
    }
  }
  void silu_multiply(Tensor& gate, const Tensor& up) const {
    functions_.silu_multiply(gate.mutable_data_ptr(), up.const_data_ptr(), n_.rows * n_.inner);
  }
  void to_cache(const Tensor& cache, const Tensor& x, const Column& slots, const Column& columns) const {
    for (int64_t i = 0; i < n_.rows; ++i)
      for (int64_t h = 0; h < n_.kv_heads; ++h)
        std::memcpy(
            static_cast<T*>(cache.mutable_data_ptr()) + slots.index(i) * cache.stride(0) + columns.index(i) * cache.stride(1) + h * cache.stride(2),
            data(x) + (i * n_.kv_heads + h) * n_.dim, n_.dim * sizeof(T));
  }

 private:
  static vrlt_cpu::DType dtype() { return sizeof(T) == 8 ? vrlt_cpu::DType::f64 : vrlt_cpu::DType::f32; }
  static T* data(const Tensor& x) { return const_cast<T*>(static_cast<const T*>(x.const_data_ptr())); }
  Matrix rows_of(const Tensor& x, int64_t columns) const { return {data(x), n_.rows, columns, columns}; }

  const Sizes& n_;
  const std::vector<Tensor>& weights_;
  T eps_;
  const vrlt_linear::Functions& functions_;
};

static Sizes check_weights(const Tensor& hidden, const std::vector<Tensor>& w, int64_t kv_heads, int64_t dim) {
  STD_TORCH_CHECK(w.size() == WEIGHTS, "weights: got ", w.size(), " tensors, needs ", static_cast<int>(WEIGHTS));
  STD_TORCH_CHECK(hidden.dim() == 2, "hidden: needs [rows, hidden]");
  const ScalarType type = hidden.scalar_type();
  STD_TORCH_CHECK(
      type == ScalarType::Float || type == ScalarType::Double, "hidden: got ", torch::headeronly::toString(type),
      ", needs float32 or float64");
  const int64_t size = hidden.size(1);
  check(hidden, type, {-1, size}, "hidden");
  const int64_t wide = check(w[Q], type, {-1, size}, "q_proj"), inner = check(w[GATE], type, {-1, size}, "gate_proj");
  STD_TORCH_CHECK(
      dim > 0 && dim % 2 == 0 && kv_heads > 0 && wide > 0 && wide % (dim * kv_heads) == 0, "q_proj: got ", wide,
      " rows for ", kv_heads, " KV heads of ", dim);
  const auto optional = [&](Weight i, int64_t count, const char* name) {
    if (w[i].numel() > 0) check(w[i], type, {count}, name);
  };
  check(w[INPUT_NORM], type, {size}, "input_layernorm");
  check(w[K], type, {kv_heads * dim, size}, "k_proj");
  check(w[V], type, {kv_heads * dim, size}, "v_proj");
  check(w[O], type, {size, wide}, "o_proj");
  check(w[POST_NORM], type, {size}, "post_attention_layernorm");
  check(w[UP], type, {inner, size}, "up_proj");
  check(w[DOWN], type, {size, inner}, "down_proj");
  optional(Q_BIAS, wide, "q_proj.bias");
  optional(K_BIAS, kv_heads * dim, "k_proj.bias");
  optional(V_BIAS, kv_heads * dim, "v_proj.bias");
  optional(O_BIAS, size, "o_proj.bias");
  optional(Q_NORM, dim, "q_norm");
  optional(K_NORM, dim, "k_norm");
  return {hidden.size(0), size, wide / dim, kv_heads, dim, inner};
}

static void check_places(const Tensor& slots, const Tensor& columns, const Tensor& cache, const Sizes& n) {
  for (const Tensor* x : {&slots, &columns})
    STD_TORCH_CHECK(
        x->dim() == 1 && x->size(0) == n.rows && x->scalar_type() == ScalarType::Long &&
            x->device().type() == torch::headeronly::DeviceType::CPU,
        "slots, columns: need int64 [rows] on the CPU");
  const Column slot(slots), column(columns);
  for (int64_t i = 0; i < n.rows; ++i)
    STD_TORCH_CHECK(
        slot.index(i) >= 0 && slot.index(i) < cache.size(0) && column.index(i) >= 0 &&
            column.index(i) < cache.size(1),
        "slots, columns: row ", i, " lies outside of the cache");
}

template <typename T>
static Tensor run_layer(
    const Sizes& n, const std::vector<Tensor>& weights, const Tensor& hidden, const Tensor& cos, const Tensor& sin,
    const std::vector<Tensor>& caches, const std::vector<Tensor>& numbers, double scale, double eps,
    int64_t max_group) {
  const Layer<T> layer(n, weights, eps);
  const auto make = [&](std::initializer_list<int64_t> size) { return torch::stable::new_empty(hidden, size); };
  Tensor normed = make({n.rows, n.hidden}), query = make({n.rows, n.heads, n.dim});
  Tensor key = make({n.rows, n.kv_heads, n.dim}), value = make({n.rows, n.kv_heads, n.dim});
  rms_norm_rows<T>(normed, hidden, weights[INPUT_NORM], eps);
  layer.multiply(
      normed, n.hidden,
      {layer.product(query, Q, Q_BIAS), layer.product(key, K, K_BIAS), layer.product(value, V, V_BIAS)});
  layer.heads(query, n.heads, Q_NORM, cos, sin);
  layer.heads(key, n.kv_heads, K_NORM, cos, sin);
  const Column slots(numbers[3]), columns(numbers[4]);
  layer.to_cache(caches[2], key, slots, columns);
  layer.to_cache(caches[3], value, slots, columns);
  const Tensor attended = group_decode(
      query, caches[0], caches[1], caches[2], caches[3], numbers[0], numbers[1], numbers[2], numbers[3], numbers[5],
      scale, max_group);
  Tensor out = make({n.rows, n.hidden});
  std::memcpy(out.mutable_data_ptr(), hidden.const_data_ptr(), n.rows * n.hidden * sizeof(T));
  layer.multiply(attended, n.heads * n.dim, {layer.product(out, O, O_BIAS)}, true);
  rms_norm_rows<T>(normed, out, weights[POST_NORM], eps);
  Tensor gate = make({n.rows, n.inner}), up = make({n.rows, n.inner});
  layer.multiply(normed, n.hidden, {layer.product(gate, GATE), layer.product(up, UP)});
  layer.silu_multiply(gate, up);
  layer.multiply(gate, n.inner, {layer.product(out, DOWN)}, true);
  return out;
}

Tensor decode_layer(
    Tensor hidden, std::vector<Tensor> weights, Tensor cos, Tensor sin, std::vector<Tensor> caches,
    std::vector<Tensor> numbers, double scale, double eps, int64_t max_group) {
  STD_TORCH_CHECK(caches.size() == 4 && numbers.size() == 6, "needs 4 caches and 6 tensors of integers");
  STD_TORCH_CHECK(caches[2].dim() == 4 && caches[3].dim() == 4, "suffix_key, suffix_value: need four dimensions");
  const Sizes n = check_weights(hidden, weights, caches[2].size(2), caches[2].size(3));
  const ScalarType type = hidden.scalar_type();
  check(cos, type, {n.rows, n.dim}, "cos");
  check(sin, type, {n.rows, n.dim}, "sin");
  for (const Tensor& cache : {caches[2], caches[3]}) {
    STD_TORCH_CHECK(
        cache.size(2) == n.kv_heads && cache.size(3) == n.dim && cache.stride(3) == 1 && cache.scalar_type() == type,
        "suffix_key, suffix_value: need [slots, columns, ", n.kv_heads, ", ", n.dim, "] in the dtype of hidden");
    check_places(numbers[3], numbers[4], cache, n);
  }
  if (n.rows == 0) return torch::stable::new_empty(hidden, {0, n.hidden});
  if (type == ScalarType::Double)
    return run_layer<double>(n, weights, hidden, cos, sin, caches, numbers, scale, eps, max_group);
  return run_layer<float>(n, weights, hidden, cos, sin, caches, numbers, scale, eps, max_group);
}

// The head on the final norm of hidden.
Tensor decode_head(Tensor hidden, Tensor norm, Tensor weight, std::optional<Tensor> bias, double eps) {
  const ScalarType type = hidden.scalar_type();
  const int64_t rows = check(hidden, type, {-1, -1}, "hidden"), columns = hidden.size(1);
  check(norm, type, {columns}, "norm");
  const Tensor normed = torch::stable::new_empty(hidden, {rows, columns});
  if (type == ScalarType::Double)
    rms_norm_rows<double>(normed, hidden, norm, eps);
  else if (type == ScalarType::Float)
    rms_norm_rows<float>(normed, hidden, norm, eps);
  else
    STD_TORCH_CHECK(false, "hidden: got ", torch::headeronly::toString(type), ", needs float32 or float64");
  return linear_rows(normed, weight, bias);
}

}  // namespace vrlt_binding

STABLE_TORCH_LIBRARY_FRAGMENT(vrlt_native, m) {
  m.def(
      "decode_layer(Tensor hidden, Tensor[] weights, Tensor cos, Tensor sin, Tensor(a!)[] caches, Tensor[] numbers, "
      "float scale, float eps, int max_group) -> Tensor");
  m.def("decode_head(Tensor hidden, Tensor norm, Tensor weight, Tensor? bias, float eps) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(vrlt_native, CPU, m) {
  m.impl("decode_layer", TORCH_BOX(&vrlt_binding::decode_layer));
  m.impl("decode_head", TORCH_BOX(&vrlt_binding::decode_head));
}
