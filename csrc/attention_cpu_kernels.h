// Body of the CPU attention kernels, compiled once per instruction set as row_cpu_kernels.h is.
#include <algorithm>
#include <cmath>

#include "attention_cpu.h"
#include "cpu_lanes.h"

namespace vrlt_attention {
namespace VRLT_ISA {

using namespace vrlt_cpu::VRLT_ISA;

constexpr int64_t BLOCK = 64;  // keys whose scores exist at a time
constexpr int64_t TEAM = 4;    // tiles

template <typename T>
static inline int64_t whole(int64_t dim) {
  return (dim + W<T> - 1) / W<T> * W<T>;
}

// Query vectors `first` on of a segment, `count` of them; vector i is head i % ratio of token i / ratio. As lanes they
// are [dim][lane], as rows [lane][padded], zero where there is no vector and no component.
struct Vectors {
  int64_t first, count;
  int64_t token(int64_t lane, int64_t ratio) const { return (first + lane) / ratio; }
  int64_t head(int64_t lane, int64_t ratio) const { return (first + lane) % ratio; }
  // Keys of the segment itself that any of them sees.
  int64_t sees(int64_t ratio) const { return (first + count - 1) / ratio + 1; }
};

template <typename S>
static inline const typename S::Raw* at(const Rows& rows, int64_t token, int64_t head) {
  return static_cast<const typename S::Raw*>(rows.data) + token * rows.token + head * rows.head;
}

template <typename S, int64_t LANES>
static void load_lanes(
    const Rows& rows, const Problem& problem, const Unit& unit, const Vectors& vectors, typename S::T scale,
    typename S::T* lanes) {
  using T = typename S::T;
  const int64_t ratio = problem.ratio, dim = problem.dim;
  for (int64_t lane = 0; lane < LANES; ++lane) {
    const bool real = lane < vectors.count;
    const auto* from = real ? at<S>(rows, unit.segment.start + vectors.token(lane, ratio),
                                    unit.kv_head * ratio + vectors.head(lane, ratio))
                            : nullptr;
    for (int64_t c = 0; c < dim; ++c) lanes[c * LANES + lane] = real ? S::scalar(from[c]) * scale : T(0);
  }
}

template <typename T, int64_t LANES>
static void turn(const T* lanes, T* rows, int64_t dim, int64_t padded) {
  for (int64_t lane = 0; lane < LANES; ++lane) {
    for (int64_t c = 0; c < dim; ++c) rows[lane * padded + c] = lanes[c * LANES + lane];
    for (int64_t c = dim; c < padded; ++c) rows[lane * padded + c] = T(0);
  }
}

// Scores of keys that stand behind a lane's own token.
template <typename T, int64_t LANES>
static void mask(T* scores, int64_t begin, int64_t end, const Vectors& vectors, int64_t ratio) {
  for (int64_t key = begin; key < end; ++key) {
    const int64_t blind = std::min<int64_t>(key * ratio - vectors.first, LANES);
    for (int64_t lane = 0; lane < blind; ++lane)
      scores[(key - begin) * LANES + lane] = -std::numeric_limits<T>::infinity();
  }
}

// Some keys and values of a segment's past or of its own, `first` counted from the first of these.
template <typename S>
struct Block {
  const typename S::Raw *keys, *values;
  int64_t key_stride, value_stride, first, count;
  bool own;
};

template <typename S, int V>
struct ForwardTile {
  using T = typename S::T;
  static constexpr int64_t LANES = V * W<T>;
  alignas(64) T query[MAX_DIM * LANES], out[MAX_DIM * LANES], scores[BLOCK * LANES];
  Vec<T> max[V], sum[V];

  void begin(const Problem& problem, const Unit& unit, const Vectors& vectors, const Result&) {
    load_lanes<S, LANES>(problem.query, problem, unit, vectors, static_cast<T>(problem.scale), query);
    memset(out, 0, sizeof(T) * problem.dim * LANES);
    for (int v = 0; v < V; ++v) {
      max[v] = broadcast<T>(-std::numeric_limits<T>::infinity());
      sum[v] = Vec<T>{};
    }
  }

