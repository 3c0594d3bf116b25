// Body of the kernels of pointwise_cpu.h, compiled once per instruction set as row_cpu_kernels.h is.
#include <cmath>

#include "cpu_lanes.h"
#include "pointwise_cpu.h"

namespace vrlt_pointwise {
namespace VRLT_ISA {

using namespace vrlt_cpu::VRLT_ISA;

// A vector at x of which `count` components are there; the others are 0.
template <typename S>
static inline Vec<typename S::T> read(const void* x, int64_t i, int64_t count) {
  const auto* from = static_cast<const typename S::Raw*>(x) + i;
  if (count >= W<typename S::T>) return S::load(from);
  typename S::Raw some[W<typename S::T>] = {};
  memcpy(some, from, count * sizeof(some[0]));
  return S::load(some);
}

template <typename S>
static inline void write(void* x, int64_t i, int64_t count, Vec<typename S::T> v) {
  auto* to = static_cast<typename S::Raw*>(x) + i;
  if (count >= W<typename S::T>) return S::store(to, v);
  typename S::Raw some[W<typename S::T>];
  S::store(some, v);
  memcpy(to, some, count * sizeof(some[0]));
}

template <typename T>
static inline T across(Vec<T> v) {
  T sum = 0;
  for (int64_t lane = 0; lane < W<T>; ++lane) sum += v[lane];
  return sum;
}

template <typename S>
static void norm(const Norm& n, void* out, double eps, int64_t begin, int64_t end) {
  using T = typename S::T;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t at = row * n.dim;
    Vec<T> squares = {};
    for (int64_t c = 0; c < n.dim; c += W<T>) {
      const Vec<T> x = read<S>(n.x, at + c, n.dim - c);
      squares += x * x;
    }
    const T rstd = T(1) / std::sqrt(across<T>(squares) / static_cast<T>(n.dim) + static_cast<T>(eps));
    static_cast<T*>(n.rstd)[row] = rstd;
    for (int64_t c = 0; c < n.dim; c += W<T>)
      write<S>(out, at + c, n.dim - c, read<S>(n.x, at + c, n.dim - c) * rstd * read<S>(n.weight, c, n.dim - c));
  }
}

template <typename S>
static void norm_backward(const Norm& n, const void* grad, void* dx, void* sums_, int64_t begin, int64_t end) {
  using T = typename S::T;
  T* sums = static_cast<T*>(sums_);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t at = row * n.dim;
    const T rstd = static_cast<const T*>(n.rstd)[row];
    Vec<T> along = {};
    for (int64_t c = 0; c < n.dim; c += W<T>) {
      const int64_t left = n.dim - c;
      const Vec<T> x = read<S>(n.x, at + c, left) * rstd, g = read<S>(grad, at + c, left);
      along += x * g * read<S>(n.weight, c, left);
      const Vec<T> more = x * g;
      if (left >= W<T>)
        store<T>(sums + c, load<T>(sums + c) + more);
      else
        for (int64_t lane = 0; lane < left; ++lane) sums[c + lane] += more[lane];
    }
    const T mean = across<T>(along) / static_cast<T>(n.dim);
    for (int64_t c = 0; c < n.dim; c += W<T>) {
      const int64_t left = n.dim - c;
      const Vec<T> x = read<S>(n.x, at + c, left) * rstd;
      const Vec<T> g = read<S>(grad, at + c, left) * read<S>(n.weight, c, left);
      write<S>(dx, at + c, left, (g - x * mean) * rstd);
    }
  }
}

template <typename T>
static inline Vec<T> sigmoid(Vec<T> x) {
  const Vec<T> zero = {}, e = exp_vec<T>(clamp_vec<T>(x < zero ? x : -x));
  return (x < zero ? e : zero + T(1)) / (e + T(1));
}

template <typename S>
static void swiglu(void* out, const void* gate, const void* up, int64_t n) {
  using T = typename S::T;
  for (int64_t i = 0; i < n; i += W<T>) {
    const Vec<T> g = read<S>(gate, i, n - i);
    write<S>(out, i, n - i, g * sigmoid<T>(g) * read<S>(up, i, n - i));
  }
}

template <typename S>
static void swiglu_backward(
    void* dgate, void* dup, const void* grad, const void* gate, const void* up, int64_t n) {
  using T = typename S::T;
  for (int64_t i = 0; i < n; i += W<T>) {
    const Vec<T> g = read<S>(gate, i, n - i), by = read<S>(grad, i, n - i), s = sigmoid<T>(g);
    write<S>(dup, i, n - i, by * g * s);
    write<S>(dgate, i, n - i, by * read<S>(up, i, n - i) * s * (T(1) + g * (T(1) - s)));
  }
}

template <typename S>
constexpr Functions table() {
  return {sizeof(typename S::T), norm<S>, norm_backward<S>, add_parts<S>, swiglu<S>, swiglu_backward<S>};
}

static const Functions tables[] = {table<Float>(), table<BFloat16>(), table<Double>()};

extern const Functions* const functions = tables;

}  // namespace VRLT_ISA
}  // namespace vrlt_pointwise
