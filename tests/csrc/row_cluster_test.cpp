// The CUDA kernels themselves, run on the host (cuda_host.h), against fp64.
#include "row_cluster.cu"

#include <algorithm>
#include <limits>

#include "check.h"

using namespace vrlt_cuda;

template <typename S>
static float get(typename S::Raw x) {
  return S::widen(x);
}

static float rounded(double v, DType dtype) {
  const float f = static_cast<float>(v);
  if (dtype == DType::bf16) return __bfloat162float(__float2bfloat16_rn(f));
  return dtype == DType::f16 ? __half2float(__float2half_rn(f)) : f;
}

struct Outputs {
  std::vector<float> logp, entropy, lse, sum_p2;
  explicit Outputs(size_t n) : logp(n, NAN), entropy(n, NAN), lse(n, NAN), sum_p2(n, NAN) {}
};

// Rows of one width in a buffer with room around them; `shift` elements after an aligned address.
template <typename S, DType DTYPE>
static void check_rows(const std::vector<Case>& all, int shift, float inverse, double ulp) {
  using Raw = typename S::Raw;
  const int n = all.size(), width = all[0].x.size(), stride = width + 3;
  const Raw guard = S::narrow(77.0f);
  const std::unique_ptr<uint4[]> aligned(new uint4[(size_t{1} * n * stride + shift) * sizeof(Raw) / 16 + 2]);
  Raw* logits = reinterpret_cast<Raw*>(aligned.get()) + shift;
  std::vector<int64_t> target;
  for (const auto& c : all) {
    const size_t row = target.size();
    for (int i = 0; i < stride; ++i)
      logits[row * stride + i] = i < width ? S::narrow(static_cast<float>(c.x[i])) : guard;
    target.push_back(c.target);
  }
  const Rows rows = {DTYPE, n, stride, width, target.data(), &inverse, false};
  Outputs stats(n), fused(n);
  const char* error = launch_row_cluster(
      logits, rows, {stats.logp.data(), stats.entropy.data(), stats.lse.data(), stats.sum_p2.data()}, false, nullptr);
  check(error == nullptr, "launch of the statistics");
  std::vector<float> a(n, -0.7f), e(n, 0.3f);
  a[0] = e[0] = 0.0f;
  std::vector<Raw> gradient(n * stride, guard);
  error = launch_row_gradient(
      logits, rows, {stats.lse.data(), stats.entropy.data(), a.data(), e.data(), gradient.data(), stride}, nullptr);
  check(error == nullptr, "launch of the gradient");
  const std::vector<Raw> kept(logits, logits + n * stride);
  error = launch_row_gradient(
      logits, rows, {stats.lse.data(), stats.entropy.data(), a.data(), e.data(), logits, stride}, nullptr);
  check(error == nullptr, "launch in place");
  check(std::memcmp(logits, gradient.data(), kept.size() * sizeof(Raw)) == 0, "in place is the same");
  std::copy(kept.begin(), kept.end(), logits);
  error = launch_row_cluster(
      logits, rows, {fused.logp.data(), fused.entropy.data(), fused.lse.data(), nullptr}, true, nullptr);
  check(error == nullptr, "launch of the fused kernel");
  for (int r = 0; r < n; ++r) {
    const Truth t = truth(all[r].x, target[r], inverse);
    const std::string where = all[r].name + " V=" + std::to_string(width) + " shift=" + std::to_string(shift) + " ";
    const bool nan = std::isnan(t.lse);
    close(stats.logp[r], t.logp, 4e-6 * (1 + std::fabs(t.logp)), where, "logp");
    close(stats.entropy[r], t.entropy, 4e-6 * (1 + t.entropy), where, "entropy");
    const double lse = std::fabs(t.lse) > std::numeric_limits<float>::max() ? std::copysign(INFINITY, t.lse) : t.lse;
    close(stats.lse[r], lse, 4e-6 * (1 + std::fabs(lse)), where, "lse");
    close(stats.sum_p2[r], t.sum_p2, 4e-6, where, "sum p^2");
    for (const auto result : {&Outputs::logp, &Outputs::entropy, &Outputs::lse})
      check(
          std::memcmp(&(stats.*result)[r], &(fused.*result)[r], sizeof(float)) == 0, where + "both kernels agree");
    // The gradient starts from a log-sum-exp that was rounded; from 64 on its digits are restored.
    for (int i = 0; i < width; ++i) {
      const bool dead = a[r] == 0 && e[r] == 0;
      const double g = dead ? 0 : nan ? NAN : true_gradient(t, i, target[r], a[r], e[r], inverse);
      const double d = nan ? NAN : true_gradient(t, i, target[r], 1, 0, 1);
      close(get<S>(gradient[r * stride + i]), g, 1e-5 + ulp * std::fabs(g), where, "gradient", i);
      close(get<S>(logits[r * stride + i]), d, 5e-6 + ulp * std::fabs(d), where, "onehot - p", i);
    }
    for (int i = width; i < stride; ++i) {
      close(get<S>(logits[r * stride + i]), 77, 0, where, "the gap between rows", i);
      close(get<S>(gradient[r * stride + i]), 77, 0, where, "the gap between gradients", i);
    }
  }
}

