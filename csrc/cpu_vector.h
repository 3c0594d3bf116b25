// Vectors of one instruction set, and the types that rows are stored in. Included by files that are compiled once per
// set, with VRLT_ISA and VRLT_VECTOR_BYTES defined and that set's flags. Uses the vector extensions of GCC and Clang.
#pragma once

#include <cstdint>
#include <cstring>

namespace vrlt_cpu {
namespace VRLT_ISA {

template <typename T>
struct Lanes;

// exp(d) for d <= 0 (d is clamped to `lowest`, below which the result is 0): 2^n * polynomial, at most 1 ulp in fp32.
template <>
struct Lanes<float> {
  static constexpr int64_t count = VRLT_VECTOR_BYTES / 4;
  typedef float Vec __attribute__((vector_size(VRLT_VECTOR_BYTES)));
  typedef int32_t Int __attribute__((vector_size(VRLT_VECTOR_BYTES)));
  static constexpr float lowest = -87.0f, log2e = 1.44269504088896341f, magic = 12582912.0f;
  static constexpr float ln2_high = 0.693145751953125f, ln2_low = 1.42860682030941723e-6f;
  static constexpr int mantissa = 23, bias = 127, degree = 7;
};

template <>
struct Lanes<double> {
  static constexpr int64_t count = VRLT_VECTOR_BYTES / 8;
  typedef double Vec __attribute__((vector_size(VRLT_VECTOR_BYTES)));
  typedef int64_t Int __attribute__((vector_size(VRLT_VECTOR_BYTES)));
  static constexpr double lowest = -708.0, log2e = 1.44269504088896341, magic = 6755399441055744.0;
  static constexpr double ln2_high = 6.93147180369123816490e-01, ln2_low = 1.90821492927058770002e-10;
  static constexpr int mantissa = 52, bias = 1023, degree = 13;
};

template <typename T>
using Vec = typename Lanes<T>::Vec;

template <typename T>
static inline Vec<T> broadcast(T x) {
  return x - Vec<T>{};
}

template <typename T>
static inline Vec<T> clamp_vec(Vec<T> d) {
  const Vec<T> lowest = broadcast<T>(Lanes<T>::lowest);
  return d < lowest ? lowest : d;
}

// d is clamped. The quotient n sits in the low bits of d * log2e + magic.
template <typename T>
static inline Vec<T> exp_vec(Vec<T> d) {
  using L = Lanes<T>;
  using Int = typename L::Int;
  const Vec<T> shifted = d * L::log2e + L::magic;
  const Vec<T> n = shifted - L::magic;
  const Vec<T> r = (d - n * L::ln2_high) - n * L::ln2_low;
  T factorial[L::degree + 1];
  factorial[0] = T(1);
  for (int k = 1; k <= L::degree; ++k) factorial[k] = factorial[k - 1] * T(k);
  Vec<T> poly = broadcast<T>(T(1) / factorial[L::degree]);
  for (int k = L::degree - 1; k >= 0; --k) poly = poly * r + T(1) / factorial[k];
  const Int power = ((Int)shifted + L::bias) << L::mantissa;
  const Vec<T> e = poly * (Vec<T>)power;
  return d <= broadcast<T>(L::lowest) ? Vec<T>{} : e;
}

// Storage types: how a vector of compute type T is read and written, whole or with the last lanes missing.
struct Float {
  using Raw = float;
  using T = float;
  static inline Vec<T> load(const Raw* x) {
    Vec<T> v;
    memcpy(&v, x, sizeof(v));
    return v;
  }
  static inline void store(Raw* x, Vec<T> v) { memcpy(x, &v, sizeof(v)); }
  static inline T scalar(Raw x) { return x; }
  static inline Raw raw(T x) { return x; }
};

struct Double {
  using Raw = double;
  using T = double;
  static inline Vec<T> load(const Raw* x) {
    Vec<T> v;
    memcpy(&v, x, sizeof(v));
    return v;
  }
  static inline void store(Raw* x, Vec<T> v) { memcpy(x, &v, sizeof(v)); }
  static inline T scalar(Raw x) { return x; }
  static inline Raw raw(T x) { return x; }
};

struct BFloat16 {
  using Raw = uint16_t;
  using T = float;
  typedef uint16_t Half __attribute__((vector_size(VRLT_VECTOR_BYTES / 2)));
  typedef uint32_t Word __attribute__((vector_size(VRLT_VECTOR_BYTES)));
  static inline Vec<T> load(const Raw* x) {
    Half h;
    memcpy(&h, x, sizeof(h));
    return (Vec<T>)(__builtin_convertvector(h, Word) << 16);
  }
  static inline void store(Raw* x, Vec<T> v) {  // to nearest, ties to even
    const Word bits = (Word)v;
    const Word rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const Half h = __builtin_convertvector(v != v ? Word{} + 0x7fc0 : rounded, Half);
    memcpy(x, &h, sizeof(h));
  }
  static inline T scalar(Raw x) {
    const uint32_t bits = static_cast<uint32_t>(x) << 16;
    T f;
    memcpy(&f, &bits, sizeof(f));
    return f;
  }
  static inline Raw raw(T x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof(bits));
    return x != x ? 0x7fc0 : static_cast<Raw>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
  }
};

}  // namespace VRLT_ISA
}  // namespace vrlt_cpu
