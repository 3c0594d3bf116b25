// Device side of the CUDA row kernels; the arithmetic is row_core.h.
#pragma once

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "row_cluster.h"
#include "row_core.h"

namespace vrlt_cuda {

using namespace vrlt;

constexpr int THREADS = 512, WARPS = THREADS / 32, CLUSTER = 8;
constexpr float LOG2E = 1.44269504088896341f;
constexpr unsigned ALL = 0xffffffffu;

__device__ __forceinline__ int thread() {
  return static_cast<int>(threadIdx.x);
}

template <typename To, typename From>
__device__ __forceinline__ To same_bits(From x) {
  static_assert(sizeof(To) == sizeof(From), "as many bits");
  To y;
  memcpy(&y, &x, sizeof(y));
  return y;
}

__device__ __forceinline__ uint32_t word(uint4 v, int i) {
  return i < 2 ? (i == 0 ? v.x : v.y) : (i == 2 ? v.z : v.w);
}

// A vector of 16 bytes and its elements in fp32.
struct Float32 {
  using Raw = float;
  static constexpr int elements = 4;
  static constexpr uint32_t nothing = 0xff800000u;  // -inf in every element
  static __device__ __forceinline__ void unpack(uint4 v, float (&x)[4]) {
    x[0] = __uint_as_float(v.x), x[1] = __uint_as_float(v.y), x[2] = __uint_as_float(v.z), x[3] = __uint_as_float(v.w);
  }
  static __device__ __forceinline__ uint4 pack(const float (&x)[4]) {
    return {__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]), __float_as_uint(x[3])};
  }
  static __device__ __forceinline__ float pick(uint4 v, int i) { return __uint_as_float(word(v, i)); }
  static __device__ __forceinline__ float widen(float x) { return x; }
  static __device__ __forceinline__ float narrow(float x) { return x; }
};

struct BFloat16 {
  using Raw = __nv_bfloat16;
  static constexpr int elements = 8;
  static constexpr uint32_t nothing = 0xff80ff80u;
  static __device__ __forceinline__ void unpack(uint4 v, float (&x)[8]) {
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      x[2 * i] = __uint_as_float(words[i] << 16);
      x[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
  }
  static __device__ __forceinline__ uint32_t pair(float low, float high) {
    const __nv_bfloat162 h = __floats2bfloat162_rn(low, high);
    return same_bits<uint32_t>(h);
  }
  static __device__ __forceinline__ uint4 pack(const float (&x)[8]) {
    return {pair(x[0], x[1]), pair(x[2], x[3]), pair(x[4], x[5]), pair(x[6], x[7])};
  }
  static __device__ __forceinline__ float pick(uint4 v, int i) {
    const uint32_t w = word(v, i / 2);
    return __uint_as_float(i % 2 ? w & 0xffff0000u : w << 16);
  }
  static __device__ __forceinline__ float widen(Raw x) { return __bfloat162float(x); }
  static __device__ __forceinline__ Raw narrow(float x) { return __float2bfloat16_rn(x); }
};

struct Float16 {
  using Raw = __half;
  static constexpr int elements = 8;
  static constexpr uint32_t nothing = 0xfc00fc00u;
  static __device__ __forceinline__ void unpack(uint4 v, float (&x)[8]) {
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 f = __half22float2(same_bits<__half2>(words[i]));
      x[2 * i] = f.x, x[2 * i + 1] = f.y;
    }
  }
  static __device__ __forceinline__ uint32_t pair(float low, float high) {
    const __half2 h = __floats2half2_rn(low, high);
    return same_bits<uint32_t>(h);
  }
  static __device__ __forceinline__ uint4 pack(const float (&x)[8]) {
    return {pair(x[0], x[1]), pair(x[2], x[3]), pair(x[4], x[5]), pair(x[6], x[7])};
  }
  static __device__ __forceinline__ float pick(uint4 v, int i) {
    const uint32_t w = word(v, i / 2);
    return __half2float(__ushort_as_half(static_cast<unsigned short>(i % 2 ? w >> 16 : w)));
  }
  static __device__ __forceinline__ float widen(Raw x) { return __half2float(x); }
  static __device__ __forceinline__ Raw narrow(float x) { return __float2half_rn(x); }
};

template <typename S>
struct Row {
  typename S::Raw* base;
  int width;
  RowShape shape;

  __device__ __forceinline__ Row(void* first, int width_) : base(static_cast<typename S::Raw*>(first)), width(width_) {
    shape = row_shape(width, reinterpret_cast<uintptr_t>(base) % 16 / sizeof(typename S::Raw), S::elements);
  }
  __device__ __forceinline__ int column(int k) const { return shape.head + k * S::elements; }
  __device__ __forceinline__ uint4* vector(int k) const { return reinterpret_cast<uint4*>(base + column(k)); }
};

__device__ __forceinline__ Partial<float> shuffle(Partial<float> p, int step) {
  return {
      __shfl_xor_sync(ALL, p.max, step), __shfl_xor_sync(ALL, p.sum, step), __shfl_xor_sync(ALL, p.dsum, step),
      __shfl_xor_sync(ALL, p.sum2, step)};
}

// merge_tree over `count` neighbouring lanes; every lane gets the same bits.
__device__ __forceinline__ Partial<float> merge_lanes(Partial<float> p, int count, float scale) {
  const int lane = thread() % 32;
  for (int step = 1; step < count; step *= 2) {
    const Partial<float> other = shuffle(p, step);
    const bool high = lane & step;
    p = merge<BinaryMath>(high ? other : p, high ? p : other, scale);
  }
  return p;
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    const float other = __shfl_xor_sync(ALL, x, step);
    x = other > x ? other : x;
  }
  return x;
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(ALL, x, step);
  return x;
}

