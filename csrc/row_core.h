// Mathematics of one row of logits, torch-free, for the host and for CUDA.
//
// With d = (x - max) * scale and e = exp(d), a slice of a row is summarised by
//     max, sum e, sum d e, sum e^2
// Slices merge exactly; the whole row gives
//     logp = d_target - log(sum e)        entropy = log(sum e) - sum d e / sum e
//     lse  = max * scale + log(sum e)     sum p^2 = sum e^2 / (sum e)^2
// and the gradient of a * logp + e * entropy with respect to z = x / T is  a (onehot - p) - e p (log p + entropy).
//
// x - max is taken before scaling, so large logits cost no accuracy. An element of -inf adds exactly nothing, a NaN (or
// +inf) makes every result of its row NaN.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define VRLT_HD __host__ __device__ __forceinline__
#else
#define VRLT_HD inline
#endif

// Each instruction set gets its own copy of every inline function: otherwise the linker could keep the one that was
// compiled for AVX-512 and call it on a machine without it.
#ifndef VRLT_ISA
#define VRLT_ISA generic
#endif

namespace vrlt {
inline namespace VRLT_ISA {

// Which exponential: `exp` and `log` must be inverse; `unit` converts a logarithm to nats.
template <typename T>
struct NaturalMath {
  using Scalar = T;
  static constexpr T unit = T(1);
  static constexpr T lowest = T(-1000);  // exp is 0 from here on in fp32 and fp64
  static VRLT_HD T exp(T d) { return std::exp(d); }
  static VRLT_HD T log(T s) { return std::log(s); }
  static VRLT_HD T divide(T x, T y) { return x / y; }
};

// Powers of two in fp32: one instruction on a GPU. The caller folds log2(e) into the scale.
struct BinaryMath {
  using Scalar = float;
  static constexpr float unit = 0.69314718055994531f;
  static constexpr float lowest = -160.0f;
  static VRLT_HD float exp(float d) {
#ifdef __CUDA_ARCH__
    float e;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(d));
    return e;
#else
    return std::exp2(d);
#endif
  }
  static VRLT_HD float log(float s) { return log2f(s); }
  // The exact division is a call on a GPU, and costs the registers of one.
  static VRLT_HD float divide(float x, float y) {
#ifdef __CUDA_ARCH__
    return __fdividef(x, y);
#else
    return x / y;
#endif
  }
};

template <typename T>
VRLT_HD T negative_infinity() {
  return -static_cast<T>(INFINITY);
}

// max(d, lowest) that keeps a NaN, so that d * exp(d) is 0 and not -inf * 0.
template <typename T>
VRLT_HD T clamp_low(T d, T lowest) {
  return d < lowest ? lowest : d;
}

#ifdef __CUDA_ARCH__
template <>
__device__ __forceinline__ float clamp_low<float>(float d, float lowest) {
  float r;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(d), "f"(lowest));
  return r;
}
#endif

template <typename T>
struct Partial {
  T max;   // of x, not scaled; -inf for an empty slice
  T sum;   // of e
  T dsum;  // of d e
  T sum2;  // of e^2
};

template <typename T>
VRLT_HD Partial<T> empty_partial() {
  return {negative_infinity<T>(), T(0), T(0), T(0)};
}

// What x is compared with: the maximum, or 0 where there is none, so that -inf - -inf never happens.
template <typename T>
VRLT_HD T reference_point(T max) {
  return max == negative_infinity<T>() ? T(0) : max;
}

// Adds one element to a partial whose reference point is already final.
template <typename Math, bool WANT_P2, typename T>
VRLT_HD void add_element(Partial<T>& p, T x, T reference, T scale) {
  const T d = clamp_low<T>((x - reference) * scale, Math::lowest);
  const T e = Math::exp(d);
  p.sum += e;
  p.dsum += d * e;
  if (WANT_P2) p.sum2 += e * e;
}

// The same sums relative to a larger maximum.
template <typename Math, typename T>
VRLT_HD Partial<T> rebase(Partial<T> p, T max, T scale) {
  if (p.max == max) return p;
  if (p.max == negative_infinity<T>()) {  // sums are 0, or NaN if a NaN was in the slice
    p.max = max;
    return p;
  }
  const T d = clamp_low<T>((p.max - max) * scale, Math::lowest);
  const T e = Math::exp(d);
  return {max, p.sum * e, (p.dsum + d * p.sum) * e, p.sum2 * e * e};
}

// Not commutative in the last bit: callers fix the order.
template <typename Math, typename T>
VRLT_HD Partial<T> merge(Partial<T> low, Partial<T> high, T scale) {
  const T max = low.max > high.max ? low.max : high.max;
  low = rebase<Math>(low, max, scale);
  high = rebase<Math>(high, max, scale);
  return {max, low.sum + high.sum, low.dsum + high.dsum, low.sum2 + high.sum2};
}