  void add(const Problem& problem, const Vectors& vectors, const Block<S>& b, const Result&) {
    dot_all<S, V>(query, b.keys, b.key_stride, b.count, problem.dim, scores);
    if (b.own) mask<T, LANES>(scores, b.first, b.first + b.count, vectors, problem.ratio);
    soften<T, V>(scores, b.count, max, sum, out, problem.dim);
    add_values_all<S, V>(scores, b.values, b.value_stride, b.count, problem.dim, out);
  }

  void end(const Problem& problem, const Unit& unit, const Vectors& vectors, const Result& result) {
    const int64_t dim = problem.dim, ratio = problem.ratio, heads = ratio * problem.kv_heads;
    for (int64_t lane = 0; lane < vectors.count; ++lane) {
      const int64_t token = unit.segment.start + vectors.token(lane, ratio);
      const int64_t place = token * heads + unit.kv_head * ratio + vectors.head(lane, ratio);
      const T total = sum[lane / W<T>][lane % W<T>], inverse = T(1) / total;
      auto* to = static_cast<typename S::Raw*>(result.out) + place * dim;
      for (int64_t c = 0; c < dim; ++c) to[c] = S::raw(out[c * LANES + lane] * inverse);
      static_cast<T*>(result.lse)[place] = max[lane / W<T>][lane % W<T>] + std::log(total);
    }
  }
};

// sums[j][c] += sum_lane weights[j][lane] rows[lane][c] of N keys and V vectors of components.
template <typename T, int V, int N>
static inline void add_lanes(
    const T* weights, int64_t lanes, const T* rows, int64_t padded, T* sums, int64_t stride) {
  Vec<T> sum[N][V] = {};
  for (int64_t lane = 0; lane < lanes; ++lane) {
    Vec<T> x[V];
    for (int v = 0; v < V; ++v) x[v] = load<T>(rows + lane * padded + v * W<T>);
    for (int j = 0; j < N; ++j) {
      const T y = weights[j * lanes + lane];
      for (int v = 0; v < V; ++v) sum[j][v] += x[v] * y;
    }
  }
  for (int j = 0; j < N; ++j)
    for (int v = 0; v < V; ++v) {
      T* to = sums + j * stride + v * W<T>;
      store<T>(to, load<T>(to) + sum[j][v]);
    }
}

template <typename T, int V>
static inline void add_lanes_keys(
    const T* weights, int64_t lanes, const T* rows, int64_t padded, T* sums, int64_t stride, int64_t keys) {
  constexpr int N = unrolled(V);
  int64_t j = 0;
  for (; j + N <= keys; j += N)
    add_lanes<T, V, N>(weights + j * lanes, lanes, rows, padded, sums + j * stride, stride);
  for (; j < keys; ++j) add_lanes<T, V, 1>(weights + j * lanes, lanes, rows, padded, sums + j * stride, stride);
}

template <typename T>
static void add_lanes_all(
    const T* weights, int64_t lanes, const T* rows, int64_t padded, T* sums, int64_t stride, int64_t keys) {
  int64_t c = 0;
  while (c < padded) {
    const int64_t left = (padded - c) / W<T>;
    if (left >= 3 && left != 4) {
      add_lanes_keys<T, 3>(weights, lanes, rows + c, padded, sums + c, stride, keys);
      c += 3 * W<T>;
    } else if (left >= 2) {
      add_lanes_keys<T, 2>(weights, lanes, rows + c, padded, sums + c, stride, keys);
      c += 2 * W<T>;
    } else {
      add_lanes_keys<T, 1>(weights, lanes, rows + c, padded, sums + c, stride, keys);
      c += W<T>;
    }
  }
}

struct Gradients {
  const Given& given;
  const Sums &own, &past;
};

template <typename S, int V>
struct BackwardTile {
  using T = typename S::T;
  static constexpr int64_t LANES = V * W<T>;
  alignas(64) T query[MAX_DIM * LANES], grad[MAX_DIM * LANES], query_rows[MAX_DIM * LANES], grad_rows[MAX_DIM * LANES];
  alignas(64) T into_query[MAX_DIM * LANES], weights[BLOCK * LANES], slopes[BLOCK * LANES];
  alignas(64) T lse[LANES], delta[LANES];

