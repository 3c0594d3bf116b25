// The CPU row kernels of every instruction set that this machine has, against fp64.
#include "row_cpu.h"

#include <cstring>
#include <limits>

#include "check.h"

using namespace vrlt_cpu;

template <typename Raw>
static bool same(const std::vector<Raw>& a, const std::vector<Raw>& b) {
  return std::memcmp(a.data(), b.data(), a.size() * sizeof(Raw)) == 0;
}

template <typename Raw>
static void check_row(
    const Case& c, const RowFunctions& f, double inverse, double eps, double ulp, const std::string& isa) {
  const int64_t width = c.x.size();
  const std::string where = isa + " " + c.name + " V=" + std::to_string(width) + " ";
  const Truth t = truth(c.x, c.target, inverse);
  std::vector<Raw> x;
  for (const double v : c.x) x.push_back(Storage<Raw>::put(v));
  const auto scaled = [&](double v) { return eps * (1 + (std::isfinite(v) ? std::fabs(v) : 0)); };
  const Stats s = f.stats(x.data(), width, c.target, inverse, true);
  close(s.logp, t.logp, scaled(t.logp), where, "logp");
  close(s.entropy, t.entropy, scaled(t.entropy), where, "entropy");
  close(s.lse, t.lse, scaled(t.lse), where, "lse");
  close(s.sum_p2, t.sum_p2, scaled(t.sum_p2), where, "sum p^2");

  const Coefficients k = {-0.7, 0.3, sizeof(Raw) == 8 ? s.lse : static_cast<float>(s.lse), s.entropy};
  const Raw guard = Storage<Raw>::put(77);
  std::vector<Raw> out(width + 8, guard), in_place = x, fused = x;
  f.gradient(out.data(), x.data(), width, c.target, inverse, k);
  for (int i = 0; i < 8; ++i) check(out[width + i] == guard, where + "wrote past the row");
  out.resize(width);
  f.gradient(in_place.data(), in_place.data(), width, c.target, inverse, k);
  check(same(out, in_place), where + "in place is the same");
  const Stats again = f.fused(fused.data(), width, c.target, inverse);
  close(again.logp, s.logp, 0, where, "fused logp");
  for (int64_t i = 0; i < width; ++i) {
    const bool nan = std::isnan(t.lse);
    const double g = nan ? NAN : true_gradient(t, i, c.target, k.a, k.e, inverse);
    const double d = nan ? NAN : true_gradient(t, i, c.target, 1, 0, 1);
    close(Storage<Raw>::get(out[i]), g, 4 * eps * inverse + ulp * std::fabs(g), where, "gradient", i);
    close(Storage<Raw>::get(fused[i]), d, 4 * eps + ulp * std::fabs(d), where, "onehot - p", i);
  }
  f.gradient(out.data(), x.data(), width, c.target, inverse, {0, 0, k.lse, k.entropy});
  check(same(out, std::vector<Raw>(width, Raw(0))), where + "zeros where a = e = 0");
}

// With lse = 0 and a = -1 the gradient off the target is exp(x).
static void check_exp(const RowFunctions& f, const std::string& isa) {
  std::vector<float> x(1, 0.0f), out;
  for (float v = 0.0f; v > -86.9f; v -= 0.0007f) x.push_back(v);
  out.resize(x.size());
  f.gradient(out.data(), x.data(), x.size(), 0, 1.0, {-1, 0, 0, 0});
  double worst = 0;
  for (size_t i = 1; i < x.size(); ++i) {
    const double want = std::exp(static_cast<double>(x[i]));
    const float near = static_cast<float>(want);
    const double ulp = std::nextafter(near, INFINITY) - near;
    worst = std::max(worst, std::fabs(out[i] - want) / ulp);
  }
  check(worst < 1.5, isa + " exp is off by " + std::to_string(worst) + " ulp");
  std::printf("%s: exp within %.2f ulp\n", isa.c_str(), worst);
}

template <typename Raw>
static void check_type(const RowFunctions& f, unsigned seed, double eps, double ulp, const std::string& isa) {
  const auto round = [](double v) { return Storage<Raw>::get(Storage<Raw>::put(v)); };
  for (const int64_t width : {1, 3, 7, 16, 123, 1000, 4096, 9001})
    for (const double inverse : {1.0, static_cast<double>(1.0f / 0.7f)})
      for (const auto& c : cases(width, seed, round)) check_row<Raw>(c, f, inverse, eps, ulp, isa);
}

int main(int argc, char** argv) {
  const unsigned seed = argc > 1 ? std::stoul(argv[1]) : 0;
  const std::pair<Isa, const char*> sets[] = {{Isa::generic, "generic"}, {Isa::avx2, "avx2"}, {Isa::avx512, "avx512"}};
  for (const auto& [isa, name] : sets) {
    if (functions_for(DType::f32, isa) == nullptr) {
      std::printf("%s: not here\n", name);
      continue;
    }
    check_exp(*functions_for(DType::f32, isa), name);
    check_type<float>(*functions_for(DType::f32, isa), seed, 2e-6, 0, std::string(name) + " f32");
    check_type<uint16_t>(*functions_for(DType::bf16, isa), seed, 2e-6, 0x1p-8, std::string(name) + " bf16");
    check_type<double>(*functions_for(DType::f64, isa), seed, 1e-14, 0, std::string(name) + " f64");
  }
  if (failures == 0) std::printf("ok\n");
  return failures != 0;
}
