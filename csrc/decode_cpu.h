// Attention of one new token a row over the prefix of its group and a suffix of its own, torch-free. What it computes:
// kernels/vrlt_kernels/group_decode.py.
//
// The keys of a prefix or suffix are cut into splits. A unit is the query vectors that share a KV head (all rows of a
// group for a prefix, one row for a suffix) on one split. It leaves a part for each of its vectors: the softmax of that
// split alone, not normalised, with its maximum and sum. Parts of a vector are merged in the order of their keys. Query
// vectors are lanes, and a lane is computed alike in every lane and width of tile: the bits of a row depend on its own
// query, keys and values alone.
#pragma once

#include <cstdint>

#include "row_cpu.h"

namespace vrlt_decode {

using vrlt_cpu::DType;
using vrlt_cpu::Isa;

constexpr int64_t SPLIT = 512;    // keys of a unit
constexpr int64_t MAX_DIM = 256;  // of a head

struct Queries {
  const void* data;
  int64_t row, head;  // strides in elements; that of a component is 1
};

// The keys and values of one unit, from its first token on; strides in elements.
struct Span {
  const void *keys, *values;
  int64_t key_stride, value_stride, length;
};

struct Unit {
  Span span;
  int64_t first_row, rows, kv_head;
  int64_t part;  // which part of its rows it leaves
};

struct Shape {
  int64_t ratio, kv_heads, dim;
  double scale;
};

// Where parts lie: those of a row are `first_part[row]` to `first_part[row + 1]`, each [kv_heads, ratio, dim + 2] in
// the compute type: dim sums, then maximum and sum of the weights.
struct Parts {
  void* data;
  const int64_t* first_part;
};

struct Functions {
  int64_t compute_bytes;
  void (*attend)(const Queries& queries, const Unit& unit, const Shape& shape, const Parts& parts);
  // out: [kv_heads * ratio, dim], contiguous; zeros for a row without parts.
  void (*merge)(void* out, int64_t row, const Shape& shape, const Parts& parts);
};

const Functions& functions(DType dtype);
const Functions* functions_for(DType dtype, Isa isa);

}  // namespace vrlt_decode
