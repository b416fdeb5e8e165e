// Matrices as plain pointers, of a storage type that is known at run time.
#pragma once

#include <stdint.h>

#include "math/macros.h"

namespace ckpt {

enum class ScalarKind { float32, bfloat16, float16, float64 };

inline int64_t size_of(ScalarKind kind) {
  return kind == ScalarKind::float64 ? 8 : kind == ScalarKind::float32 ? 4 : 2;
}

// A matrix whose rows are contiguous; null where the block has no such operand.
struct Rows {
  void* data = nullptr;
  int64_t stride = 0;

  template <class T>
  CKPT_HD T* row(int64_t index) const {
    return static_cast<T*>(data) + index * stride;
  }
  CKPT_HD explicit operator bool() const { return data != nullptr; }
};

}  // namespace ckpt