// The order in which a warp's lanes, and then the CTAs of a cluster, are merged: neighbours, pairs of neighbours, …
// count is a power of two.
template <typename Math, typename T>
VRLT_HD Partial<T> merge_tree(Partial<T>* parts, int count, T scale) {
  for (int step = 1; step < count; step *= 2)
    for (int i = 0; i < count; i += 2 * step) parts[i] = merge<Math>(parts[i], parts[i + step], scale);
  return parts[0];
}

// A row as a CTA cluster reads it: vectors of 16 aligned bytes, and the elements before the first and after the last.
struct RowShape {
  int head, vectors, tail;
  VRLT_HD int edges() const { return head + tail; }
  // Column of the i-th edge element, head first.
  VRLT_HD int edge_column(int i, int elements) const { return i < head ? i : i + vectors * elements; }
};

// `offset`: how many elements the row starts after a 16-byte boundary.
VRLT_HD RowShape row_shape(int width, int offset, int elements) {
  const int until_aligned = offset == 0 ? 0 : elements - offset;
  const int head = until_aligned < width ? until_aligned : width;
  const int vectors = (width - head) / elements;
  return {head, vectors, width - head - vectors * elements};
}

// The vectors that one CTA holds.
struct Slice {
  int begin, end;
};

VRLT_HD Slice cta_slice(int vectors, int ctas, int rank) {
  const int each = (vectors + ctas - 1) / ctas;
  const int begin = each * rank < vectors ? each * rank : vectors;
  const int end = begin + each < vectors ? begin + each : vectors;
  return {begin, end};
}

template <typename T>
struct RowResult {
  T logp, entropy, lse, sum_p2;  // nats
  T reference, log_sum;          // log p(x) = (x - reference) * scale - log_sum, in the units of Math
  bool empty;                    // every logit is -inf: there is no distribution
};

// `inverse` is 1 / T, scale the same in the units of Math.
// A row of -inf only has logp = lse = -inf, entropy 0, sum p^2 0, and gradient 0.
template <typename Math, typename T>
VRLT_HD RowResult<T> finish(Partial<T> p, T x_target, T scale, T inverse) {
  if (p.max == negative_infinity<T>() && p.sum == T(0))
    return {p.max, T(0), p.max, T(0), T(0), -p.max, true};  // log_sum = inf: every p is 0
  const T log_sum = Math::log(p.sum);
  const T entropy = (log_sum - Math::divide(p.dsum, p.sum)) * Math::unit;
  return {
      ((x_target - p.max) * scale - log_sum) * Math::unit,
      entropy < T(0) ? T(0) : entropy,
      p.max * inverse + log_sum * Math::unit,
      Math::divide(p.sum2, p.sum * p.sum),
      p.max,
      log_sum,
      false,
  };
}

// A log-sum-exp of this size has lost, by rounding to the result's type, digits that every probability would miss.
constexpr double COARSE_LSE = 64.0;

template <typename T>
VRLT_HD bool is_coarse(T lse) {
  return std::fabs(lse) >= T(COARSE_LSE);
}

// Whether a log-sum-exp that was rounded to the type Stored is the row's own, so that the row can restore its digits: a
// caller's sum may go over more than this row (a vocabulary in shards).
template <typename Stored, typename T>
VRLT_HD bool restores(T of_row, T stored) {
  constexpr T rounding = sizeof(Stored) == 4 ? T(0x1p-22) : T(0x1p-50);
  return std::fabs(of_row - stored) <= std::fabs(stored) * rounding || std::isinf(stored);
}

// log p of an element in the units of Math, bounded below so that p * log p is 0 where p is 0.
template <typename Math, typename T>
VRLT_HD T log_prob(T x, T reference, T log_sum, T scale) {
  return clamp_low<T>((x - reference) * scale - log_sum, Math::lowest);
}

// The gradient of an element that is not the target is p * (constant + slope * log p).
template <typename T>
struct GradientRow {
  T constant, slope;
};

template <typename Math, typename T>
VRLT_HD GradientRow<T> gradient_row(T a, T e, T entropy, T inverse) {
  return {-inverse * (e == T(0) ? a : a + e * entropy), -inverse * e * Math::unit};
}

// The target's: 1 - p as -expm1(log p), which stays accurate when p is near 1.
template <typename Math, typename T>
VRLT_HD T target_gradient(T log_p, T a, T e, T entropy, T inverse) {
  const T nats = log_p * Math::unit;
  const T entropy_part = e == T(0) ? T(0) : e * Math::exp(log_p) * (nats + entropy);
  return inverse * (-a * std::expm1(nats) - entropy_part);
}

}  // namespace VRLT_ISA
}  // namespace vrlt
