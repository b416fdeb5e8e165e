// From torch's tensors to the plain operands of the kernels: shared by the CPU and the CUDA ops.
//
// The Python side has checked shapes, dtypes and devices and made every matrix (rows, columns) with contiguous
// rows; what is checked here would otherwise read out of bounds.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "math/dropout.h"
#include "rows.h"

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

// The same of a tensor that is read, which may also be (outer, middle, inner, columns).
inline Rows rows_as_they_lie(const Tensor& t, int64_t rows, int64_t columns) {
  if (t.dim() == 2) return rows_of(t, rows, columns);
  STD_TORCH_CHECK(t.dim() == 4 && t.size(0) * t.size(1) * t.size(2) == rows && t.size(3) == columns &&
                      (columns <= 1 || t.stride(3) == 1),
                  "expected ", rows, " contiguous rows of ", columns, " elements on three levels");
  return {t.data_ptr(), t.stride(0), t.size(2), t.size(1), t.stride(2), t.stride(1)};
}

inline Rows rows_as_they_lie(const OptionalTensor& t, int64_t rows, int64_t columns) {
  return t ? rows_as_they_lie(*t, rows, columns) : Rows{};
}

// A matrix of every `step`-th element of a row.
inline Rows rows_of(const OptionalTensor& t, int64_t rows, int64_t columns, int64_t step) {
  if (!t) return {};
  STD_TORCH_CHECK(
      t->dim() == 2 && t->size(0) == rows && t->size(1) == columns && (columns <= 1 || t->stride(1) == step),
      "expected a (", rows, ", ", columns, ") matrix of every ", step, "th element");
  return {t->data_ptr(), t->stride(0)};
}

inline void* data_of(const OptionalTensor& t, int64_t numel) {
  if (!t) return nullptr;
  STD_TORCH_CHECK(t->numel() == numel && t->is_contiguous(), "expected ", numel, " contiguous elements");
  return t->data_ptr();
}

inline Dropout dropout_of(const OptionalTensor& seed, double p) {
  return seed ? Dropout::make(p, static_cast<const int64_t*>(data_of(seed, 1))) : Dropout{};
}

}  // namespace ckpt
