// From torch's tensors to the plain operands of the kernels: shared by the CPU and the CUDA ops.
//
// The Python side has checked shapes, dtypes and devices and made every matrix (rows, columns) with contiguous
// rows; what is checked here would otherwise read out of bounds. A tensor is of the type that the device's ops take.
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

template <class T>
Rows rows_of(const T& t, int64_t rows, int64_t columns) {
  if (t.dim() == 2 && t.size(0) == rows && t.size(1) == columns && (columns <= 1 || t.stride(1) == 1))
    return {t.data_ptr(), t.stride(0)};
  // In one piece, whatever its shape is.
  STD_TORCH_CHECK(t.numel() == rows * columns && t.is_contiguous(), "expected a (", rows, ", ", columns,
                  ") matrix with contiguous rows");
  return {t.data_ptr(), columns};
}

template <class T>
Rows rows_of(const std::optional<T>& t, int64_t rows, int64_t columns) {
  return t ? rows_of(*t, rows, columns) : Rows{};
}

// The same of a tensor that is read, which may also be (outer, middle, inner, columns).
template <class T>
Rows rows_as_they_lie(const T& t, int64_t rows, int64_t columns) {
  if (t.dim() != 4) return rows_of(t, rows, columns);
  STD_TORCH_CHECK(
      t.size(0) * t.size(1) * t.size(2) == rows && t.size(3) == columns && (columns <= 1 || t.stride(3) == 1),
      "expected ", rows, " contiguous rows of ", columns, " elements on three levels");
  return {t.data_ptr(), t.stride(0), t.size(2), t.size(1), t.stride(2), t.stride(1)};
}

template <class T>
Rows rows_as_they_lie(const std::optional<T>& t, int64_t rows, int64_t columns) {
  return t ? rows_as_they_lie(*t, rows, columns) : Rows{};
}

// A matrix of every `step`-th element of a row.
template <class T>
Rows rows_of(const T& t, int64_t rows, int64_t columns, int64_t step) {
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == columns && (columns <= 1 || t.stride(1) == step),
                  "expected a (", rows, ", ", columns, ") matrix of every ", step, "th element");
  return {t.data_ptr(), t.stride(0)};
}

template <class T>
Rows rows_of(const std::optional<T>& t, int64_t rows, int64_t columns, int64_t step) {
  return t ? rows_of(*t, rows, columns, step) : Rows{};
}

template <class T>
void* data_of(const T& t, int64_t numel) {
  STD_TORCH_CHECK(t.numel() == numel && t.is_contiguous(), "expected ", numel, " contiguous elements");
  return t.data_ptr();
}

template <class T>
void* data_of(const std::optional<T>& t, int64_t numel) {
  return t ? data_of(*t, numel) : nullptr;
}

template <class T>
Dropout dropout_of(const std::optional<T>& seed, double p) {
  return seed ? Dropout::make(p, static_cast<const int64_t*>(data_of(seed, 1))) : Dropout{};
}

}  // namespace ckpt
