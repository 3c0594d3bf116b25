// The op `vrlt_native::group_decode` over decode_cpu.h.
#include <algorithm>
#include <vector>

#include "cpu_ops.h"
#include "decode_cpu.h"

namespace vrlt_binding {

using vrlt_decode::Functions;
using vrlt_decode::Parts;
using vrlt_decode::Queries;
using vrlt_decode::Shape;
using vrlt_decode::Span;
using vrlt_decode::SPLIT;
using vrlt_decode::Unit;

// A cache of keys or values; `slots` [slots, columns, heads, d], else [tokens, heads, d]. A prefix is one slot.
struct Cache {
  Cache(const Tensor& x, const char* name, const Tensor& query, int64_t kv_heads, int64_t slots) : Cache(x, slots) {
    STD_TORCH_CHECK(
        x.dim() == slots + 3 && x.size(-2) == kv_heads && x.size(-1) == query.size(2) &&
            x.scalar_type() == query.scalar_type() && x.device().type() == query.device().type(),
        name, ": needs ", slots ? "[slots, columns, " : "[tokens, ", kv_heads, ", ", query.size(2),
        "] of the query's dtype on the CPU");
    STD_TORCH_CHECK(x.size(-1) == 1 || x.stride(-1) == 1, name, ": needs a last stride of 1");
  }
  const void* at(int64_t slot_, int64_t token_, int64_t head_) const {
    return data + bytes * (slot_ * slot + token_ * token + head_ * head);
  }

  const char* data;
  int64_t bytes, slot, token, head, slots, tokens;

 private:
  Cache(const Tensor& x, int64_t of)
      : data(static_cast<const char*>(x.const_data_ptr())),
        bytes(static_cast<int64_t>(x.element_size())),
        slot(of ? x.stride(0) : 0),
        token(x.stride(of)),
        head(x.stride(of + 1)),
        slots(of ? x.size(0) : 1),
        tokens(x.size(of)) {}
};

struct KeyValue {
  Cache keys, values;
  Span span(int64_t slot, int64_t token, int64_t head, int64_t length) const {
    return {keys.at(slot, token, head), values.at(slot, token, head), keys.token, values.token, length};
  }
};

static Column integers(const Tensor& x, int64_t count, const char* name) {
  STD_TORCH_CHECK(
      x.dim() == 1 && x.size(0) == count && x.device().type() == torch::headeronly::DeviceType::CPU &&
          (x.scalar_type() == ScalarType::Long || x.scalar_type() == ScalarType::Int),
      name, ": needs int32 or int64 [", count, "] on the CPU");
  return Column(x);
}

// Units in the order they should begin, longest first, and the parts that each row gets.
class Work {
 public:
  Work(int64_t rows, int64_t kv_heads) : parts_(rows + 1, 0), heads_(kv_heads) {}

  void group(const KeyValue& prefix, int64_t start, int64_t length, int64_t first, int64_t last) {
    add(prefix, 0, start, length, first, last);
  }
  void row(const KeyValue& suffix, int64_t slot, int64_t length, int64_t row) {
    add(suffix, slot, 0, length, row, row + 1);
  }
  // Behind the last group and row.
  void finish(int64_t ratio) {
    std::stable_sort(units.begin(), units.end(), [](const Unit& a, const Unit& b) {
      return a.span.length * a.rows > b.span.length * b.rows;
    });
    for (const Unit& unit : units) products += unit.span.length * unit.rows * ratio;
    int64_t total = 0;
    for (int64_t& count : parts_) {
      const int64_t here = count;
      count = total;
      total += here;
    }
  }
  const int64_t* first_part() const { return parts_.data(); }
  int64_t parts() const { return parts_.back(); }

  std::vector<Unit> units;
  int64_t products = 0;  // of a query vector and a key

 private:
  void add(const KeyValue& cache, int64_t slot, int64_t token, int64_t length, int64_t first, int64_t last) {
    for (int64_t j = 0; j < length; j += SPLIT) {
      for (int64_t head = 0; head < heads_; ++head) {
        const int64_t n = std::min(SPLIT, length - j);
        units.push_back({cache.span(slot, token + j, head, n), first, last - first, head, parts_[first]});
      }
      for (int64_t row = first; row < last; ++row) ++parts_[row];
    }
  }

