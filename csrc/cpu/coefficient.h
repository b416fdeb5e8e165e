// A weight or bias, converted to the compute type for the loops.
#pragma once

#include "scratch.h"
#include "view.h"

namespace ckpt {

// Uses the tensor's own memory if the dtype fits and the offset is 0; otherwise a converted copy.
class Coefficient {
 public:
  Coefficient(const Operands<View>& operands, const char* name, const std::optional<View>& tensor, double offset)
      : converted_(is_given_as(tensor, operands.compute_kind, offset)
                       ? 0
                       : tensor->numel() * compute_size(operands.compute_kind)) {
    if (!tensor) return;
    STD_TORCH_CHECK(tensor->is_contiguous(), name, " is not contiguous");
    const ScalarKind own = kind_of(name, *tensor), compute = operands.compute_kind;
    const void* given = operands.address(name, *tensor, int64_t(own));
    if (is_given_as(tensor, compute, offset)) {
      data_ = given;
      return;
    }
    for (int64_t i = 0; i < tensor->numel(); ++i) {
      const double value = element(given, own, i) + offset;
      if (compute == ScalarKind::float64)
        converted_.as<double>()[i] = value;
      else
        converted_.as<float>()[i] = float(value);
    }
    data_ = converted_.data();
  }
  const void* data() const { return data_; }

 private:
  // Whether the tensor can be used without conversion.
  static bool is_given_as(const std::optional<View>& tensor, ScalarKind compute, double offset) {
    return !tensor || (offset == 0 && dtype_of(*tensor) == int64_t(compute));
  }

  static double element(const void* data, ScalarKind kind, int64_t i) {
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
