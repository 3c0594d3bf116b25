// The arithmetic of the cluster kernel on the host: the same slices, lanes, warps, CTAs and order, against fp64.
#include "row_core.h"

#include <cstring>
#include <limits>

#include "check.h"

using namespace vrlt;

constexpr int THREADS = 512, WARPS = THREADS / 32;

// What thread `t` of CTA `rank` holds, in the kernel's order.
static std::vector<int> columns(const RowShape& shape, int elements, int ctas, int rank, int t) {
  std::vector<int> held;
  if (rank == 0 && t < shape.edges()) held.push_back(shape.edge_column(t, elements));
  const Slice slice = cta_slice(shape.vectors, ctas, rank);
  for (int k = slice.begin + t; k < slice.end; k += THREADS)
    for (int j = 0; j < elements; ++j) held.push_back(shape.head + k * elements + j);
  return held;
}

static Partial<float> warp_partial(
    const std::vector<std::vector<int>>& lanes, const std::vector<float>& x, float scale) {
  float max = negative_infinity<float>();
  for (const auto& lane : lanes)
    for (const int column : lane) max = x[column] > max ? x[column] : max;
  Partial<float> parts[32];
  for (int l = 0; l < 32; ++l) {
    parts[l] = empty_partial<float>();
    for (const int column : lanes[l])
      add_element<BinaryMath, true>(parts[l], x[column], reference_point(max), scale);
  }
  for (int step = 16; step > 0; step /= 2)
    for (int l = 0; l < step; ++l) {
      parts[l].sum += parts[l + step].sum;
      parts[l].dsum += parts[l + step].dsum;
      parts[l].sum2 += parts[l + step].sum2;
    }
  parts[0].max = max;
  return parts[0];
}

static RowResult<float> simulate(
    const std::vector<float>& x, int target, float inverse, float scale, const RowShape& shape, int elements,
    int ctas) {
  std::vector<Partial<float>> cluster(ctas);
  std::vector<int> seen(x.size(), 0);
  for (int rank = 0; rank < ctas; ++rank) {
    Partial<float> warps[WARPS];
    for (int w = 0; w < WARPS; ++w) {
      std::vector<std::vector<int>> lanes(32);
      for (int l = 0; l < 32; ++l) {
        lanes[l] = columns(shape, elements, ctas, rank, w * 32 + l);
        for (const int column : lanes[l]) ++seen.at(column);
      }
      warps[w] = warp_partial(lanes, x, scale);
    }
    cluster[rank] = merge_tree<BinaryMath>(warps, WARPS, scale);
  }
  for (const int n : seen)
    if (n != 1) check(false, "an element is held " + std::to_string(n) + " times");
  return finish<BinaryMath>(merge_tree<BinaryMath>(cluster.data(), ctas, scale), x[target], scale, inverse);
}

static void check_row(const Case& c, float inverse, int offset, int elements, int ctas) {
  const std::vector<float> x(c.x.begin(), c.x.end());
  const float scale = inverse * 1.44269504088896341f;
  const int width = static_cast<int>(x.size()), target = static_cast<int>(c.target);
  const RowShape shape = row_shape(width, offset, elements);
  check(shape.head < elements && shape.tail < elements && shape.edges() <= THREADS, "edges are short");
  const auto r = simulate(x, target, inverse, scale, shape, elements, ctas);
  const Truth t = truth(c.x, c.target, inverse);
  const std::string where = c.name + " V=" + std::to_string(width) + " ctas=" + std::to_string(ctas) + " ";
  // far from 0 a value itself is only known to its own rounding
  const auto scaled = [](double v) { return 4e-6 * (1 + (std::isfinite(v) ? std::fabs(v) : 0)); };
  const double want_logp = t.logp < -std::numeric_limits<float>::max() ? -INFINITY : t.logp;
  const double want_lse = std::fabs(t.lse) > std::numeric_limits<float>::max() ? std::copysign(INFINITY, t.lse) : t.lse;
  close(r.logp, want_logp, scaled(t.logp), where, "logp");
  close(r.lse, want_lse, scaled(t.lse), where, "lse");
  close(r.entropy, t.entropy, scaled(t.entropy), where, "entropy");
  close(r.sum_p2, t.sum_p2, 4e-6, where, "sum p^2");
  check(r.empty == t.empty, where + "empty");
  if (r.empty || std::isnan(t.lse)) return;
  const float a = -0.7f, e = 0.3f;
  const auto g = gradient_row<BinaryMath>(a, e, r.entropy, inverse);
  double worst = 0, worst_d = 0;
  for (int i = 0; i < width; ++i) {
    const float log_p = log_prob<BinaryMath>(x[i], r.reference, r.log_sum, scale);
    const float p = BinaryMath::exp(log_p);
    const float got = i == target ? target_gradient<BinaryMath>(log_p, a, e, r.entropy, inverse)
                                  : p * (g.constant + g.slope * log_p);
    const float d = i == target ? target_gradient<BinaryMath>(log_p, 1.0f, 0.0f, 0.0f, 1.0f) : 0.0f - p;
    const double off = std::fabs(got - true_gradient(t, i, target, a, e, inverse));
    const double off_d = std::fabs(d - true_gradient(t, i, target, 1, 0, 1));
    worst = off > worst || std::isnan(off) ? off : worst;
    worst_d = off_d > worst_d || std::isnan(off_d) ? off_d : worst_d;
  }
  close(worst, 0, 8e-6 * inverse, where, "gradient");
  close(worst_d, 0, 4e-6, where, "onehot - p");
}

// Merging a slice with nothing changes no bit, whichever side it is on.
static void check_neutral() {
  const Partial<float> p = {3.0f, 2.5f, -1.25f, 1.5f}, none = empty_partial<float>();
  for (const auto& m : {merge<BinaryMath>(p, none, 1.3f), merge<BinaryMath>(none, p, 1.3f)})
    check(std::memcmp(&m, &p, sizeof(p)) == 0, "an empty slice is neutral");
}

int main(int argc, char** argv) {
  const unsigned seed = argc > 1 ? std::stoul(argv[1]) : 0;
  const auto to_float = [](double v) { return static_cast<double>(static_cast<float>(v)); };
  check_neutral();
  for (const int width : {1, 7, 8, 123, 1000, 4096})
    for (const int ctas : {2, 4, 8, 16})
      for (const int elements : {4, 8})
        for (const int offset : {0, 1, elements - 1})
          for (const auto& c : cases(width, seed, to_float))
            check_row(c, offset == 1 ? 1.0f / 0.7f : 1.0f, offset, elements, ctas);
  for (const int width : {151665, 152064})
    for (const auto& c : cases(width, seed, to_float)) check_row(c, 1.0f / 1.3f, width % 8, 8, 8);
  if (failures == 0) std::printf("ok\n");
  return failures != 0;
}
