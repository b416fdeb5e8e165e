// Connects torch to the CUDA kernels: launches, and tensors for temporary results.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include "../operands.h"
#include "elements.cuh"

namespace ckpt {

// Launches on the current stream of the tensor's device.
class Launcher {
 public:
  explicit Launcher(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  template <class... Parameters, class... Arguments>
  void operator()(void (*kernel)(Parameters...), Grid grid, const Arguments&... arguments) const {
    STD_TORCH_CHECK(grid.blocks < (int64_t(1) << 31), "input has more rows than one launch can take");
    kernel<<<unsigned(grid.blocks), grid.threads, 0, stream_>>>(arguments...);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

// The part of Device that all families share.
struct CudaDevice {
  using Tensor = ckpt::Tensor;

  template <auto function, class Library>
  static void add(Library& m, const char* name) {
    m.impl(name, TORCH_BOX(function));
  }
};

inline Tensor float_vector(const Tensor& like, int64_t elements) {
  return torch::stable::new_empty(like, {elements}, ScalarType::Float);
}

// A weight or bias for the kernels: converted to float32, with the offset added.
class Coefficient {
 public:
  Coefficient(const Operands<Tensor>& operands, const char* name, const OptionalTensor& tensor, double offset) {
    if (!tensor) return;
    STD_TORCH_CHECK(tensor->is_contiguous(), name, " is not contiguous");
    const ScalarKind own = kind_of(name, *tensor);
    const void* given = operands.address(name, *tensor, int64_t(own));
    if (own == ScalarKind::float32 && offset == 0) {
      data_ = given;
      return;
    }
    converted_ = own == ScalarKind::float32 ? *tensor : torch::stable::to(*tensor, ScalarType::Float);
    if (offset != 0) {
      Tensor shift = torch::stable::full({1}, -offset, ScalarType::Float, std::nullopt, tensor->device());
      converted_ = torch::stable::subtract(*converted_, shift);
    }
    data_ = converted_->data_ptr();
  }
  const void* data() const { return data_; }

 private:
  const void* data_ = nullptr;
  OptionalTensor converted_;
};

// `body` takes a value of the storage type.
template <class Body>
void dispatch(ScalarKind kind, Body body) {
  STD_TORCH_CHECK(dispatch_storage(kind, body), "input has a dtype that the CUDA kernels do not compute in");
}

}  // namespace ckpt
