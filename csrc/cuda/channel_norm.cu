// The channel-norm ops on CUDA devices.
#include "../channel_norm_ops.h"
#include "channel_norm_launch.cuh"
#include "launcher.cuh"

namespace ckpt {
namespace {

struct Cuda : CudaDevice {
  template <class Block>
  static void run(const Block& a, const Tensor& input, ScalarKind kind) {
    const Launcher launch(input);
    dispatch(kind, [&](auto storage) { launch_channel_norm<decltype(storage)>(a, launch); });
  }
};

}  // namespace
}  // namespace ckpt

STABLE_TORCH_LIBRARY_IMPL(ckpt_kernels_native, CUDA, m) { ckpt::ChannelNormOps<ckpt::Cuda>::add_to(m); }