  // lse = inf where there is no vector: weights of 0.
  void load_numbers(const Problem& problem, const Unit& unit, const Vectors& vectors, const Given& given) {
    const int64_t ratio = problem.ratio, heads = ratio * problem.kv_heads;
    for (int64_t lane = 0; lane < LANES; ++lane) {
      lse[lane] = std::numeric_limits<T>::infinity();
      delta[lane] = 0;
      if (lane >= vectors.count) continue;
      const int64_t token = unit.segment.start + vectors.token(lane, ratio);
      const int64_t head = unit.kv_head * ratio + vectors.head(lane, ratio);
      lse[lane] = static_cast<const T*>(given.lse)[token * heads + head];
      const auto *out = at<S>(given.out, token, head), *by = at<S>(given.grad, token, head);
      for (int64_t c = 0; c < problem.dim; ++c) delta[lane] += S::scalar(out[c]) * S::scalar(by[c]);
    }
  }

  // From scores and the products of gradient and values to weights p and slopes p (product - delta).
  void slope(int64_t n) {
    for (int64_t j = 0; j < n; ++j)
      for (int v = 0; v < V; ++v) {
        T* p = weights + (j * V + v) * W<T>;
        T* d = slopes + (j * V + v) * W<T>;
        const Vec<T> e = exp_vec<T>(clamp_vec<T>(load<T>(p) - load<T>(lse + v * W<T>)));
        store<T>(p, e);
        store<T>(d, e * (load<T>(d) - load<T>(delta + v * W<T>)));
      }
  }

  void begin(const Problem& problem, const Unit& unit, const Vectors& vectors, const Gradients& gradients) {
    const int64_t dim = problem.dim, padded = whole<T>(dim);
    load_lanes<S, LANES>(problem.query, problem, unit, vectors, static_cast<T>(problem.scale), query);
    load_lanes<S, LANES>(gradients.given.grad, problem, unit, vectors, T(1), grad);
    load_numbers(problem, unit, vectors, gradients.given);
    turn<T, LANES>(query, query_rows, dim, padded);
    turn<T, LANES>(grad, grad_rows, dim, padded);
    memset(into_query, 0, sizeof(T) * dim * LANES);
  }

  void add(const Problem& problem, const Vectors& vectors, const Block<S>& b, const Gradients& gradients) {
    const int64_t dim = problem.dim, padded = whole<T>(dim);
    dot_all<S, V>(query, b.keys, b.key_stride, b.count, dim, weights);
    if (b.own) mask<T, LANES>(weights, b.first, b.first + b.count, vectors, problem.ratio);
    dot_all<S, V>(grad, b.values, b.value_stride, b.count, dim, slopes);
    slope(b.count);
    add_values_all<S, V>(slopes, b.keys, b.key_stride, b.count, dim, into_query);
    const Sums& to = b.own ? gradients.own : gradients.past;
    T *keys = static_cast<T*>(to.key) + b.first * to.token, *values = static_cast<T*>(to.value) + b.first * to.token;
    add_lanes_all<T>(slopes, LANES, query_rows, padded, keys, to.token, b.count);
    add_lanes_all<T>(weights, LANES, grad_rows, padded, values, to.token, b.count);
  }

