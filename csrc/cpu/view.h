// The tensor type of the CPU ops, for calls by the dispatcher and for direct calls.
#pragma once

#include <optional>

#include "../operands.h"

namespace ckpt {

// Has the methods of torch::stable::Tensor that the ops use. The caller of an op keeps the memory alive.
class View {
 public:
  explicit View(const CkptTensor& tensor) : tensor_(tensor) {}
  explicit View(const Tensor& tensor)
      : tensor_{nullptr, ckpt::dtype_of(tensor), tensor.dim(), tensor.sizes().data(), tensor.strides().data()} {
    STD_TORCH_CHECK(tensor.is_cpu(), "expected tensors in the CPU's memory");
    if (tensor_.dtype != ckpt_other_dtype) tensor_.data = ckpt::address_of(tensor, tensor_.dtype);
  }

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

  friend int64_t dtype_of(const View& view) { return view.tensor_.dtype; }
  friend int64_t device_of(const View&) { return 0; }
  // For Operands, which checks the dtype first.
  friend void* address_of(const View& view, int64_t) { return view.tensor_.data; }

 private:
  CkptTensor tensor_;
};

}  // namespace ckpt
