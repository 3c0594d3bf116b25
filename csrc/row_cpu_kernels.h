// Body of the CPU row kernels, compiled once per instruction set: each row_cpu_<isa>.cpp defines VRLT_ISA and
// VRLT_VECTOR_BYTES and is compiled with that set's flags.
//
// A row is read in blocks that fit in the first-level cache: maximum of the block, then its sums relative to the
// largest maximum so far. Sums are kept per lane in the compute type and added up in fp64 after each block.
#include "cpu_vector.h"
#include "row_core.h"
#include "row_cpu.h"

namespace vrlt_cpu {
namespace VRLT_ISA {

using namespace vrlt;

template <typename S>
static inline Vec<typename S::T> load_tail(const typename S::Raw* x, int64_t n) {
  using T = typename S::T;
  alignas(VRLT_VECTOR_BYTES) T lanes[Lanes<T>::count];
  for (int64_t i = 0; i < Lanes<T>::count; ++i) lanes[i] = i < n ? S::scalar(x[i]) : negative_infinity<T>();
  Vec<T> v;
  memcpy(&v, lanes, sizeof(v));
  return v;
}

template <typename S>
static inline void store_tail(typename S::Raw* x, Vec<typename S::T> v, int64_t n) {
  typename S::Raw lanes[Lanes<typename S::T>::count];
  S::store(lanes, v);
  memcpy(x, lanes, n * sizeof(lanes[0]));
}

constexpr int UNROLL = 4;

template <typename S>
static typename S::T block_max(const typename S::Raw* x, int64_t n) {
  using T = typename S::T;
  constexpr int64_t W = Lanes<T>::count;
  Vec<T> best[UNROLL];
  for (auto& b : best) b = broadcast<T>(negative_infinity<T>());
  int64_t i = 0;
  for (; i + UNROLL * W <= n; i += UNROLL * W)
    for (int u = 0; u < UNROLL; ++u) {
      const Vec<T> v = S::load(x + i + u * W);
      best[u] = v > best[u] ? v : best[u];
    }
  for (; i < n; i += W) {
    const Vec<T> v = n - i >= W ? S::load(x + i) : load_tail<S>(x + i, n - i);
    best[0] = v > best[0] ? v : best[0];
  }
  T m = negative_infinity<T>();
  for (const auto& b : best)
    for (int64_t l = 0; l < W; ++l) m = b[l] > m ? b[l] : m;
  return m;
}

template <typename T>
static double lane_sum(const Vec<T> (&parts)[UNROLL]) {
  const Vec<T> v = (parts[0] + parts[1]) + (parts[2] + parts[3]);
  double total = 0;
  for (int64_t l = 0; l < Lanes<T>::count; ++l) total += v[l];
  return total;
}

template <typename S, bool WANT_P2>
static void add_block(
    Partial<double>& p, const typename S::Raw* x, int64_t n, typename S::T reference, typename S::T scale) {
  using T = typename S::T;
  constexpr int64_t W = Lanes<T>::count;
  Vec<T> sum[UNROLL] = {}, dsum[UNROLL] = {}, sum2[UNROLL] = {};
  const auto add = [&](int u, Vec<T> v) __attribute__((always_inline)) {
    const Vec<T> d = clamp_vec<T>((v - reference) * scale);
    const Vec<T> e = exp_vec<T>(d);
    sum[u] += e;
    dsum[u] += d * e;
    if (WANT_P2) sum2[u] += e * e;
  };
  int64_t i = 0;
  for (; i + UNROLL * W <= n; i += UNROLL * W)
    for (int u = 0; u < UNROLL; ++u) {
      __builtin_prefetch(x + n + i + u * W);  // the next block, while this one is computed with
      add(u, S::load(x + i + u * W));
    }
  for (; i < n; i += W) add(0, n - i >= W ? S::load(x + i) : load_tail<S>(x + i, n - i));
  p.sum += lane_sum<T>(sum);
  p.dsum += lane_sum<T>(dsum);
  if (WANT_P2) p.sum2 += lane_sum<T>(sum2);
}

template <typename S, bool WANT_P2>
static Partial<double> row_partial(const typename S::Raw* x, int64_t width, double scale) {
  constexpr int64_t BLOCK = 16384 / sizeof(typename S::T);
  Partial<double> p = empty_partial<double>();
  for (int64_t start = 0; start < width; start += BLOCK) {
    const int64_t n = width - start < BLOCK ? width - start : BLOCK;
    const double max = block_max<S>(x + start, n);
    if (max > p.max) p = rebase<NaturalMath<double>>(p, max, scale);
    add_block<S, WANT_P2>(p, x + start, n, reference_point(p.max), scale);
  }
  return p;
}

template <typename S>
static RowResult<double> row_result(
    const typename S::Raw* x, int64_t width, int64_t target, double scale, bool want_p2) {
  const Partial<double> p = want_p2 ? row_partial<S, true>(x, width, scale) : row_partial<S, false>(x, width, scale);
  return finish<NaturalMath<double>>(p, static_cast<double>(S::scalar(x[target])), scale, scale);
}

// out = p * (constant + slope * log p) with log p = (x - reference) * scale - log_sum.
template <typename S, bool WITH_SLOPE>
static void write_gradient(
    typename S::Raw* out, const typename S::Raw* x, int64_t width, typename S::T reference, typename S::T log_sum,
    typename S::T scale, GradientRow<typename S::T> row) {
  using T = typename S::T;
  constexpr int64_t W = Lanes<T>::count;
  const auto gradient = [&](Vec<T> v) __attribute__((always_inline)) {
    const Vec<T> log_p = clamp_vec<T>((v - reference) * scale - log_sum);
    const Vec<T> p = exp_vec<T>(log_p);
    return WITH_SLOPE ? p * (log_p * row.slope + row.constant) : p * row.constant;
  };
  int64_t i = 0;
  for (; i + 2 * W <= width; i += 2 * W) {
    const Vec<T> first = S::load(x + i), second = S::load(x + i + W);
    S::store(out + i, gradient(first));
    S::store(out + i + W, gradient(second));
  }
  for (; i + W <= width; i += W) S::store(out + i, gradient(S::load(x + i)));
  if (i < width) store_tail<S>(out + i, gradient(load_tail<S>(x + i, width - i)), width - i);
}

template <typename S>
static void store_scalar(typename S::Raw* out, double value) {
  store_tail<S>(out, broadcast<typename S::T>(static_cast<typename S::T>(value)), 1);
}

template <typename S>
static void row_gradient(
    typename S::Raw* out, const typename S::Raw* x, int64_t width, int64_t target, double scale, double reference,
    double log_sum, double a, double e, double entropy, double inverse) {
  using T = typename S::T;
  using Math = NaturalMath<double>;
  const double log_p = log_prob<Math>(static_cast<double>(S::scalar(x[target])), reference, log_sum, scale);
  const double at_target = target_gradient<Math>(log_p, a, e, entropy, inverse);
  const GradientRow<double> wide = gradient_row<Math>(a, e, entropy, inverse);
  const GradientRow<T> row = {static_cast<T>(wide.constant), static_cast<T>(wide.slope)};
  if (e != 0.0)
    write_gradient<S, true>(out, x, width, reference, log_sum, scale, row);
  else
    write_gradient<S, false>(out, x, width, reference, log_sum, scale, row);
  store_scalar<S>(out + target, at_target);
}

template <typename S>
static Stats stats(const void* logits, int64_t width, int64_t target, double inverse, bool want_p2) {
  const auto r = row_result<S>(static_cast<const typename S::Raw*>(logits), width, target, inverse, want_p2);
  return {r.logp, r.entropy, r.lse, r.sum_p2};
}

template <typename S>
static Stats fused(void* logits, int64_t width, int64_t target, double inverse) {
  auto* x = static_cast<typename S::Raw*>(logits);
  const auto r = row_result<S>(x, width, target, inverse, false);
  if (r.empty)
    memset(x, 0, width * sizeof(*x));
  else
    row_gradient<S>(x, x, width, target, inverse, r.reference, r.log_sum, 1.0, 0.0, 0.0, 1.0);
  return {r.logp, r.entropy, r.lse, r.sum_p2};
}

template <typename S>
static void gradient(
    void* out, const void* logits, int64_t width, int64_t target, double inverse, const Coefficients& c) {
  auto* to = static_cast<typename S::Raw*>(out);
  const auto* x = static_cast<const typename S::Raw*>(logits);
  if ((c.a == 0.0 && c.e == 0.0) || c.lse == negative_infinity<double>()) {
    memset(to, 0, width * sizeof(*to));
    return;
  }
  double reference = 0.0, log_sum = c.lse;
  if (is_coarse(c.lse)) {
    const auto r = row_result<S>(x, width, target, inverse, false);
    if (restores<typename S::T>(r.lse, c.lse)) {
      reference = r.reference;
      log_sum = r.log_sum;
    }
  }
  row_gradient<S>(to, x, width, target, inverse, reference, log_sum, c.a, c.e, c.entropy, inverse);
}

template <typename S>
constexpr RowFunctions table() {
  return {stats<S>, gradient<S>, fused<S>};
}

static const RowFunctions tables[] = {table<Float>(), table<BFloat16>(), table<Double>()};

extern const RowFunctions* const functions = tables;

}  // namespace VRLT_ISA
}  // namespace vrlt_cpu
