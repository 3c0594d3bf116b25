// The ops `vrlt_native::group_attention`, its backward and `chunk_attention` over attention_cpu.h.
#include <algorithm>
#include <cstring>
#include <numeric>
#include <string>
#include <tuple>
#include <vector>

#include "attention_cpu.h"
#include "cpu_binding.h"

namespace vrlt_binding {

using vrlt_attention::Functions;
using vrlt_attention::Given;
using vrlt_attention::Problem;
using vrlt_attention::Result;
using vrlt_attention::Rows;
using vrlt_attention::Segment;
using vrlt_attention::Sums;
using vrlt_attention::Unit;

constexpr int64_t ANY = -1;  // number of tokens

static Rows token_rows(const Tensor& x, const Tensor& like, int64_t heads, const char* name, int64_t tokens) {
  STD_TORCH_CHECK(
      x.dim() == 3 && x.size(1) == heads && x.size(2) == like.size(2) && (tokens == ANY || x.size(0) == tokens) &&
          x.scalar_type() == like.scalar_type() && x.device().type() == torch::headeronly::DeviceType::CPU &&
          (x.size(2) == 1 || x.stride(2) == 1),
      name, ": needs [", tokens == ANY ? "tokens" : std::to_string(tokens), ", ", heads, ", ", like.size(2),
      "] of the query's dtype on the CPU, with a last stride of 1");
  return {x.const_data_ptr(), x.stride(0), x.stride(1)};
}

// Where token 0 of a sequence would stand, of which the first `skip` aren't in memory.
static const void* before(const void* data, int64_t skip, int64_t stride, const Tensor& of) {
  const auto bytes = static_cast<uintptr_t>(skip * stride * static_cast<int64_t>(of.element_size()));
  return reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(data) - bytes);
}

static Rows query_rows(const Tensor& x, const Tensor& query, const char* name, int64_t skip) {
  Rows rows = token_rows(x, query, query.size(1), name, query.size(0));
  rows.data = before(rows.data, skip, rows.token, x);
  return rows;
}

// Of tensors that the ops allocate.
static void* written(const Tensor& x, int64_t skip) {
  return const_cast<void*>(before(x.mutable_data_ptr(), skip, x.stride(0), x));
}

// The first `skip` tokens have keys and values, but no queries.
static Problem problem_of(const Tensor& query, const Tensor& key, const Tensor& value, double scale, int64_t skip = 0) {
  STD_TORCH_CHECK(query.dim() == 3 && key.dim() == 3, "query, key: need three dimensions");
  const int64_t heads = query.size(1), kv_heads = key.size(1), dim = query.size(2);
  STD_TORCH_CHECK(
      dim > 0 && dim <= vrlt_attention::MAX_DIM, "query: needs 1 to ", vrlt_attention::MAX_DIM, " components");
  STD_TORCH_CHECK(kv_heads > 0 && heads % kv_heads == 0, "key: needs heads that divide the query's ", heads);
  const int64_t tokens = query.size(0) + skip;
  const Rows keys = token_rows(key, query, kv_heads, "key", tokens);
  const Rows values = token_rows(value, query, kv_heads, "value", tokens);
  return {heads / kv_heads, kv_heads, dim, scale, query_rows(query, query, "query", skip), keys, values, keys, values};
}

// A group: its segments stand side by side in the sequence, the prefix first.
struct Group {
  int64_t start, length;
  std::vector<Segment> segments;
};

static std::vector<Group> groups_of(
    int64_t tokens, const std::vector<int64_t>& prefix, const std::vector<int64_t>& counts,
    const std::vector<int64_t>& lengths, int64_t skip) {
  STD_TORCH_CHECK(
      skip == 0 || (prefix.size() == 1 && prefix[0] == skip), "skip: got ", skip, ", needs 0 or the only prefix");
  STD_TORCH_CHECK(prefix.size() == counts.size(), "counts: needs one for each of ", prefix.size(), " prefixes");
  std::vector<Group> groups;
  int64_t at = 0;
  size_t row = 0;
  for (size_t g = 0; g < prefix.size(); ++g) {
    Group group = {at, 0, {}};
    const auto add = [&](int64_t length, int64_t past) {
      STD_TORCH_CHECK(length >= 0 && length <= tokens - at, "lengths: add up to more than ", tokens, " tokens");
      if (length > 0 && at >= skip) group.segments.push_back({at, length, group.start, past});
      at += length;
    };
    add(prefix[g], 0);
    STD_TORCH_CHECK(
        counts[g] >= 0 && counts[g] <= static_cast<int64_t>(lengths.size() - row), "counts: more rows than lengths");
    for (int64_t i = 0; i < counts[g]; ++i) add(lengths[row++], prefix[g]);
    group.length = at - group.start;
    groups.push_back(std::move(group));
  }
  STD_TORCH_CHECK(row == lengths.size() && at == tokens, "lengths: add up to ", at, " of ", tokens, " tokens");
  return groups;
}

