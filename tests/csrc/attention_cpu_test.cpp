// The CPU attention kernels of every instruction set that this machine has, against the formula in fp64: one segment on
// its past and on itself, of every size of tile and head, forward and backward.
#include "attention_cpu.h"

#include <algorithm>

#include "check.h"

using namespace vrlt_attention;

template <typename Raw>
struct Values {
  std::vector<Raw> raw;
  int64_t heads, dim, gap;  // between heads
  Values(std::mt19937& generator, int64_t tokens, int64_t heads_, int64_t dim_, int64_t gap_)
      : raw(tokens * heads_ * (dim_ + gap_)), heads(heads_), dim(dim_), gap(gap_) {
    std::normal_distribution<double> normal(0, 1);
    for (auto& v : raw) v = Storage<Raw>::put(normal(generator));
  }
  Rows rows() const { return {raw.data(), heads * (dim + gap), dim + gap}; }
  double at(int64_t token, int64_t head, int64_t c) const {
    return Storage<Raw>::get(raw[(token * heads + head) * (dim + gap) + c]);
  }
};

struct Size {
  int64_t tokens, past, ratio, kv_heads, dim;
};

template <typename Raw, typename T>
static void check_size(const Size& n, DType dtype, Isa isa, double eps, std::mt19937& generator) {
  const Functions* f = vrlt_attention::functions_for(dtype, isa);
  if (!f) return;
  const std::string where = "isa " + std::to_string(static_cast<int>(isa)) + " dtype " +
                            std::to_string(static_cast<int>(dtype)) + " tokens " + std::to_string(n.tokens) + " past " +
                            std::to_string(n.past) + " ratio " + std::to_string(n.ratio) + " dim " +
                            std::to_string(n.dim) + " ";
  const int64_t heads = n.ratio * n.kv_heads, padded = (n.dim + f->lanes - 1) / f->lanes * f->lanes;
  const Values<Raw> q(generator, n.tokens, heads, n.dim, 3), k(generator, n.tokens, n.kv_heads, n.dim, 1);
  const Values<Raw> v(generator, n.tokens, n.kv_heads, n.dim, 0), pk(generator, n.past, n.kv_heads, n.dim, 2);
  const Values<Raw> pv(generator, n.past, n.kv_heads, n.dim, 0), g(generator, n.tokens, heads, n.dim, 0);
  const double scale = 0.7 / std::sqrt(static_cast<double>(n.dim));
  const Problem problem = {n.ratio, n.kv_heads, n.dim, scale, q.rows(), k.rows(), v.rows(), pk.rows(), pv.rows()};
  const Raw guard = Storage<Raw>::put(77);
  std::vector<Raw> out(n.tokens * heads * n.dim + 8, guard), dq = out;
  std::vector<T> lse(n.tokens * heads), own(2 * n.tokens * padded), past(2 * n.past * padded);
  const Segment segment = {0, n.tokens, 0, n.past};
  const Rows out_rows = {out.data(), heads * n.dim, n.dim};
  for (int64_t kv = 0; kv < n.kv_heads; ++kv) {
    std::fill(own.begin(), own.end(), T(0));
    std::fill(past.begin(), past.end(), T(0));
    f->forward(problem, {segment, 0, n.tokens, kv}, {out.data(), lse.data()});
    const Given given = {g.rows(), out_rows, lse.data(), dq.data()};
    const Sums to_own = {own.data(), own.data() + n.tokens * padded, padded};
    const Sums to_past = {past.data(), past.data() + n.past * padded, padded};
    f->backward(problem, {segment, 0, n.tokens, kv}, given, to_own, to_past);

    const int64_t keys = n.past + n.tokens;
    std::vector<double> dk(keys * n.dim), dv(keys * n.dim);
    const auto key = [&](int64_t j, int64_t c) { return j < n.past ? pk.at(j, kv, c) : k.at(j - n.past, kv, c); };
    const auto value = [&](int64_t j, int64_t c) { return j < n.past ? pv.at(j, kv, c) : v.at(j - n.past, kv, c); };
    for (int64_t t = 0; t < n.tokens; ++t)
      for (int64_t head = kv * n.ratio; head < (kv + 1) * n.ratio; ++head) {
        const int64_t sees = n.past + t + 1;
        std::vector<double> p(sees), slope(sees);
        double sum = 0, delta = 0;
        for (int64_t j = 0; j < sees; ++j) {
          for (int64_t c = 0; c < n.dim; ++c) p[j] += scale * q.at(t, head, c) * key(j, c);
          sum += p[j] = std::exp(p[j]);
        }
        const int64_t place = t * heads + head;
        close(lse[place], std::log(sum), eps * 8, where, "lse", place);
        for (int64_t c = 0; c < n.dim; ++c) {
          double o = 0;
          for (int64_t j = 0; j < sees; ++j) o += p[j] / sum * value(j, c);
          close(Storage<Raw>::get(out[place * n.dim + c]), o, eps * 4, where, "out", place * n.dim + c);
          delta += Storage<Raw>::get(out[place * n.dim + c]) * g.at(t, head, c);
        }
        for (int64_t j = 0; j < sees; ++j) {
          double product = 0;
          for (int64_t c = 0; c < n.dim; ++c) product += g.at(t, head, c) * value(j, c);
          p[j] /= sum;
          slope[j] = scale * p[j] * (product - delta);
          for (int64_t c = 0; c < n.dim; ++c) {
            dk[j * n.dim + c] += slope[j] * q.at(t, head, c);
            dv[j * n.dim + c] += p[j] * g.at(t, head, c);
          }
        }
        for (int64_t c = 0; c < n.dim; ++c) {
          double want = 0;
          for (int64_t j = 0; j < sees; ++j) want += slope[j] * key(j, c);
          close(Storage<Raw>::get(dq[place * n.dim + c]), want, eps * 16, where, "dq", place * n.dim + c);
        }
      }
    const double room = eps * 16 * (1 + static_cast<double>(n.tokens * n.ratio) / 16);
    for (int64_t j = 0; j < keys; ++j)
      for (int64_t c = 0; c < n.dim; ++c) {
        const T* sums = j < n.past ? past.data() + j * padded + c : own.data() + (j - n.past) * padded + c;
        close(sums[0], dk[j * n.dim + c], room, where, "dk", j * n.dim + c);
        const int64_t half = (j < n.past ? n.past : n.tokens) * padded;
        close(sums[half], dv[j * n.dim + c], room, where, "dv", j * n.dim + c);
      }
  }
  for (int i = 0; i < 8; ++i) check(out[out.size() - 1 - i] == guard, where + "wrote past the end");
}

int main(int, char** argv) {
  std::mt19937 generator(static_cast<unsigned>(std::atoi(argv[1])));
  const Size sizes[] = {{1, 0, 1, 1, 1},    {3, 5, 1, 2, 7},   {17, 64, 3, 2, 32}, {40, 0, 7, 1, 20},
                        {130, 70, 2, 1, 33}, {5, 129, 6, 1, 64}, {9, 1, 70, 1, 8},   {2, 3, 1, 1, 256}};
  for (const Size& size : sizes)
    for (const Isa isa : {Isa::generic, Isa::avx2, Isa::avx512}) {
      check_size<float, float>(size, DType::f32, isa, 1e-6, generator);
      check_size<double, double>(size, DType::f64, isa, 1e-14, generator);
      check_size<uint16_t, float>(size, DType::bf16, isa, 4e-3, generator);
    }
  std::printf(failures ? "%d wrong\n" : "ok\n", failures);
  return failures ? 1 : 0;
}
