// Products of a few vectors, which stand in lanes, with many rows in memory. A component of a row is broadcast and
// multiplied with that component of all vectors, so that nothing is ever added up across lanes: a lane is computed alike
// in every lane and width of tile. Included as cpu_vector.h is.
#pragma once

#include "cpu_vector.h"

namespace vrlt_cpu {
namespace VRLT_ISA {

constexpr int MAX_VECTORS = 3;  // of lanes, in a tile
constexpr int64_t CHUNK = 128;  // products that are added up one by one; their sums are added up in turn

template <typename T>
constexpr int64_t W = Lanes<T>::count;

template <typename T>
static inline Vec<T> load(const T* x) {
  Vec<T> v;
  memcpy(&v, x, sizeof(v));
  return v;
}

template <typename T>
static inline void store(T* x, Vec<T> v) {
  memcpy(x, &v, sizeof(v));
}

// Accumulators that fit in 16 registers beside the operands.
constexpr int unrolled(int vectors) {
  return vectors == 1 ? 8 : 4;
}

// out[j][lane] = sum_c x[c][lane] rows[j][c] of N rows.
template <typename S, int V, int N>
static inline void dot_rows(
    const typename S::T* x, const typename S::Raw* rows, int64_t stride, int64_t dim, typename S::T* out) {
  using T = typename S::T;
  for (int64_t begin = 0; begin == 0 || begin < dim; begin += CHUNK) {
    const int64_t end = dim - begin < CHUNK ? dim : begin + CHUNK;
    Vec<T> sum[N][V] = {};
    for (int64_t c = begin; c < end; ++c) {
      Vec<T> lanes[V];
      for (int v = 0; v < V; ++v) lanes[v] = load<T>(x + (c * V + v) * W<T>);
      for (int j = 0; j < N; ++j) {
        const T y = S::scalar(rows[j * stride + c]);
        for (int v = 0; v < V; ++v) sum[j][v] += lanes[v] * y;
      }
    }
    for (int j = 0; j < N; ++j)
      for (int v = 0; v < V; ++v) {
        T* to = out + (j * V + v) * W<T>;
        store<T>(to, begin == 0 ? sum[j][v] : load<T>(to) + sum[j][v]);
      }
  }
}

}  // namespace VRLT_ISA
}  // namespace vrlt_cpu
