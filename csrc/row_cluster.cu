// Row kernels for CUDA.
//
// row_cluster_kernel: a cluster of 8 CTAs holds one row in its registers. Each warp sums its elements relative to its
// own maximum; warps merge within a CTA, CTAs through distributed shared memory, both in the order of merge_tree.
// Nothing is written before every CTA has read its slice, so the row may be replaced in place: a logit is read once,
// its gradient written once.
#include <cuda_runtime.h>

#include "row_cluster.cuh"

namespace vrlt_cuda {

// -1 for a target outside the vocabulary.
__device__ __forceinline__ int target_column(const Rows& rows, int64_t index) {
  const int64_t target = rows.target[index];
  return target >= 0 && target < rows.width ? static_cast<int>(target) : -1;
}

__device__ __forceinline__ float inverse_temperature(const Rows& rows, int64_t index) {
  return rows.inverse_temperature[rows.inverse_per_row ? index : 0];
}

template <typename S, int VECTORS, bool REPLACE, bool WANT_P2>
__global__ __launch_bounds__(THREADS, VECTORS <= 5 ? 2 : 1) void row_cluster_kernel(
    void* logits, Rows rows, Results results) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  namespace cg = cooperative_groups;
  __shared__ Shared shared;
  const cg::cluster_group cluster = cg::this_cluster();
  cluster.barrier_arrive();  // whoever has passed the matching wait may write to the others' shared memory

  const int rank = blockIdx.x % CLUSTER, warp = thread() / 32, lane = thread() % 32;
  const int64_t index = blockIdx.x / CLUSTER;
  const Row<S> row(static_cast<typename S::Raw*>(logits) + index * rows.stride, rows.width);
  const Slice slice = cta_slice(row.shape.vectors, CLUSTER, rank);
  Tile<S, VECTORS> tile;
  tile.load(row, slice, rank);
  const int target = target_column(rows, index);
  const float scale = inverse_temperature(rows, index) * LOG2E;

  float own_target = negative_infinity<float>();
  tile.holds(row, slice, target, &own_target);
  own_target = warp_max(own_target);
  if (lane == 0) shared.warp_target[warp] = own_target;
  tile.forget();
  const float max = warp_max(tile.max());
  tile.forget();
  Partial<float> part = tile.template partial<WANT_P2>(max, scale);
  part.sum = warp_sum(part.sum);
  part.dsum = warp_sum(part.dsum);
  if (WANT_P2) part.sum2 = warp_sum(part.sum2);
  if (lane == 0) shared.warp[warp] = part;
  __syncthreads();
  cluster.barrier_wait();
  if (warp == 0) {
    part = merge_lanes(shared.warp[lane % WARPS], WARPS, scale);
    const float cta_target = warp_max(shared.warp_target[lane % WARPS]);
    if (lane < CLUSTER) {
      Shared* other = cluster.map_shared_rank(&shared, lane);
      other->cta[rank] = part;
      other->cta_target[rank] = cta_target;
    }
  }
  cluster.sync();

  part = merge_lanes(shared.cta[lane % CLUSTER], CLUSTER, scale);
  const float x_target = warp_max(shared.cta_target[lane % CLUSTER]);
  const RowResult<float> result = finish<BinaryMath>(part, x_target, scale, inverse_temperature(rows, index));
  if (rank == 0 && thread() == 0) {
    results.logp[index] = target >= 0 ? result.logp : NAN;
    results.entropy[index] = result.entropy;
    results.lse[index] = result.lse;
    if (WANT_P2) results.sum_p2[index] = result.sum_p2;
  }
  if constexpr (REPLACE) {
    tile.forget();
    tile.replace(row, slice, result, scale);
    if (!result.empty && tile.holds(row, slice, target, nullptr)) {  // by the thread that wrote it as any other
      const float log_p = log_prob<BinaryMath>(x_target, result.reference, result.log_sum, scale);
      row.base[target] = S::narrow(target_gradient<BinaryMath>(log_p, 1.0f, 0.0f, 0.0f, 1.0f));
    }
  }
#endif
}

