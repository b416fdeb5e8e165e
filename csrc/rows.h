// Matrices as plain pointers; the storage type is known at run time.
#pragma once

#include <stdint.h>

#include "math/macros.h"

namespace ckpt {

enum class ScalarKind { float32, bfloat16, float16, float64 };

inline int64_t size_of(ScalarKind kind) {
  return kind == ScalarKind::float64 ? 8 : kind == ScalarKind::float32 ? 4 : 2;
}

// The position of a row on three levels.
struct Place {
  int64_t outer, middle, inner;
};

// A matrix whose rows are contiguous; null if the block does not have the operand. The rows may have three strides, as
// in a (batch, token, head, element) view of a packed projection: row (i * middle + j) * inner + k begins at i * stride
// + j * middle_stride + k * inner_stride.
struct Rows {
  void* data = nullptr;
  int64_t stride = 0;
  int64_t inner = 0, middle = 0;  // the sizes of the two inner levels of rows; 0 for a matrix with one stride
  int64_t inner_stride = 0, middle_stride = 0;

  template <class T>
  CKPT_HD T* row(int64_t index) const {
    int64_t offset;
    if (inner == 0) {
      offset = index * stride;
    } else {
      const int64_t above = index / inner;
      offset = above / middle * stride + above % middle * middle_stride + index % inner * inner_stride;
    }
    return static_cast<T*>(data) + offset;
  }
  // The row of a matrix that has three strides.
  template <class T>
  CKPT_HD T* at(const Place& place) const {
    return static_cast<T*>(data) + place.outer * stride + place.middle * middle_stride + place.inner * inner_stride;
  }
  CKPT_HD explicit operator bool() const { return data != nullptr; }
};

}  // namespace ckpt
