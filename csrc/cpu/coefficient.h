// A weight or bias as the loops read it.
#pragma once

#include <memory>

#include "../operands.h"

namespace ckpt {

// In the compute type, with the offset added.
class Coefficient {
 public:
  Coefficient(const OptionalTensor& tensor, ScalarKind kind, double offset) {
    if (!tensor) return;
    STD_TORCH_CHECK(tensor->is_contiguous(), "expected contiguous weight and bias");
    const bool wide = kind == ScalarKind::float64;
    const ScalarKind own = kind_of(*tensor);
    if (offset == 0 && own == (wide ? ScalarKind::float64 : ScalarKind::float32)) {
      data_ = tensor->data_ptr();
      return;
    }
    const int64_t n = tensor->numel();
    converted_.reset(new char[n * (wide ? 8 : 4)]);
    for (int64_t i = 0; i < n; ++i) {
      const double value = element(*tensor, own, i) + offset;
      if (wide)
        reinterpret_cast<double*>(converted_.get())[i] = value;
      else
        reinterpret_cast<float*>(converted_.get())[i] = float(value);
    }
    data_ = converted_.get();
  }
  const void* data() const { return data_; }

 private:
  static double element(const Tensor& tensor, ScalarKind kind, int64_t i) {
    const void* data = tensor.data_ptr();
    switch (kind) {
      case ScalarKind::float32:
        return static_cast<const float*>(data)[i];
      case ScalarKind::bfloat16:
        return static_cast<const torch::headeronly::BFloat16*>(data)[i];
      case ScalarKind::float16:
        return static_cast<const torch::headeronly::Half*>(data)[i];
      default:
        return static_cast<const double*>(data)[i];
    }
  }

  const void* data_ = nullptr;
  std::unique_ptr<char[]> converted_;
};

}  // namespace ckpt
