// Body of the CPU kernels of linear_cpu.h, compiled once per instruction set as row_cpu_kernels.h is.
#include "cpu_lanes.h"
#include "linear_cpu.h"

namespace vrlt_linear {
namespace VRLT_ISA {

using namespace vrlt_cpu::VRLT_ISA;

// Rows of x are cut into tiles of MAX_VECTORS vectors of lanes, the last one narrower. Calls f(first row, vectors).
template <typename T, typename F>
static inline void each_tile(int64_t rows, const F& f) {
  for (int64_t first = 0; first < rows; first += MAX_VECTORS * W<T>) {
    const int64_t vectors = (rows - first + W<T> - 1) / W<T>;
    f(first, vectors < MAX_VECTORS ? vectors : MAX_VECTORS);
  }
}

template <typename S>
static int64_t packed_bytes(int64_t rows, int64_t columns) {
  constexpr int64_t lanes = W<typename S::T>;
  return (rows + lanes - 1) / lanes * lanes * columns * static_cast<int64_t>(sizeof(typename S::T));
}

template <typename S>
static void pack(void* packed, const Matrix& x) {
  using T = typename S::T;
  const auto* from = static_cast<const typename S::Raw*>(x.data);
  each_tile<T>(x.rows, [&](int64_t first, int64_t vectors) {
    const int64_t lanes = vectors * W<T>;
    T* tile = static_cast<T*>(packed) + first * x.columns;
    for (int64_t lane = 0; lane < lanes; ++lane)
      for (int64_t c = 0; c < x.columns; ++c)
        tile[c * lanes + lane] = first + lane < x.rows ? S::scalar(from[(first + lane) * x.stride + c]) : T(0);
  });
}

template <typename S, int V, int N>
static inline void column(
    const Matrix& out, const typename S::T* tile, const Matrix& weight, const typename S::Raw* bias, bool add,
    int64_t first, int64_t at) {
  using T = typename S::T;
  alignas(64) T sums[N * V * W<T>];
  dot_rows<S, V, N>(
      tile, static_cast<const typename S::Raw*>(weight.data) + at * weight.stride, weight.stride, weight.columns, sums);
  auto* to = static_cast<typename S::Raw*>(out.data) + first * out.stride + at;
  const int64_t rows = out.rows - first < V * W<T> ? out.rows - first : V * W<T>;
  for (int j = 0; j < N; ++j)
    for (int v = 0; v < V; ++v) {
      const int64_t count = rows - v * W<T> < W<T> ? rows - v * W<T> : W<T>;
      auto* at_lane = to + v * W<T> * out.stride + j;
      alignas(64) T sum[W<T>];
      store<T>(sum, load<T>(sums + (j * V + v) * W<T>) + (bias == nullptr ? T(0) : S::scalar(bias[at + j])));
      for (int64_t lane = 0; add && lane < count; ++lane) sum[lane] += S::scalar(at_lane[lane * out.stride]);
      typename S::Raw lanes[W<T>];
      S::store(lanes, load<T>(sum));
      for (int64_t lane = 0; lane < count; ++lane) at_lane[lane * out.stride] = lanes[lane];
    }
}

template <typename S, int V>
static void multiply_tile(
    const Matrix& out, const typename S::T* tile, const Matrix& weight, const typename S::Raw* bias, bool add,
    int64_t first, int64_t begin, int64_t end) {
  constexpr int N = unrolled(V);
  for (; begin + N <= end; begin += N) column<S, V, N>(out, tile, weight, bias, add, first, begin);
  for (; begin < end; ++begin) column<S, V, 1>(out, tile, weight, bias, add, first, begin);
}

template <typename S>
static void multiply(
    const Matrix& out, const void* packed, const Matrix& weight, const void* bias_, bool add, int64_t begin,
    int64_t end) {
  using T = typename S::T;
  const auto* bias = static_cast<const typename S::Raw*>(bias_);
  each_tile<T>(out.rows, [&](int64_t first, int64_t vectors) {
    const T* tile = static_cast<const T*>(packed) + first * weight.columns;
    if (vectors == 1)
      multiply_tile<S, 1>(out, tile, weight, bias, add, first, begin, end);
    else if (vectors == 2)
      multiply_tile<S, 2>(out, tile, weight, bias, add, first, begin, end);
    else
      multiply_tile<S, 3>(out, tile, weight, bias, add, first, begin, end);
  });
}

template <typename S>
static void silu_multiply(void* gate_, const void* up_, int64_t n) {
  using T = typename S::T;
  auto* gate = static_cast<typename S::Raw*>(gate_);
  const auto* up = static_cast<const typename S::Raw*>(up_);
  for (int64_t i = 0; i < n; i += W<T>) {
    typename S::Raw x[W<T>] = {}, y[W<T>] = {};
    const int64_t count = n - i < W<T> ? n - i : W<T>;
    memcpy(x, gate + i, count * sizeof(x[0]));
    memcpy(y, up + i, count * sizeof(y[0]));
    const Vec<T> g = S::load(x), zero = {};
    const Vec<T> e = exp_vec<T>(clamp_vec<T>(g < zero ? g : -g));
    S::store(x, g * (g < zero ? e : zero + T(1)) / (e + T(1)) * S::load(y));
    memcpy(gate + i, x, count * sizeof(x[0]));
  }
}

template <typename S>
constexpr Functions table() {
  return {packed_bytes<S>, pack<S>, multiply<S>, silu_multiply<S>};
}

static const Functions tables[] = {table<Float>(), table<BFloat16>(), table<Double>()};

extern const Functions* const functions = tables;

}  // namespace VRLT_ISA
}  // namespace vrlt_linear