  std::vector<int64_t> parts_;
  int64_t heads_;
};

Tensor group_decode(
    Tensor query, Tensor prefix_key, Tensor prefix_value, Tensor suffix_key, Tensor suffix_value, Tensor prefix_start,
    Tensor prefix_length, Tensor row_offsets, Tensor slots, Tensor suffix_length, double scale, int64_t max_group) {
  STD_TORCH_CHECK(query.dim() == 3 && prefix_key.dim() == 3, "query, prefix_key: need three dimensions");
  const int64_t rows = query.size(0), heads = query.size(1), dim = query.size(2), kv_heads = prefix_key.size(1);
  STD_TORCH_CHECK(dim > 0 && dim <= vrlt_decode::MAX_DIM, "query: needs 1 to ", vrlt_decode::MAX_DIM, " components");
  STD_TORCH_CHECK(dim == 1 || query.stride(2) == 1, "query: needs a last stride of 1");
  STD_TORCH_CHECK(kv_heads > 0 && heads % kv_heads == 0, "prefix_key: needs KV heads that divide the query's ", heads);
  const Functions& functions = vrlt_decode::functions(cpu_dtype(query, "query"));
  const KeyValue prefix = {
      Cache(prefix_key, "prefix_key", query, kv_heads, 0), Cache(prefix_value, "prefix_value", query, kv_heads, 0)};
  const KeyValue suffix = {
      Cache(suffix_key, "suffix_key", query, kv_heads, 1), Cache(suffix_value, "suffix_value", query, kv_heads, 1)};
  STD_TORCH_CHECK(
      prefix.keys.tokens == prefix.values.tokens && suffix.keys.slots == suffix.values.slots &&
          suffix.keys.tokens == suffix.values.tokens,
      "prefix_value, suffix_value: need the sizes of the keys");
  const int64_t groups = row_offsets.size(0) - 1;
  STD_TORCH_CHECK(groups >= 0, "row_offsets: needs at least one offset");
  const Column offsets = integers(row_offsets, groups + 1, "row_offsets");
  const Column starts = integers(prefix_start, groups, "prefix_start");
  const Column lengths = integers(prefix_length, groups, "prefix_length");
  const Column places = integers(slots, rows, "slots"), owns = integers(suffix_length, rows, "suffix_length");

  Work work(rows, kv_heads);
  STD_TORCH_CHECK(offsets.index(0) == 0, "row_offsets: begin at ", offsets.index(0));
  for (int64_t i = 0; i < groups; ++i) {
    const int64_t first = offsets.index(i), last = offsets.index(i + 1);
    STD_TORCH_CHECK(
        first <= last && last <= rows && last - first <= max_group, "row_offsets: group ", i, " has rows ", first,
        " to ", last, " of ", rows, ", max_group ", max_group);
    const int64_t start = starts.index(i), length = lengths.index(i);
    if (first == last || length == 0) continue;
    STD_TORCH_CHECK(
        length > 0 && start >= 0 && length <= prefix.keys.tokens && start <= prefix.keys.tokens - length,
        "prefix_start: ", length, " tokens from ", start, " for group ", i);
    work.group(prefix, start, length, first, last);
  }
  const int64_t live = offsets.index(groups);
  for (int64_t row = 0; row < live; ++row) {
    const int64_t own = owns.index(row), slot = places.index(row);
    STD_TORCH_CHECK(own >= 0 && own <= suffix.keys.tokens, "suffix_length: ", own, " for row ", row);
    STD_TORCH_CHECK(own == 0 || (slot >= 0 && slot < suffix.keys.slots), "slots: ", slot, " for row ", row);
    if (own > 0) work.row(suffix, slot, own, row);
  }
  const Shape shape = {heads / kv_heads, kv_heads, dim, scale};
  work.finish(shape.ratio);

  const Tensor out = torch::stable::new_empty(query, {rows, heads, dim});
  std::vector<char> room(work.parts() * heads * (dim + 2) * functions.compute_bytes);
  const Parts parts = {room.data(), work.first_part()};
  const Queries queries = {query.const_data_ptr(), query.stride(0), query.stride(1)};
  spread(static_cast<int64_t>(work.units.size()), 2 * dim * work.products, [&](int64_t i) {
    functions.attend(queries, work.units[i], shape, parts);
  });
  char* to = static_cast<char*>(out.mutable_data_ptr());
  for (int64_t row = 0; row < rows; ++row)
    functions.merge(to + row * heads * dim * static_cast<int64_t>(out.element_size()), row, shape, parts);
  return out;
}

}  // namespace vrlt_binding

STABLE_TORCH_LIBRARY_FRAGMENT(vrlt_native, m) {
  m.def(
      "group_decode(Tensor query, Tensor prefix_key, Tensor prefix_value, Tensor suffix_key, Tensor suffix_value, "
      "Tensor prefix_start, Tensor prefix_length, Tensor row_offsets, Tensor slots, Tensor suffix_length, float scale, "
      "int max_group) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(vrlt_native, CPU, m) {
  m.impl("group_decode", TORCH_BOX(&vrlt_binding::group_decode));
}
