// The row-norm ops on CUDA devices.
#include "../row_norm_ops.h"
#include "launcher.cuh"
#include "row_norm_launch.cuh"

namespace ckpt {
namespace {

struct Cuda : CudaDevice {
  using Coefficient = ckpt::Coefficient;

  static void run_forward(const RowNormForward& a, const Tensor& input, ScalarKind kind) {
    const Launcher launch(input);
    dispatch(kind, [&](auto storage) { launch_forward<decltype(storage)>(a, launch); });
  }

  static void run_backward(const RowNormBackward& a, const Tensor& grad_output, ScalarKind kind, void* grad_weight,
                           void* grad_bias) {
    const Launcher launch(grad_output);
    const int64_t elements = PartialSums(a.rows, a.rows_per_group).elements(a.columns);
    const Tensor weight_sums = float_vector(grad_output, grad_weight ? elements : 0);
    const Tensor bias_sums = float_vector(grad_output, grad_bias ? elements : 0);
    dispatch(kind, [&](auto storage) {
      launch_backward<decltype(storage)>(a, static_cast<float*>(grad_weight), static_cast<float*>(grad_bias),
                                         grad_weight ? static_cast<float*>(weight_sums.data_ptr()) : nullptr,
                                         grad_bias ? static_cast<float*>(bias_sums.data_ptr()) : nullptr, launch);
    });
  }
};

}  // namespace
}  // namespace ckpt

STABLE_TORCH_LIBRARY_IMPL(ckpt_kernels_native, CUDA, m) { ckpt::RowNormOps<ckpt::Cuda>::add_to(m); }
