// Converts torch's tensors to the plain operands of the kernels; shared by the CPU and the CUDA ops.
//
// The Python side has checked shapes, dtypes and devices of a call's arguments, and made every matrix (rows, columns)
// with contiguous rows. But saved tensors come from arbitrary unpack hooks, and a saved parameter may have changed its
// dtype or lost its memory since the forward pass. Therefore every operand is checked again where its address is taken,
// and addresses are taken in one place only.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "direct_calls.h"
#include "math/dropout.h"
#include "rows.h"

namespace ckpt {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The dtype of a tensor, as CkptTensor encodes dtypes.
inline int64_t dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return int64_t(ScalarKind::float32);
    case ScalarType::BFloat16:
      return int64_t(ScalarKind::bfloat16);
    case ScalarType::Half:
      return int64_t(ScalarKind::float16);
    case ScalarType::Double:
      return int64_t(ScalarKind::float64);
    case ScalarType::Long:
      return ckpt_int64;
    default:
      return ckpt_other_dtype;
  }
}

inline const char* name_of(int64_t dtype) {
  constexpr const char* names[] = {"float32", "bfloat16", "float16", "float64", "int64"};
  return dtype == ckpt_other_dtype ? "of another kind" : names[dtype];
}

// The address of the elements; null without memory. For freed memory torch returns null plus the storage offset.
inline void* address_of(const Tensor& t, int64_t dtype) {
  void* data = t.data_ptr();
  const int64_t size = dtype == ckpt_int64 ? 8 : size_of(ScalarKind(dtype));
  return reinterpret_cast<uintptr_t>(data) == uintptr_t(t.storage_offset() * size) ? nullptr : data;
}

// -1 is a device that no library of kernels serves.
inline int64_t device_of(const Tensor& t) { return t.get_device_index(); }

template <class T>
ScalarKind kind_of(const char* name, const T& t) {
  const int64_t dtype = dtype_of(t);
  STD_TORCH_CHECK(dtype >= 0 && dtype < ckpt_int64, name, " has a dtype that the native backend does not compute in");
  return ScalarKind(dtype);
}

// Reads the operands of one call by name, with the checks that prevent accesses out of bounds. T is the tensor type of
// the device's ops.
template <class T>
class Operands {
 public:
  // The first operand determines the device of all operands, and the storage type.
  Operands(const char* name, const T& first)
      : kind(kind_of(name, first)),
        compute_kind(kind == ScalarKind::float64 ? kind : ScalarKind::float32),
        name_(name),
        device_(device_of(first)) {
    STD_TORCH_CHECK(device_ >= 0, name, " is not on the device that this op is for");
  }

  const ScalarKind kind, compute_kind;

  // The only place where an address is taken.
  void* address(const char* name, const T& t, int64_t dtype) const {
    STD_TORCH_CHECK(dtype_of(t) == dtype, name, " has dtype ", name_of(dtype_of(t)), "; expected ", name_of(dtype));
    STD_TORCH_CHECK(device_of(t) == device_, name, " is on another device than ", name_);
    void* found = address_of(t, dtype);
    STD_TORCH_CHECK(found || t.numel() == 0, name, " has elements, but its data is not allocated yet");
    return found;
  }

  // A matrix of the storage type whose rows are contiguous, or consist of every `step`-th element.
  Rows rows(const char* name, const T& t, int64_t rows, int64_t columns, int64_t step = 1) const {
    void* data = address(name, t, int64_t(kind));
    if (t.dim() == 2 && t.size(0) == rows && t.size(1) == columns && (columns <= 1 || t.stride(1) == step))
      return {data, t.stride(0)};
    // A tensor of any shape, if contiguous.
    STD_TORCH_CHECK(step == 1 && t.numel() == rows * columns && t.is_contiguous(), name, " is no (", rows, ", ",
                    columns, ") matrix with a step of ", step, " within rows");
    return {data, columns};
  }

  // A matrix of the storage type that may also be (outer, middle, inner, columns).
  Rows rows_as_they_lie(const char* name, const T& t, int64_t rows, int64_t columns) const {
    if (t.dim() != 4) return this->rows(name, t, rows, columns);
    void* data = address(name, t, int64_t(kind));
    STD_TORCH_CHECK(
        t.size(0) * t.size(1) * t.size(2) == rows && t.size(3) == columns && (columns <= 1 || t.stride(3) == 1), name,
        " is no ", rows, " contiguous rows of ", columns, " elements on three levels");
    return {data, t.stride(0), t.size(2), t.size(1), t.stride(2), t.stride(1)};
  }

  // `numel` contiguous elements of the storage type.
  void* elements(const char* name, const T& t, int64_t numel) const { return piece(name, t, numel, int64_t(kind)); }

  // `numel` contiguous elements of the compute type.
  void* numbers(const char* name, const T& t, int64_t numel) const {
    return piece(name, t, numel, int64_t(compute_kind));
  }

  Dropout dropout(const char* name, const std::optional<T>& seed, double p) const {
    return seed ? Dropout::make(p, static_cast<const int64_t*>(piece(name, *seed, 1, ckpt_int64))) : Dropout{};
  }

  // The same functions for optional tensors.
  template <class... Sizes>
  Rows rows(const char* name, const std::optional<T>& t, Sizes... sizes) const {
    return t ? rows(name, *t, sizes...) : Rows{};
  }
  Rows rows_as_they_lie(const char* name, const std::optional<T>& t, int64_t rows, int64_t columns) const {
    return t ? rows_as_they_lie(name, *t, rows, columns) : Rows{};
  }
  void* elements(const char* name, const std::optional<T>& t, int64_t numel) const {
    return t ? elements(name, *t, numel) : nullptr;
  }
  void* numbers(const char* name, const std::optional<T>& t, int64_t numel) const {
    return t ? numbers(name, *t, numel) : nullptr;
  }

 private:
  void* piece(const char* name, const T& t, int64_t numel, int64_t dtype) const {
    void* data = address(name, t, dtype);
    STD_TORCH_CHECK(t.numel() == numel && t.is_contiguous(), name, " is no ", numel, " contiguous elements");
    return data;
  }

  const char* name_;
  const int64_t device_;
};

// A weight or bias in the compute type, with an element for every column; null for None.
template <class Coefficient, class T>
const void* for_columns(const Coefficient& coefficient, const char* name, const std::optional<T>& tensor,
                        int64_t columns) {
  STD_TORCH_CHECK(!tensor || tensor->numel() == columns, name, " has not an element for every column");
  return coefficient.data();
}

}  // namespace ckpt
