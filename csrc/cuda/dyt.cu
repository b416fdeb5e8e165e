// The DyT ops on CUDA devices.
#include "../dyt_ops.h"
#include "dyt_kernels.cuh"
#include "launcher.cuh"

namespace ckpt {
namespace {

struct Cuda : CudaDevice {
  using Coefficient = ckpt::Coefficient;

  static void run_forward(const DytForward& a, const Tensor& input, ScalarKind kind) {
    const Launcher launch(input);
    dispatch(kind, [&](auto storage) { launch_dyt<decltype(storage)>(a, launch); });
  }
  static void run_backward(const DytBackward& a, const Tensor& input, ScalarKind kind, void* grad_alpha,
                           void* grad_weight, void* grad_bias) {
    const Launcher launch(input);
    const DytSums gradients{static_cast<float*>(grad_alpha), static_cast<float*>(grad_weight),
                            static_cast<float*>(grad_bias)};
    const int64_t elements = PartialSums(a.rows, a.rows).elements(a.columns);
    const Tensor alpha = float_vector(input, grad_alpha ? alpha_sums_of(a) : 0);
    const Tensor weight = float_vector(input, grad_weight ? elements : 0);
    const Tensor bias = float_vector(input, grad_bias ? elements : 0);
    const auto data = [](const Tensor& sums, const void* gradient) {
      return gradient ? static_cast<float*>(sums.data_ptr()) : nullptr;
    };
    const DytSums sums{data(alpha, grad_alpha), data(weight, grad_weight), data(bias, grad_bias)};
    dispatch(kind, [&](auto storage) { launch_dyt<decltype(storage)>(a, gradients, sums, launch); });
  }
};

}  // namespace
}  // namespace ckpt

STABLE_TORCH_LIBRARY_IMPL(ckpt_kernels_native, CUDA, m) { ckpt::DytOps<ckpt::Cuda>::add_to(m); }
