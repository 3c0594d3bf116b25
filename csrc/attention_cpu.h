// Causal attention of segments that see a past, forward and backward, torch-free. What it computes:
// kernels/vrlt_kernels/group_attention.py.
//
// Query vectors that share a KV head stand in lanes (cpu_lanes.h): the products with keys and values add nothing up
// across lanes, and where gradients of keys and values do, components stand in lanes instead. Scores exist for a block of
// keys at a time.
#pragma once

#include <cstdint>

#include "row_cpu.h"

namespace vrlt_attention {

using vrlt_cpu::DType;
using vrlt_cpu::Isa;

constexpr int64_t MAX_DIM = 256;  // of a head

// [tokens, heads, dim]; strides in elements, that of a component is 1.
struct Rows {
  const void* data;
  int64_t token, head;
};

struct Problem {
  int64_t ratio, kv_heads, dim;  // ratio: query heads a KV head
  double scale;
  Rows query, key, value, past_key, past_value;
};

// Tokens from `start` on that see themselves causally, and all of `past_length` past tokens from `past_start` on.
struct Segment {
  int64_t start, length, past_start, past_length;
};

// Some tokens of a segment, `first` counted from its start, and a KV head.
struct Unit {
  Segment segment;
  int64_t first, count, kv_head;
};

// Contiguous: out [tokens, query heads, dim], lse [tokens, query heads] in the compute type.
struct Result {
  void *out, *lse;
};

// grad and out as the result's out, of any stride; lse as its lse; query: where the query's gradient goes, contiguous.
struct Given {
  Rows grad, out;
  const void* lse;
  void* query;
};

// Where the gradients of keys and values add up, in the compute type, of one KV head, from a first token on. Written in
// whole vectors: `token`, the stride, is at least dim rounded up to `lanes`.
struct Sums {
  void *key, *value;
  int64_t token;
};

struct Functions {
  int64_t compute_bytes, lanes;
  void (*forward)(const Problem& problem, const Unit& unit, const Result& result);
  void (*backward)(
      const Problem& problem, const Unit& unit, const Given& given, const Sums& own, const Sums& past);
  // out[c] = sum_p parts[p * stride + c] of dim components, in the storage type.
  void (*add)(void* out, const void* parts, int64_t count, int64_t stride, int64_t dim);
};

const Functions& functions(DType dtype);
const Functions* functions_for(DType dtype, Isa isa);

}  // namespace vrlt_attention
