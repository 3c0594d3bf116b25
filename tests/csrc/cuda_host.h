// Enough of CUDA to compile row_cluster.cu with g++ and to run its kernels on the host: a CTA is a thread of the
// machine, its threads are fibers that change at every barrier and shuffle; __shared__ is thread-local, so each CTA has
// its own.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static thread_local

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x_ = 1) : x(x_) {}
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct float2 {
  float x, y;
};

namespace host {

constexpr int MOST_THREADS = 1024, MOST_CTAS = 16, STACK = 64 * 1024;

// Waits until all have arrived, without stopping those that share the machine's thread.
struct Barrier {
  std::atomic<int> count{0}, round{0};
  int arrive(int all) {
    const int now = round;
    if (++count == all) {
      count = 0;
      ++round;
    }
    return now;
  }
};

struct Cluster {
  int ctas;
  Barrier barrier;
  char* anchors[MOST_CTAS];
};

struct Fiber {
  ucontext_t entry;
  jmp_buf state;  // swapcontext would cost two system calls
  std::unique_ptr<char[]> stack{new char[STACK]};
  bool started = false, done = false;
  const Barrier* waits_for = nullptr;
  int round = 0, arrived = 0, shuffles = 0;
  bool ready() const { return !done && (waits_for == nullptr || waits_for->round != round); }
};

inline thread_local char anchor;
inline thread_local Cluster* cluster;
inline thread_local int rank, threads, current;
inline thread_local jmp_buf scheduler;
inline thread_local std::vector<Fiber>* fibers;
inline thread_local Barrier cta_barrier;
inline thread_local Barrier warp_barriers[MOST_THREADS / 32];
inline thread_local float lanes[2][MOST_THREADS];
inline thread_local std::function<void()>* body;

inline Fiber& fiber() { return (*fibers)[current]; }
inline void leave() {
  if (_setjmp(fiber().state) == 0) _longjmp(scheduler, 1);
}
inline void wait(const Barrier& barrier, int round) {
  fiber().waits_for = &barrier;
  fiber().round = round;
  if (!fiber().ready()) leave();
  fiber().waits_for = nullptr;
}
inline void sync(Barrier& barrier, int all) {
  wait(barrier, barrier.arrive(all));
}
inline void start() {
  (*body)();
  fiber().done = true;
  leave();
}
inline void resume(Fiber& next) {
  if (_setjmp(scheduler) != 0) return;
  if (next.started) _longjmp(next.state, 1);
  next.started = true;
  setcontext(&next.entry);
}

}  // namespace host

inline thread_local dim3 threadIdx{0}, blockIdx{0};

namespace host {

inline void run_cta(std::function<void()> kernel, Cluster& shared, int rank_, int threads_, int block) {
  std::vector<Fiber> all(threads_);
  cluster = &shared, rank = rank_, threads = threads_, fibers = &all, body = &kernel;
  blockIdx.x = block;
  shared.anchors[rank] = &anchor;
  for (auto& one : all) {
    getcontext(&one.entry);
    one.entry.uc_stack.ss_sp = one.stack.get();
    one.entry.uc_stack.ss_size = STACK;
    makecontext(&one.entry, start, 0);
  }
  int left = threads;
  while (left > 0) {
    bool moved = false;
    for (current = 0; current < threads; ++current) {
      if (!all[current].ready()) continue;
      moved = true;
      threadIdx.x = current;
      resume(all[current]);
      left -= all[current].done;
    }
    if (!moved) std::this_thread::yield();  // to the other CTAs
  }
}

}  // namespace host

inline void __syncthreads() {
  host::sync(host::cta_barrier, host::threads);
}
inline float __shfl_xor_sync(unsigned, float x, int step) {
  auto& lanes = host::lanes[host::fiber().shuffles++ % 2];  // nobody is more than one shuffle ahead
  lanes[host::current] = x;
  host::sync(host::warp_barriers[host::current / 32], 32);
  return lanes[host::current ^ step];
}

namespace cooperative_groups {
struct cluster_group {
  void barrier_arrive() const {
    host::fiber().arrived = host::cluster->barrier.arrive(host::cluster->ctas * host::threads);
  }
  void barrier_wait() const { host::wait(host::cluster->barrier, host::fiber().arrived); }
  void sync() const { barrier_arrive(), barrier_wait(); }
  template <typename T>
  T* map_shared_rank(T* x, int rank) const {
    return reinterpret_cast<T*>(host::cluster->anchors[rank] + (reinterpret_cast<char*>(x) - &host::anchor));
  }
};
inline cluster_group this_cluster() { return {}; }
}  // namespace cooperative_groups

template <typename To, typename From>
To bits(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  std::memcpy(&y, &x, sizeof(y));
  return y;
}
inline float __uint_as_float(uint32_t x) { return bits<float>(x); }
inline uint32_t __float_as_uint(float x) { return bits<uint32_t>(x); }

// Vector accesses must be aligned, as on the device.
inline void check_aligned(const void* x) {
  if (reinterpret_cast<uintptr_t>(x) % 16 == 0) return;
  std::printf("FAILED a vector is not aligned\n");
  std::exit(1);
}
inline uint4 __ldcg(const uint4* x) {
  check_aligned(x);
  return *x;
}
inline void __stcg(uint4* to, uint4 x) {
  check_aligned(to);
  *to = x;
}

struct __nv_bfloat16 {
  uint16_t raw;
};
struct __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
struct __half {
  _Float16 raw;
};
struct __half2 {
  __half x, y;
};
inline float __bfloat162float(__nv_bfloat16 x) { return __uint_as_float(static_cast<uint32_t>(x.raw) << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  const uint32_t b = __float_as_uint(x);
  return {static_cast<uint16_t>(std::isnan(x) ? 0x7fff : (b + 0x7fff + ((b >> 16) & 1)) >> 16)};
}
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}
inline float __half2float(__half x) { return static_cast<float>(x.raw); }
inline __half __float2half_rn(float x) { return {static_cast<_Float16>(x)}; }
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
inline float2 __half22float2(__half2 x) { return {__half2float(x.x), __half2float(x.y)}; }
inline __half __ushort_as_half(unsigned short x) { return {bits<_Float16>(x)}; }

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
enum cudaDeviceAttr { cudaDevAttrComputeCapabilityMajor };
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};
inline int device_major = 9;
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  return *value = device_major, cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t) { return "error"; }

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(
    const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments... arguments) {
  const int size = config->numAttrs ? config->attrs[0].val.clusterDim.x : 1;
  for (unsigned first = 0; first < config->gridDim.x; first += size) {
    host::Cluster cluster{size, {}, {}};
    std::vector<std::thread> ctas;
    for (int rank = 0; rank < size; ++rank)
      ctas.emplace_back([&, rank] {
        host::run_cta([&] { kernel(arguments...); }, cluster, rank, config->blockDim.x, first + rank);
      });
    for (auto& cta : ctas) cta.join();
  }
  return cudaSuccess;
}
