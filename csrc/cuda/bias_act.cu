// The bias_act ops on CUDA devices.
#include "../bias_act_ops.h"
#include "bias_act_kernels.cuh"
#include "launcher.cuh"

namespace ckpt {
namespace {

struct Cuda : CudaDevice {
  using Coefficient = ckpt::Coefficient;

  static void run_forward(const BiasActForward& a, const Tensor& input, ScalarKind kind) {
    const Launcher launch(input);
    dispatch(kind, [&](auto storage) { launch_bias_act<decltype(storage)>(a, launch); });
  }
  static void run_backward(const BiasActBackward& a, const Tensor& input, ScalarKind kind, void* grad_bias) {
    const Launcher launch(input);
    const Tensor sums = float_vector(input, grad_bias ? PartialSums(a.rows, a.rows).elements(a.columns) : 0);
    dispatch(kind, [&](auto storage) {
      launch_bias_act<decltype(storage)>(a, static_cast<float*>(grad_bias), static_cast<float*>(sums.data_ptr()),
                                         launch);
    });
  }
};

}  // namespace
}  // namespace ckpt

STABLE_TORCH_LIBRARY_IMPL(ckpt_kernels_native, CUDA, m) { ckpt::BiasActOps<ckpt::Cuda>::add_to(m); }
