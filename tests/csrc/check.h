// What the C++ test programs share. A program prints what is wrong and exits with 1.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

inline int failures = 0;

inline void check(bool ok, const std::string& what) {
  if (ok) return;
  if (++failures <= 20) std::printf("FAILED %s\n", what.c_str());
}

// NaN and infinities must agree exactly. Called for every element: words are put together only for a failure.
inline void close(
    double got, double want, double tolerance, const std::string& where, const char* what, int64_t index = -1) {
  const bool same = std::isfinite(want) ? std::fabs(got - want) <= tolerance
                    : std::isnan(want)  ? std::isnan(got)
                                        : got == want;
  if (same) return;
  const std::string at = index < 0 ? "" : " at " + std::to_string(index);
  check(false, where + what + at + ": got " + std::to_string(got) + ", want " + std::to_string(want));
}

// How a row's values are stored: bf16 is its bits.
inline uint16_t to_bf16(double v) {
  const float f = static_cast<float>(v);
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  if (std::isnan(f)) return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline double from_bf16(uint16_t h) {
  const uint32_t bits = static_cast<uint32_t>(h) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

template <typename Raw>
struct Storage {
  static Raw put(double v) { return static_cast<Raw>(v); }
  static double get(Raw v) { return v; }
};

template <>
struct Storage<uint16_t> {
  static uint16_t put(double v) { return to_bf16(v); }
  static double get(uint16_t v) { return from_bf16(v); }
};

struct Truth {
  double logp, entropy, lse, sum_p2;
  std::vector<double> log_p;
  bool empty;
};

inline Truth truth(const std::vector<double>& x, int64_t target, double inverse) {
  long double max = -INFINITY, sum = 0, dsum = 0, sum2 = 0;
  for (const double v : x) max = v > max ? v : max;
  Truth t;
  t.empty = true;
  for (const double v : x) t.empty = t.empty && v == -INFINITY;
  t.log_p.assign(x.size(), -INFINITY);
  if (t.empty) return {-INFINITY, 0, -INFINITY, 0, t.log_p, true};
  for (const double v : x) {
    const long double d = (v - max) * inverse, e = expl(d);
    sum += e;
    dsum += e == 0 ? 0 : d * e;
    sum2 += e * e;
  }
  const long double log_sum = logl(sum);
  for (size_t i = 0; i < x.size(); ++i) t.log_p[i] = (x[i] - max) * inverse - log_sum;
  t.logp = t.log_p[target];
  t.entropy = log_sum - dsum / sum;
  t.lse = max * inverse + log_sum;
  t.sum_p2 = sum2 / (sum * sum);
  return t;
}

inline double true_gradient(const Truth& t, size_t i, int64_t target, double a, double e, double inverse) {
  if (t.empty) return 0;
  const double p = std::exp(t.log_p[i]), hit = static_cast<int64_t>(i) == target;
  return inverse * (a * (hit - p) - (p == 0 ? 0 : e * p * (t.log_p[i] + t.entropy)));
}

struct Case {
  std::string name;
  std::vector<double> x;
  int64_t target;
};

// Rows of every kind; values are exact in the storage type that `round` rounds to.
template <typename Round>
std::vector<Case> cases(int64_t width, unsigned seed, Round round) {
  std::mt19937 generator(seed);
  std::normal_distribution<double> normal(0, 4);
  const auto row = [&](double scale, double shift) {
    std::vector<double> x(width);
    for (auto& v : x) v = round(shift + scale * normal(generator));
    return x;
  };
  const int64_t last = width - 1, middle = width / 2;
  std::vector<Case> all = {
      {"normal", row(1, 0), last}, {"peaked", row(8, 0), middle},       {"far up", row(1, 1e4), 0},
      {"far down", row(1, -1e4), last}, {"wide", row(1e3, 0), middle},  {"equal", row(0, 3), 0},
  };
  const int64_t arg = middle;
  Case one = {"one finite", std::vector<double>(width, -INFINITY), arg};
  one.x[arg] = 2;
  Case half = {"half -inf", row(1, 0), last};
  for (int64_t i = 0; i < width; i += 2)
    if (i != last) half.x[i] = -INFINITY;
  Case lost = {"target -inf", row(1, 0), middle};
  if (width > 1) lost.x[middle] = -INFINITY;
  Case huge = {"huge", row(1, 0), last};
  huge.x[last] = round(3e38);
  if (width > 1) huge.x[0] = round(-3e38);
  Case none = {"all -inf", std::vector<double>(width, -INFINITY), middle};
  Case bad = {"nan", row(1, 0), 0};
  bad.x[last] = NAN;
  Case lone = {"nan among -inf", std::vector<double>(width, -INFINITY), 0};
  lone.x[middle] = NAN;
  all.insert(all.end(), {one, half, lost, huge, none, bad, lone});
  return all;
}