// What one CTA holds of a row: a slice of its vectors, VECTORS a thread, and in CTA 0 the edges, one a thread. Places
// without an element hold -inf, which adds nothing.
template <typename S, int VECTORS>
struct Tile {
  uint4 data[VECTORS];
  float edge;
  int edge_column;  // -1: none

  __device__ __forceinline__ static int vector_of(Slice slice, int i) {
    return slice.begin + i * THREADS + thread();
  }
  __device__ __forceinline__ void load(const Row<S>& row, Slice slice, int rank) {
#pragma unroll
    for (int i = 0; i < VECTORS; ++i) {
      const int k = vector_of(slice, i);
      data[i] = k < slice.end ? __ldcg(row.vector(k)) : uint4{S::nothing, S::nothing, S::nothing, S::nothing};
    }
    const bool has_edge = rank == 0 && thread() < row.shape.edges();
    edge_column = has_edge ? row.shape.edge_column(thread(), S::elements) : -1;
    edge = has_edge ? S::widen(row.base[edge_column]) : negative_infinity<float>();
  }
  // Makes the compiler unpack anew after this: what it would keep of an earlier pass takes more registers than the
  // tile has.
  __device__ __forceinline__ void forget() {
#pragma unroll
    for (auto& v : data) asm volatile("" : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w));
  }
  __device__ __forceinline__ float max() const {
    float best = edge;
#pragma unroll
    for (int i = 0; i < VECTORS; ++i) {
      float x[S::elements];
      S::unpack(data[i], x);
#pragma unroll
      for (int j = 0; j < S::elements; ++j) best = fmaxf(best, x[j]);
    }
    return best;
  }
  template <bool WANT_P2>
  __device__ __forceinline__ Partial<float> partial(float max, float scale) const {
    Partial<float> p = empty_partial<float>();
    p.max = max;
    const float reference = reference_point(max);
    add_element<BinaryMath, WANT_P2>(p, edge, reference, scale);
#pragma unroll
    for (int i = 0; i < VECTORS; ++i) {
      float x[S::elements];
      S::unpack(data[i], x);
#pragma unroll
      for (int j = 0; j < S::elements; ++j) add_element<BinaryMath, WANT_P2>(p, x[j], reference, scale);
    }
    return p;
  }
  // Whether this thread holds the element; then `x`, if given, gets it.
  __device__ __forceinline__ bool holds(const Row<S>& row, Slice slice, int column, float* x) const {
    if (column < 0) return false;
    if (column == edge_column) {
      if (x != nullptr) *x = edge;
      return true;
    }
    const int inner = column - row.shape.head, k = inner / S::elements;
    if (inner < 0 || k < slice.begin || k >= slice.end || (k - slice.begin) % THREADS != thread()) return false;
    if (x == nullptr) return true;
#pragma unroll
    for (int i = 0; i < VECTORS; ++i) {
      if (k != vector_of(slice, i)) continue;
      *x = S::pick(data[i], inner % S::elements);
    }
    return true;
  }
  // Writes -p for every element.
  __device__ __forceinline__ void replace(
      const Row<S>& row, Slice slice, const RowResult<float>& result, float scale) const {
    const auto negative_p = [&](float x) {
      return 0.0f - BinaryMath::exp((x - result.reference) * scale - result.log_sum);
    };
#pragma unroll
    for (int i = 0; i < VECTORS; ++i) {
      const int k = vector_of(slice, i);
      if (k >= slice.end) break;
      float x[S::elements];
      S::unpack(data[i], x);
#pragma unroll
      for (int j = 0; j < S::elements; ++j) x[j] = negative_p(x[j]);
      __stcg(row.vector(k), S::pack(x));
    }
    if (edge_column >= 0) row.base[edge_column] = S::narrow(negative_p(edge));
  }
};

// Calls f with every element of a row that is this thread's where one CTA takes the row.
template <typename S, typename F>
__device__ __forceinline__ void for_each(const Row<S>& row, const F& f) {
  if (thread() < row.shape.edges()) f(S::widen(row.base[row.shape.edge_column(thread(), S::elements)]));
  for (int k = thread(); k < row.shape.vectors; k += THREADS) {
    float x[S::elements];
    S::unpack(__ldcg(row.vector(k)), x);
#pragma unroll
    for (int j = 0; j < S::elements; ++j) f(x[j]);
  }
}

// The row that one CTA reads, twice; all its threads call this, get the same bits and have then read their elements.
template <typename S>
__device__ RowResult<float> result_of_cta(const Row<S>& row, float inverse) {
  __shared__ Partial<float> parts[WARPS];
  const float scale = inverse * LOG2E;
  float max = negative_infinity<float>();
  for_each(row, [&](float x) { max = fmaxf(max, x); });
  Partial<float> part = empty_partial<float>();
  part.max = warp_max(max);
  const float reference = reference_point(part.max);
  for_each(row, [&](float x) { add_element<BinaryMath, false>(part, x, reference, scale); });
  part.sum = warp_sum(part.sum);
  if (thread() % 32 == 0) parts[thread() / 32] = part;
  __syncthreads();
  part = merge_lanes(parts[thread() % WARPS], WARPS, scale);
  return finish<BinaryMath>(part, part.max, scale, inverse);
}

struct Shared {
  Partial<float> warp[WARPS], cta[CLUSTER];
  float warp_target[WARPS], cta_target[CLUSTER];
};

}  // namespace vrlt_cuda
