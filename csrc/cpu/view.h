// A tensor as the CPU ops read it, whether the dispatcher hands it over or Python does.
#pragma once

#include <optional>

#include "../direct_calls.h"
#include "../operands.h"

namespace ckpt {

// With the methods of torch::stable::Tensor that the ops use. Whoever calls an op keeps the memory alive.
class View {
 public:
  explicit View(const CkptTensor& tensor) : tensor_(tensor) {}
  explicit View(const Tensor& tensor)
      : tensor_{tensor.data_ptr(), number_of(tensor.scalar_type()), tensor.dim(), tensor.sizes().data(),
                tensor.strides().data()} {}

  void* data_ptr() const { return tensor_.data; }
  int64_t dim() const { return tensor_.dim; }
  int64_t size(int64_t dim) const { return tensor_.sizes[dim]; }
  int64_t stride(int64_t dim) const { return tensor_.strides[dim]; }
  int64_t numel() const {
    int64_t product = 1;
    for (int64_t i = 0; i < tensor_.dim; ++i) product *= tensor_.sizes[i];
    return product;
  }
  bool is_contiguous() const {
    int64_t expected = 1;
    for (int64_t i = tensor_.dim - 1; i >= 0; --i) {
      if (tensor_.sizes[i] != 1 && tensor_.strides[i] != expected) return numel() == 0;
      expected *= tensor_.sizes[i];
    }
    return true;
  }

  friend ScalarKind kind_of(const View& view) {
    STD_TORCH_CHECK(view.tensor_.kind >= 0, "input has a dtype that the native backend does not compute in");
    return ScalarKind(view.tensor_.kind);
  }

 private:
  // A dropout's seed is none of the types that are computed in.
  static int64_t number_of(ScalarType type) {
    switch (type) {
      case ScalarType::Float:
        return int64_t(ScalarKind::float32);
      case ScalarType::BFloat16:
        return int64_t(ScalarKind::bfloat16);
      case ScalarType::Half:
        return int64_t(ScalarKind::float16);
      case ScalarType::Double:
        return int64_t(ScalarKind::float64);
      default:
        return -1;
    }
  }

  CkptTensor tensor_;
};

}  // namespace ckpt
