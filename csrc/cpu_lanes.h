// Products of a few vectors, which stand in lanes, with many rows in memory. A component of a row is broadcast and
// multiplied with that component of all vectors, so that nothing is ever added up across lanes: a lane is computed alike
// in every lane and width of tile. A softmax goes over such products in every lane by itself. Included as cpu_vector.h is.
#pragma once

#include <limits>

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

// out[c] = sum_p parts[p * stride + c] of dim components, in the storage type.
template <typename S>
static void add_parts(void* out, const void* parts, int64_t count, int64_t stride, int64_t dim) {
  using T = typename S::T;
  for (int64_t c = 0; c < dim; ++c) {
    T sum = 0;
    for (int64_t p = 0; p < count; ++p) sum += static_cast<const T*>(parts)[p * stride + c];
    static_cast<typename S::Raw*>(out)[c] = S::raw(sum);
  }
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

// The same for any number of rows.
template <typename S, int V>
static inline void dot_all(
    const typename S::T* x, const typename S::Raw* rows, int64_t stride, int64_t count, int64_t dim,
    typename S::T* out) {
  constexpr int N = unrolled(V);
  int64_t j = 0;
  for (; j + N <= count; j += N) dot_rows<S, V, N>(x, rows + j * stride, stride, dim, out + j * V * W<typename S::T>);
  for (; j < count; ++j) dot_rows<S, V, 1>(x, rows + j * stride, stride, dim, out + j * V * W<typename S::T>);
}

// out[c][lane] += sum_j p[j][lane] rows[j][c] of N components.
template <typename S, int V, int N>
static inline void add_values(
    const typename S::T* p, const typename S::Raw* rows, int64_t stride, int64_t count, typename S::T* out) {
  using T = typename S::T;
  Vec<T> sum[N][V] = {};
  for (int64_t j = 0; j < count; ++j) {
    Vec<T> x[V];
    for (int v = 0; v < V; ++v) x[v] = load<T>(p + (j * V + v) * W<T>);
    for (int c = 0; c < N; ++c) {
      const T y = S::scalar(rows[j * stride + c]);
      for (int v = 0; v < V; ++v) sum[c][v] += x[v] * y;
    }
  }
  for (int c = 0; c < N; ++c)
    for (int v = 0; v < V; ++v) {
      T* to = out + (c * V + v) * W<T>;
      store<T>(to, load<T>(to) + sum[c][v]);
    }
}

// The same for all components.
template <typename S, int V>
static inline void add_values_all(
    const typename S::T* p, const typename S::Raw* rows, int64_t stride, int64_t count, int64_t dim,
    typename S::T* out) {
  constexpr int N = unrolled(V);
  int64_t c = 0;
  for (; c + N <= dim; c += N) add_values<S, V, N>(p, rows + c, stride, count, out + c * V * W<typename S::T>);
  for (; c < dim; ++c) add_values<S, V, 1>(p, rows + c, stride, count, out + c * V * W<typename S::T>);
}

// One step of a running softmax: scores [count][lane] become weights below a maximum that may rise, and what was summed
// up under the old one (sum, out [dim][lane]) is scaled down. Scores of -inf weigh nothing, also where there are no
// others yet.
template <typename T, int V>
static inline void soften(T* scores, int64_t count, Vec<T>* max, Vec<T>* sum, T* out, int64_t dim) {
  Vec<T> factor[V];
  for (int v = 0; v < V; ++v) {
    Vec<T> top = max[v];
    for (int64_t j = 0; j < count; ++j) {
      const Vec<T> s = load<T>(scores + (j * V + v) * W<T>);
      top = s > top ? s : top;
    }
    const Vec<T> base = top == broadcast<T>(-std::numeric_limits<T>::infinity()) ? Vec<T>{} : top;
    factor[v] = exp_vec<T>(clamp_vec<T>(max[v] - base));
    max[v] = top;
    Vec<T> total = {};
    for (int64_t j = 0; j < count; ++j) {
      T* at = scores + (j * V + v) * W<T>;
      const Vec<T> e = exp_vec<T>(clamp_vec<T>(load<T>(at) - base));
      total += e;
      store<T>(at, e);
    }
    sum[v] = sum[v] * factor[v] + total;
  }
  for (int64_t c = 0; c < dim; ++c)
    for (int v = 0; v < V; ++v) {
      T* at = out + (c * V + v) * W<T>;
      store<T>(at, load<T>(at) * factor[v]);
    }
}

}  // namespace VRLT_ISA
}  // namespace vrlt_cpu