template <typename S, DType DTYPE>
static void check_type(unsigned seed, double ulp) {
  const auto round = [](double v) { return static_cast<double>(rounded(v, DTYPE)); };
  const int wide = sizeof(typename S::Raw) == 2 ? 40000 : 20000;  // two vectors a thread
  for (const int width : {1, 7, 123, 1000, wide}) {
    std::vector<Case> all;
    for (auto& c : cases(width, seed, round))
      if (c.name != "huge" || DTYPE != DType::f16) all.push_back(c);  // 3e38 is infinite in fp16
    if (width == wide) all.resize(2);
    check_rows<S, DTYPE>(all, width % 8, width == 123 ? 1.0f / 0.7f : 1.0f, ulp);
  }
}

// The gradient of a row that is a part of a larger one comes from the log-sum-exp of the whole.
static void check_shard() {
  float x[] = {200, 201, 199, 198}, out[4], inverse = 1, entropy = 0, a = -1, e = 0, lse = 202.25f;
  const int64_t target = -1;
  const Rows rows = {DType::f32, 1, 4, 4, &target, &inverse, false};
  launch_row_gradient(x, rows, {&lse, &entropy, &a, &e, out, 4}, nullptr);
  for (int i = 0; i < 4; ++i) close(out[i], std::exp(x[i] - 202.25), 1e-6, "", "gradient of a shard", i);
}

static void check_refusals() {
  float x = 0, inverse = 1, out = 0;
  int64_t target = 5;
  Rows rows = {DType::f32, 1, 1, 1, &target, &inverse, true};
  check(launch_row_cluster(&x, rows, {&out, &out, &out, &out}, false, nullptr) == nullptr, "a wrong target runs");
  float logp = 0;
  launch_row_cluster(&x, rows, {&logp, &out, &out, nullptr}, true, nullptr);
  check(std::isnan(logp), "a wrong target has no log-prob");
  rows.width = 200000;
  check(launch_row_cluster(&x, rows, {&out, &out, &out, &out}, false, nullptr) != nullptr, "too wide");
  rows.width = 1;
  device_major = 8;
  check(launch_row_cluster(&x, rows, {&out, &out, &out, &out}, false, nullptr) != nullptr, "an old device");
}

int main(int argc, char** argv) {
  const unsigned seed = argc > 1 ? std::stoul(argv[1]) : 0;
  check_type<Float32, DType::f32>(seed, 0);
  check_type<BFloat16, DType::bf16>(seed, 0x1p-8);
  check_type<Float16, DType::f16>(seed, 0x1p-11);
  check_shard();
  check_refusals();
  if (failures == 0) std::printf("ok\n");
  return failures != 0;
}