template <typename S>
__global__ __launch_bounds__(THREADS) void row_gradient_kernel(const void* logits, Rows rows, Gradient gradient) {
  const int64_t index = blockIdx.x;
  const float a = gradient.a[index], e = gradient.e[index];
  const float lse = gradient.lse[index], entropy = gradient.entropy[index];
  const float inverse = inverse_temperature(rows, index);
  const bool dead = (a == 0.0f && e == 0.0f) || lse == negative_infinity<float>();
  const auto* from = static_cast<const typename S::Raw*>(logits) + index * rows.stride;
  auto* to = static_cast<typename S::Raw*>(gradient.out) + index * gradient.out_stride;
  const GradientRow<float> row = gradient_row<BinaryMath>(a, e, entropy, inverse);
  const int target = target_column(rows, index);
  const Row<S> in(const_cast<typename S::Raw*>(from), rows.width), out(to, rows.width);
  float reference = 0.0f, log_sum = lse;
  if (!dead && is_coarse(lse)) {
    const RowResult<float> own = result_of_cta(in, inverse);
    if (restores<float>(own.lse, lse)) reference = own.reference, log_sum = own.log_sum * BinaryMath::unit;
  }
  const auto element = [&](int column, float x) {
    if (dead) return 0.0f;
    const float log_p = clamp_low(fmaf(x - reference, inverse, -log_sum) * LOG2E, BinaryMath::lowest);
    if (column == target) return target_gradient<BinaryMath>(log_p, a, e, entropy, inverse);
    return BinaryMath::exp(log_p) * (row.constant + row.slope * log_p);
  };
  const auto at = [&](int column) {
    to[column] = S::narrow(element(column, dead ? 0.0f : S::widen(from[column])));
  };
  if (in.shape.head != out.shape.head) {  // rows that start at different places of a 16-byte vector
    for (int column = thread(); column < rows.width; column += THREADS) at(column);
    return;
  }
  if (thread() < in.shape.edges()) at(in.shape.edge_column(thread(), S::elements));
  for (int k = thread(); k < in.shape.vectors; k += THREADS) {
    float x[S::elements] = {};
    if (!dead) S::unpack(__ldcg(in.vector(k)), x);
#pragma unroll
    for (int j = 0; j < S::elements; ++j) x[j] = element(in.column(k) + j, x[j]);
    __stcg(out.vector(k), S::pack(x));
  }
}

template <typename S, int VECTORS>
static cudaError_t launch_sized(
    void* logits, const Rows& rows, const Results& results, bool replace, cudaStream_t stream) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(rows.count) * CLUSTER);
  config.blockDim = dim3(THREADS);
  config.stream = stream;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = CLUSTER;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  config.attrs = &attribute;
  config.numAttrs = 1;
  const auto kernel = replace          ? row_cluster_kernel<S, VECTORS, true, false>
                      : results.sum_p2 ? row_cluster_kernel<S, VECTORS, false, true>
                                       : row_cluster_kernel<S, VECTORS, false, false>;
  return cudaLaunchKernelEx(&config, kernel, logits, rows, results);
}

template <typename S>
static const char* launch_typed(
    void* logits, const Rows& rows, const Results& results, bool replace, cudaStream_t stream) {
  const int vectors = row_shape(rows.width, 0, S::elements).vectors;  // the most that a row can have
  const int each = ((vectors + CLUSTER - 1) / CLUSTER + THREADS - 1) / THREADS;
  cudaError_t error;
  if (each <= 1)
    error = launch_sized<S, 1>(logits, rows, results, replace, stream);
  else if (each <= 2)
    error = launch_sized<S, 2>(logits, rows, results, replace, stream);
  else if (each <= 4)
    error = launch_sized<S, 4>(logits, rows, results, replace, stream);
  else if (each <= 5)
    error = launch_sized<S, 5>(logits, rows, results, replace, stream);
  else if (each <= 8)
    error = launch_sized<S, 8>(logits, rows, results, replace, stream);
  else if (each <= 10)
    error = launch_sized<S, 10>(logits, rows, results, replace, stream);
  else
    return "logits: a row of more than 640 KiB doesn't fit in the registers of a cluster; use the triton backend";
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

const char* launch_row_cluster(
    void* logits, const Rows& rows, const Results& results, bool replace, cudaStream_t stream) {
  int device = 0, major = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  if (major < 9)
    return "logits: the cluster row kernel needs a device of compute capability 9.0 or later; use the triton backend";
  if (rows.count == 0) return nullptr;
  if (rows.count > INT32_MAX / CLUSTER) return "logits: too many rows for one launch";
  switch (rows.dtype) {
    case DType::f32:
      return launch_typed<Float32>(logits, rows, results, replace, stream);
    case DType::f16:
      return launch_typed<Float16>(logits, rows, results, replace, stream);
    default:
      return launch_typed<BFloat16>(logits, rows, results, replace, stream);
  }
}

const char* launch_row_gradient(const void* logits, const Rows& rows, const Gradient& gradient, cudaStream_t stream) {
  if (rows.count == 0) return nullptr;
  if (rows.count > INT32_MAX) return "logits: too many rows for one launch";
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(rows.count));
  config.blockDim = dim3(THREADS);
  config.stream = stream;
  const auto kernel = rows.dtype == DType::f32   ? row_gradient_kernel<Float32>
                      : rows.dtype == DType::f16 ? row_gradient_kernel<Float16>
                                                 : row_gradient_kernel<BFloat16>;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, logits, rows, gradient);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace vrlt_cuda