static int64_t products(const Unit& unit, int64_t ratio) {
  return unit.count * ratio * (unit.segment.past_length + unit.first + (unit.count + 1) / 2);
}

// The units of a segment and KV head: as many tokens as fill a few tiles.
static void cut(const Segment& segment, int64_t kv_head, int64_t ratio, int64_t lanes, std::vector<Unit>& into) {
  const int64_t most = std::max<int64_t>(1, 12 * lanes / ratio);
  for (int64_t first = 0; first < segment.length; first += most)
    into.push_back({segment, first, std::min(most, segment.length - first), kv_head});
}

static std::tuple<Tensor, Tensor> attend(
    const Problem& problem, const Tensor& query, const std::vector<Segment>& segments, const Functions& functions,
    int64_t skip = 0) {
  const Tensor out = torch::stable::new_empty(query, {query.size(0), query.size(1), query.size(2)});
  const Tensor lse = torch::stable::new_empty(query, {query.size(0), query.size(1)}, result_type(query));
  std::vector<Unit> units;
  for (const Segment& segment : segments)
    for (int64_t head = 0; head < problem.kv_heads; ++head) cut(segment, head, problem.ratio, functions.lanes, units);
  std::stable_sort(units.begin(), units.end(), [&](const Unit& a, const Unit& b) {
    return products(a, problem.ratio) > products(b, problem.ratio);
  });
  int64_t work = 0;
  for (const Unit& unit : units) work += 2 * problem.dim * products(unit, problem.ratio);
  const Result result = {written(out, skip), written(lse, skip)};
  spread(static_cast<int64_t>(units.size()), work, [&](int64_t i) { functions.forward(problem, units[i], result); });
  return {out, lse};
}

std::tuple<Tensor, Tensor> group_attention(
    Tensor query, Tensor key, Tensor value, std::vector<int64_t> prefix, std::vector<int64_t> counts,
    std::vector<int64_t> lengths, double scale, int64_t skip) {
  const Problem problem = problem_of(query, key, value, scale, skip);
  std::vector<Segment> segments;
  for (const Group& group : groups_of(key.size(0), prefix, counts, lengths, skip))
    segments.insert(segments.end(), group.segments.begin(), group.segments.end());
  return attend(problem, query, segments, vrlt_attention::functions(cpu_dtype(query, "query")), skip);
}

Tensor chunk_attention(
    Tensor query, Tensor key, Tensor value, Tensor past_key, Tensor past_value, double scale) {
  Problem problem = problem_of(query, key, value, scale);
  problem.past_key = token_rows(past_key, query, problem.kv_heads, "past_key", ANY);
  problem.past_value = token_rows(past_value, query, problem.kv_heads, "past_value", ANY);
  STD_TORCH_CHECK(past_key.size(0) == past_value.size(0), "past_value: needs ", past_key.size(0), " tokens");
  const Segment segment = {0, query.size(0), 0, past_key.size(0)};
  return std::get<0>(attend(problem, query, {segment}, vrlt_attention::functions(cpu_dtype(query, "query"))));
}

// A share of a group's units of one KV head, with sums of its own for all of the group's keys and values.
struct Piece {
  const Group* group;
  int64_t kv_head;
  std::vector<Unit> units;
  int64_t work;
};

class Backward {
 public:
  Backward(const Problem& problem, const Given& given, const Functions& functions, const Tensor& key)
      : problem_(problem),
        given_(given),
        functions_(functions),
        padded_((problem.dim + functions.lanes - 1) / functions.lanes * functions.lanes),
        key(torch::stable::new_empty(key, {key.size(0), key.size(1), key.size(2)})),
        value(torch::stable::new_empty(key, {key.size(0), key.size(1), key.size(2)})) {}

