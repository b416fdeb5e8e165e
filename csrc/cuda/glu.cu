// The glu ops on CUDA devices.
#include "../glu_ops.h"
#include "glu_kernels.cuh"
#include "launcher.cuh"

namespace ckpt {
namespace {

struct Cuda : CudaDevice {
  template <class Block>
  static void run(const Block& a, const Tensor& tensor, ScalarKind kind) {
    const Launcher launch(tensor);
    dispatch(kind, [&](auto storage) { launch_glu<decltype(storage)>(a, launch); });
  }
  static void run_forward(const GluForward& a, const Tensor& gate, ScalarKind kind) { run(a, gate, kind); }
  static void run_backward(const GluBackward& a, const Tensor& gate, ScalarKind kind) { run(a, gate, kind); }
};

}  // namespace
}  // namespace ckpt

STABLE_TORCH_LIBRARY_IMPL(ckpt_kernels_native, CUDA, m) { ckpt::GluOps<ckpt::Cuda>::add_to(m); }
