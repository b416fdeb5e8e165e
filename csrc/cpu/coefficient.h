// A weight or bias for the loops, which read it in the compute type.
#pragma once

#include "scratch.h"
#include "view.h"

namespace ckpt {

// The tensor's own memory if there is nothing to convert and no offset to add, else a converted copy.
class Coefficient {
 public:
  Coefficient(const std::optional<View>& tensor, ScalarKind kind, double offset)
      : converted_(is_given_as(tensor, kind, offset) ? 0 : tensor->numel() * compute_size(kind)) {
    if (!tensor) return;
    STD_TORCH_CHECK(tensor->is_contiguous(), "expected contiguous weight and bias");
    if (is_given_as(tensor, kind, offset)) {
      data_ = tensor->data_ptr();
      return;
    }
    const ScalarKind own = kind_of(*tensor);
    for (int64_t i = 0; i < tensor->numel(); ++i) {
      const double value = element(*tensor, own, i) + offset;
      if (kind == ScalarKind::float64)
        converted_.as<double>()[i] = value;
      else
        converted_.as<float>()[i] = float(value);
    }
    data_ = converted_.data();
  }
  const void* data() const { return data_; }

 private:
  // Whether there is nothing to convert.
  static bool is_given_as(const std::optional<View>& tensor, ScalarKind kind, double offset) {
    const ScalarKind compute = kind == ScalarKind::float64 ? kind : ScalarKind::float32;
    return !tensor || (offset == 0 && kind_of(*tensor) == compute);
  }

  static double element(const View& tensor, ScalarKind kind, int64_t i) {
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
  const Scratch converted_;
};

}  // namespace ckpt