  void run(const std::vector<Group>& groups) {
    std::vector<Piece> pieces;
    std::vector<int64_t> begins;  // of the pieces that belong together
    for (const Group& group : groups)
      for (int64_t head = 0; head < problem_.kv_heads && group.length > 0; ++head) {
        begins.push_back(static_cast<int64_t>(pieces.size()));
        split(group, head, pieces);
      }
    begins.push_back(static_cast<int64_t>(pieces.size()));
    std::vector<size_t> places;
    size_t room = 0;
    int64_t work = 0;
    for (const Piece& piece : pieces) {
      places.push_back(room);
      room += 2 * piece.group->length * padded_ * functions_.compute_bytes;
      work += piece.work;
    }
    std::vector<char> sums(room);
    spread(static_cast<int64_t>(pieces.size()), work, [&](int64_t i) {
      const Piece& piece = pieces[i];
      for (const Unit& unit : piece.units) {
        const Sums own = sums_at(sums.data() + places[i], piece, unit.segment.start);
        const Sums past = sums_at(sums.data() + places[i], piece, unit.segment.past_start);
        functions_.backward(problem_, unit, given_, own, past);
      }
    });
    spread(static_cast<int64_t>(begins.size()) - 1, work, [&](int64_t i) {
      const Piece& piece = pieces[begins[i]];
      const int64_t bytes = static_cast<int64_t>(key.element_size()), each = piece.group->length * padded_;
      for (int64_t t = 0; t < piece.group->length; ++t) {
        const int64_t to = ((piece.group->start + t) * problem_.kv_heads + piece.kv_head) * problem_.dim * bytes;
        for (int64_t half = 0; half < 2; ++half)
          functions_.add(
              static_cast<char*>((half ? value : key).mutable_data_ptr()) + to,
              sums.data() + places[begins[i]] + (half * each + t * padded_) * functions_.compute_bytes,
              begins[i + 1] - begins[i], 2 * each, problem_.dim);
      }
    });
  }

 private:
  // How many pieces doesn't depend on threads: their sums are added up, and bits should stay.
  void split(const Group& group, int64_t head, std::vector<Piece>& into) const {
    constexpr int64_t ENOUGH = 1 << 28, MOST = 8;  // multiplications of a piece; pieces
    std::vector<Unit> units;
    for (const Segment& segment : group.segments) cut(segment, head, problem_.ratio, functions_.lanes, units);
    const auto cost = [&](const Unit& unit) { return 5 * problem_.dim * products(unit, problem_.ratio); };
    int64_t total = 0, done = 0;
    for (const Unit& unit : units) total += cost(unit);
    const int64_t count = std::clamp<int64_t>(total / ENOUGH, 1, MOST);
    const size_t first = into.size();
    if (units.empty()) into.push_back({&group, head, {}, 0});
    for (const Unit& unit : units) {
      const size_t place = first + static_cast<size_t>(std::min(count - 1, done / (total / count + 1)));
      if (into.size() <= place) into.push_back({&group, head, {}, 0});
      into.back().units.push_back(unit);
      into.back().work += cost(unit);
      done += cost(unit);
    }
  }

  Sums sums_at(char* base, const Piece& piece, int64_t token) const {
    char* key_sums = base + (token - piece.group->start) * padded_ * functions_.compute_bytes;
    return {key_sums, key_sums + piece.group->length * padded_ * functions_.compute_bytes, padded_};
  }

  const Problem& problem_;
  const Given& given_;
  const Functions& functions_;
  int64_t padded_;

 public:
  Tensor key, value;  // gradients
};

std::tuple<Tensor, Tensor, Tensor> group_attention_backward(
    Tensor grad, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, std::vector<int64_t> prefix,
    std::vector<int64_t> counts, std::vector<int64_t> lengths, double scale, int64_t skip) {
  const Problem problem = problem_of(query, key, value, scale, skip);
  STD_TORCH_CHECK(
      lse.dim() == 2 && lse.size(0) == query.size(0) && lse.size(1) == query.size(1) && lse.is_contiguous() &&
          lse.scalar_type() == result_type(query) && lse.device().type() == torch::headeronly::DeviceType::CPU,
      "lse: needs what group_attention gave");
  const Tensor into = torch::stable::new_empty(query, {query.size(0), query.size(1), query.size(2)});
  const Given given = {
      query_rows(grad, query, "grad", skip), query_rows(out, query, "out", skip),
      before(lse.const_data_ptr(), skip, lse.stride(0), lse), written(into, skip)};
  Backward backward(problem, given, vrlt_attention::functions(cpu_dtype(query, "query")), key);
  backward.run(groups_of(key.size(0), prefix, counts, lengths, skip));
  return {into, backward.key, backward.value};
}

}  // namespace vrlt_binding

STABLE_TORCH_LIBRARY_FRAGMENT(vrlt_native, m) {
  m.def(
      "group_attention(Tensor query, Tensor key, Tensor value, int[] prefix, int[] counts, int[] lengths, float scale, "
      "int skip) -> (Tensor out, Tensor lse)");
  m.def(
      "group_attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, "
      "int[] prefix, int[] counts, int[] lengths, float scale, int skip) -> (Tensor query, Tensor key, Tensor value)");
  m.def(
      "chunk_attention(Tensor query, Tensor key, Tensor value, Tensor past_key, Tensor past_value, float scale) -> "
      "Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(vrlt_native, CPU, m) {
  m.impl("group_attention", TORCH_BOX(&vrlt_binding::group_attention));
  m.impl("group_attention_backward", TORCH_BOX(&vrlt_binding::group_attention_backward));
  m.impl("chunk_attention", TORCH_BOX(&vrlt_binding::chunk_attention));
}
