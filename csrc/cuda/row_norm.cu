// The row-norm ops on CUDA devices.
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include "../row_norm_ops.h"
#include "row_norm_launch.cuh"

namespace ckpt {
namespace {

// Launches on the current stream of the tensor's device.
class Launcher {
 public:
  explicit Launcher(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  template <class... Parameters, class... Arguments>
  void operator()(void (*kernel)(Parameters...), int64_t blocks, const Arguments&... arguments) const {
    STD_TORCH_CHECK(blocks < (int64_t(1) << 31), "input has more rows than one launch can take");
    kernel<<<unsigned(blocks), block_threads, 0, stream_>>>(arguments...);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

Tensor float_vector(const Tensor& like, int64_t elements) {
  return torch::stable::new_empty(like, {elements}, ScalarType::Float);
}

struct Cuda {
  class Coefficient {
   public:
    Coefficient(const OptionalTensor& tensor, ScalarKind, double offset) {
      if (!tensor) return;
      STD_TORCH_CHECK(tensor->is_contiguous(), "expected contiguous weight and bias");
      converted_ = tensor->scalar_type() == ScalarType::Float ? *tensor : torch::stable::to(*tensor, ScalarType::Float);
      if (offset != 0) {
        Tensor shift = torch::stable::full({1}, -offset, ScalarType::Float, std::nullopt, tensor->device());
        converted_ = torch::stable::subtract(*converted_, shift);
      }
    }
    const void* data() const { return converted_ ? converted_->data_ptr() : nullptr; }

   private:
    OptionalTensor converted_;
  };

  static void run_forward(const RowNormForward& a, const Tensor& input, ScalarKind kind) {
    const Launcher launch(input);
    const bool known = dispatch_storage(kind, [&](auto storage) { launch_forward<decltype(storage)>(a, launch); });
    STD_TORCH_CHECK(known, "input has a dtype that the CUDA kernels do not compute in");
  }

  static void run_backward(const RowNormBackward& a, const Tensor& grad_output, ScalarKind kind, void* grad_weight,
                           void* grad_bias) {
    const Launcher launch(grad_output);
    const int64_t elements = PartialSums(a).elements(a);
    const Tensor weight_sums = float_vector(grad_output, grad_weight ? elements : 0);
    const Tensor bias_sums = float_vector(grad_output, grad_bias ? elements : 0);
    const bool known = dispatch_storage(kind, [&](auto storage) {
      launch_backward<decltype(storage)>(a, static_cast<float*>(grad_weight), static_cast<float*>(grad_bias),
                                         grad_weight ? static_cast<float*>(weight_sums.data_ptr()) : nullptr,
                                         grad_bias ? static_cast<float*>(bias_sums.data_ptr()) : nullptr, launch);
    });
    STD_TORCH_CHECK(known, "input has a dtype that the CUDA kernels do not compute in");
  }
};

}  // namespace
}  // namespace ckpt

STABLE_TORCH_LIBRARY_IMPL(ckpt_kernels_native, CUDA, m) { ckpt::RowNormOps<ckpt::Cuda>::add_to(m); }
