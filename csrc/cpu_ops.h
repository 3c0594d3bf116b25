// CPU operators that other operators call.
#pragma once

#include <optional>
#include <vector>

#include "cpu_binding.h"
#include "linear_cpu.h"

namespace vrlt_binding {

using vrlt_linear::Matrix;

struct Product {
  Matrix out, weight;
  const void* bias;  // may be null
};

// A tensor [rows, columns] with contiguous rows.
Matrix matrix(const Tensor& x, const char* name);

// out = x W^T + b of several weights, or out += where `add`.
void multiply_all(
    const vrlt_linear::Functions& functions, const Matrix& x, const std::vector<Product>& products, bool add = false);

Tensor linear_rows(Tensor x, Tensor weight, std::optional<Tensor> bias);

Tensor group_decode(
    Tensor query, Tensor prefix_key, Tensor prefix_value, Tensor suffix_key, Tensor suffix_value, Tensor prefix_start,
    Tensor prefix_length, Tensor row_offsets, Tensor slots, Tensor suffix_length, double scale, int64_t max_group);

}  // namespace vrlt_binding
