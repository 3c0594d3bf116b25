// Body of the CPU decode kernels, compiled once per instruction set as row_cpu_kernels.h is.
//
#include <cmath>

#include "cpu_lanes.h"
#include "decode_cpu.h"

namespace vrlt_decode {
namespace VRLT_ISA {

using namespace vrlt_cpu::VRLT_ISA;

constexpr int64_t BLOCK = 64;  // keys whose scores exist at a time

// V vectors of query vectors over the keys of a unit.
template <typename S, int V>
struct Tile {
  using T = typename S::T;
  static constexpr int64_t LANES = V * W<T>;
  alignas(64) T query[MAX_DIM * LANES], out[MAX_DIM * LANES], scores[BLOCK * LANES];
  Vec<T> max[V], sum[V];

  // Query vectors `first` to `first + count` of the unit, vector i being head i % ratio of row i / ratio.
  void load_queries(const Queries& queries, const Unit& unit, const Shape& shape, int64_t first, int64_t count) {
    const T scale = static_cast<T>(shape.scale);
    const auto* data = static_cast<const typename S::Raw*>(queries.data);
    for (int64_t lane = 0; lane < LANES; ++lane) {
      const int64_t i = first + lane;
      const auto* from = data + (unit.first_row + i / shape.ratio) * queries.row +
                         (unit.kv_head * shape.ratio + i % shape.ratio) * queries.head;
      for (int64_t c = 0; c < shape.dim; ++c) query[c * LANES + lane] = lane < count ? S::scalar(from[c]) * scale : T(0);
    }
  }

  void block(const typename S::Raw* keys, const typename S::Raw* values, const Span& span, int64_t n, int64_t dim) {
    dot_all<S, V>(query, keys, span.key_stride, n, dim, scores);
    soften<T, V>(scores, n, max, sum, out, dim);
    add_values_all<S, V>(scores, values, span.value_stride, n, dim, out);
  }

  void run(const Queries& queries, const Unit& unit, const Shape& shape, const Parts& parts, int64_t first) {
    const int64_t whole = unit.rows * shape.ratio, count = whole - first < LANES ? whole - first : LANES;
    load_queries(queries, unit, shape, first, count);
    memset(out, 0, sizeof(T) * shape.dim * LANES);
    for (int v = 0; v < V; ++v) {
      max[v] = broadcast<T>(-std::numeric_limits<T>::infinity());
      sum[v] = Vec<T>{};
    }
    const Span& span = unit.span;
    const auto* keys = static_cast<const typename S::Raw*>(span.keys);
    const auto* values = static_cast<const typename S::Raw*>(span.values);
    for (int64_t j = 0; j < span.length; j += BLOCK) {
      // The next block, while this one is computed with: rows are short and lie apart, so the machine doesn't see it.
      for (int64_t i = j + BLOCK; i < span.length && i < j + 2 * BLOCK; ++i)
        for (int64_t c = 0; c < shape.dim; c += 64 / static_cast<int64_t>(sizeof(*keys))) {
          __builtin_prefetch(keys + i * span.key_stride + c);
          __builtin_prefetch(values + i * span.value_stride + c);
        }
      block(
          keys + j * span.key_stride, values + j * span.value_stride, span,
          span.length - j < BLOCK ? span.length - j : BLOCK, shape.dim);
    }
    for (int64_t lane = 0; lane < count; ++lane) {
      const int64_t row = unit.first_row + (first + lane) / shape.ratio, head = (first + lane) % shape.ratio;
      const int64_t part = parts.first_part[row] + unit.part;
      T* to = static_cast<T*>(parts.data) +
              ((part * shape.kv_heads + unit.kv_head) * shape.ratio + head) * (shape.dim + 2);
      for (int64_t c = 0; c < shape.dim; ++c) to[c] = out[c * LANES + lane];
      to[shape.dim] = max[lane / W<T>][lane % W<T>];
      to[shape.dim + 1] = sum[lane / W<T>][lane % W<T>];
    }
  }
};

template <typename S, int V>
static void run_tile(const Queries& q, const Unit& unit, const Shape& shape, const Parts& parts, int64_t first) {
  Tile<S, V> tile;
  tile.run(q, unit, shape, parts, first);
}

template <typename S>
static void attend(const Queries& queries, const Unit& unit, const Shape& shape, const Parts& parts) {
  using T = typename S::T;
  const int64_t count = unit.rows * shape.ratio;
  for (int64_t first = 0; first < count; first += MAX_VECTORS * W<T>) {
    const int64_t vectors = (count - first + W<T> - 1) / W<T>;
    if (vectors == 1)
      run_tile<S, 1>(queries, unit, shape, parts, first);
    else if (vectors == 2)
      run_tile<S, 2>(queries, unit, shape, parts, first);
    else
      run_tile<S, 3>(queries, unit, shape, parts, first);
  }
}

template <typename S>
static void merge(void* out, int64_t row, const Shape& shape, const Parts& parts) {
  using T = typename S::T;
  const int64_t begin = parts.first_part[row], end = parts.first_part[row + 1];
  const int64_t heads = shape.kv_heads * shape.ratio, size = shape.dim + 2;
  const T* data = static_cast<const T*>(parts.data);
  auto* to = static_cast<typename S::Raw*>(out);
  alignas(64) T total[MAX_DIM + W<T>];
  for (int64_t head = 0; head < heads; ++head, to += shape.dim) {
    const auto part = [&](int64_t i) { return data + (i * heads + head) * size; };
    T top = -std::numeric_limits<T>::infinity(), sum = 0;
    for (int64_t i = begin; i < end; ++i) top = part(i)[shape.dim] > top ? part(i)[shape.dim] : top;
    const T base = top == -std::numeric_limits<T>::infinity() ? T(0) : top;
    for (int64_t c = 0; c < shape.dim; ++c) total[c] = 0;
    for (int64_t i = begin; i < end; ++i) {
      const T weight = std::exp(part(i)[shape.dim] - base);
      sum += weight * part(i)[shape.dim + 1];
      for (int64_t c = 0; c < shape.dim; ++c) total[c] += weight * part(i)[c];
    }
    const T inverse = begin < end ? T(1) / sum : T(0);
    for (int64_t c = 0; c < shape.dim; c += W<T>) {
      typename S::Raw lanes[W<T>];
      S::store(lanes, load<T>(total + c) * inverse);
      const int64_t n = shape.dim - c < W<T> ? shape.dim - c : W<T>;
      memcpy(to + c, lanes, n * sizeof(lanes[0]));
    }
  }
}

template <typename S>
constexpr Functions table() {
  return {sizeof(typename S::T), attend<S>, merge<S>};
}

static const Functions tables[] = {table<Float>(), table<BFloat16>(), table<Double>()};

extern const Functions* const functions = tables;

}  // namespace VRLT_ISA
}  // namespace vrlt_decode
