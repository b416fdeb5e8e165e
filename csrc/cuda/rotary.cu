// The rotary ops on CUDA devices.
#include "../rotary_ops.h"
#include "launcher.cuh"
#include "rotary_launch.cuh"

namespace ckpt {
namespace {

// The kernels read tables of any dtype, without a copy.
class Table {
 public:
  Table(const Angles& given, const Rotary&, ScalarKind) : angles_(given) {}
  const Angles& angles() const { return angles_; }

 private:
  const Angles angles_;
};

struct Cuda : CudaDevice {
  using Coefficient = ckpt::Coefficient;
  using Table = ckpt::Table;

  static void run_forward(const RotaryForward& a, const Tensor& input, ScalarKind kind) {
    const Launcher launch(input);
    dispatch(kind, [&](auto storage) { launch_rotary<decltype(storage)>(a, launch); });
  }

  static void run_backward(const RotaryBackward& a, const Tensor& grad_output, ScalarKind kind, void* grad_weight,
                           void* grad_bias) {
    const Launcher launch(grad_output);
    const int64_t elements = PartialSums(a.rows, a.rows).elements(a.columns);
    const bool is_summed = grad_weight || grad_bias;
    const Tensor statistics = float_vector(grad_output, is_summed ? 2 * a.rows : 0);
    const Tensor weight_sums = float_vector(grad_output, grad_weight ? elements : 0);
    const Tensor bias_sums = float_vector(grad_output, grad_bias ? elements : 0);
    const RotarySums sums{is_summed ? static_cast<HeadStatistics*>(statistics.data_ptr()) : nullptr,
                          grad_weight ? static_cast<float*>(weight_sums.data_ptr()) : nullptr,
                          grad_bias ? static_cast<float*>(bias_sums.data_ptr()) : nullptr};
    dispatch(kind, [&](auto storage) {
      launch_rotary<decltype(storage)>(a, static_cast<float*>(grad_weight), static_cast<float*>(grad_bias), sums,
                                       launch);
    });
  }
};

}  // namespace
}  // namespace ckpt

STABLE_TORCH_LIBRARY_IMPL(ckpt_kernels_native, CUDA, m) { ckpt::RotaryOps<ckpt::Cuda>::add_to(m); }