  void end(const Problem& problem, const Unit& unit, const Vectors& vectors, const Gradients& gradients) {
    const int64_t dim = problem.dim, ratio = problem.ratio;
    const T scale = static_cast<T>(problem.scale);
    for (int64_t lane = 0; lane < vectors.count; ++lane) {
      const int64_t token = unit.segment.start + vectors.token(lane, ratio);
      const int64_t head = unit.kv_head * ratio + vectors.head(lane, ratio);
      auto* to = static_cast<typename S::Raw*>(gradients.given.query) + (token * ratio * problem.kv_heads + head) * dim;
      for (int64_t c = 0; c < dim; ++c) to[c] = S::raw(into_query[c * LANES + lane] * scale);
    }
  }
};

// A block of keys for all tiles that see it, so that it is read from memory once.
template <template <typename, int> class Tile, typename S, int V, typename More>
static void run_team(const Problem& problem, const Unit& unit, int64_t first, int64_t end, const More& more) {
  constexpr int64_t LANES = V * W<typename S::T>;
  Tile<S, V> tiles[TEAM];
  Vectors vectors[TEAM];
  int64_t count = 0;
  for (; first < end; first += LANES, ++count) {
    vectors[count] = {first, std::min<int64_t>(end - first, LANES)};
    tiles[count].begin(problem, unit, vectors[count], more);
  }
  const Segment& s = unit.segment;
  for (int64_t j = 0; j < s.past_length; j += BLOCK) {
    const int64_t token = s.past_start + j;
    const Block<S> block = {
        at<S>(problem.past_key, token, unit.kv_head), at<S>(problem.past_value, token, unit.kv_head),
        problem.past_key.token, problem.past_value.token, j, std::min(BLOCK, s.past_length - j), false};
    for (int64_t i = 0; i < count; ++i) tiles[i].add(problem, vectors[i], block, more);
  }
  for (int64_t j = 0; j < vectors[count - 1].sees(problem.ratio); j += BLOCK) {
    const int64_t token = s.start + j;
    Block<S> block = {
        at<S>(problem.key, token, unit.kv_head), at<S>(problem.value, token, unit.kv_head), problem.key.token,
        problem.value.token, j, 0, true};
    for (int64_t i = 0; i < count; ++i) {
      block.count = std::min(BLOCK, vectors[i].sees(problem.ratio) - j);
      if (block.count > 0) tiles[i].add(problem, vectors[i], block, more);
    }
  }
  for (int64_t i = 0; i < count; ++i) tiles[i].end(problem, unit, vectors[i], more);
}

// As few tiles as it takes, each as narrow as that allows.
template <template <typename, int> class Tile, typename S, typename More>
static void run_tiles(const Problem& problem, const Unit& unit, const More& more) {
  constexpr int64_t WIDTH = W<typename S::T>, MOST = TEAM * MAX_VECTORS * WIDTH;
  const int64_t begin = unit.first * problem.ratio, end = begin + unit.count * problem.ratio;
  for (int64_t first = begin; first < end; first += MOST) {
    const int64_t last = std::min(end, first + MOST), vectors = (last - first + WIDTH - 1) / WIDTH;
    const int64_t tiles = (vectors + MAX_VECTORS - 1) / MAX_VECTORS, wide = (vectors + tiles - 1) / tiles;
    if (wide == 1)
      run_team<Tile, S, 1>(problem, unit, first, last, more);
    else if (wide == 2)
      run_team<Tile, S, 2>(problem, unit, first, last, more);
    else
      run_team<Tile, S, 3>(problem, unit, first, last, more);
  }
}

template <typename S>
static void forward(const Problem& problem, const Unit& unit, const Result& result) {
  run_tiles<ForwardTile, S>(problem, unit, result);
}

template <typename S>
static void backward(
    const Problem& problem, const Unit& unit, const Given& given, const Sums& own, const Sums& past) {
  run_tiles<BackwardTile, S>(problem, unit, Gradients{given, own, past});
}

template <typename S>
constexpr Functions table() {
  return {sizeof(typename S::T), W<typename S::T>, forward<S>, backward<S>, add_parts<S>};
}

static const Functions tables[] = {table<Float>(), table<BFloat16>(), table<Double>()};

extern const Functions* const functions = tables;

}  // namespace VRLT_ISA
}  // namespace vrlt_attention
