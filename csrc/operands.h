// From torch's tensors to the plain operands of the kernels: shared by the CPU and the CUDA ops.
//
// The Python side has checked shapes, dtypes and devices and made every matrix (rows, columns) with contiguous
// rows; what is checked here would otherwise read out of bounds.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "row_norm.h"

namespace ckpt {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline ScalarKind kind_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return ScalarKind::float32;
    case ScalarType::BFloat16:
      return ScalarKind::bfloat16;
    case ScalarType::Half:
      return ScalarKind::float16;
    case ScalarType::Double:
      return ScalarKind::float64;
    default:
      STD_TORCH_CHECK(false, "input has a dtype that the native backend does not compute in");
  }
}

inline Rows rows_of(const Tensor& t, int64_t rows, int64_t columns) {
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == columns && (columns <= 1 || t.stride(1) == 1),
                  "expected a (", rows, ", ", columns, ") matrix with contiguous rows");
  return {t.data_ptr(), t.stride(0)};
}

inline Rows rows_of(const OptionalTensor& t, int64_t rows, int64_t columns) {
  return t ? rows_of(*t, rows, columns) : Rows{};
}

inline void* data_of(const OptionalTensor& t, int64_t numel) {
  if (!t) return nullptr;
  STD_TORCH_CHECK(t->numel() == numel && t->is_contiguous(), "expected ", numel, " contiguous elements");
  return t->data_ptr();
}

// The operands that every block of the family has.
inline void set_common(RowNorm& a, const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                       const OptionalTensor& mean, const Tensor& rstd) {
  STD_TORCH_CHECK(input.dim() == 2, "expected a matrix of rows");
  a.rows = input.size(0);
  a.columns = input.size(1);
  a.input = rows_of(input, a.rows, a.columns);
  a.mean = data_of(mean, a.rows);
  a.rstd = data_of(rstd, a.rows);
  a.centered = mean.has_value();
  const int64_t groups = weight ? weight->numel() / a.columns : bias ? bias->numel() / a.columns : 1;
  STD_TORCH_CHECK(groups > 0 && a.rows % groups == 0, "expected weight and bias to divide the rows evenly");
  STD_TORCH_CHECK(!weight || weight->numel() == groups * a.columns, "expected a weight for every column");
  STD_TORCH_CHECK(!bias || bias->numel() == groups * a.columns, "expected a bias for every column");
  a.rows_per_group = a.rows / groups;
}

inline void set_dropout(RowNorm& a, const OptionalTensor& seed, double p) {
  if (!seed) return;
  a.seed = static_cast<const int64_t*>(data_of(seed, 1));
  a.dropout = Dropout::make(p);
}

}  // namespace ckpt
