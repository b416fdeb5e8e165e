// The channel-norm ops on the CPU: shares rows, or pieces of them, out to threads.
#include "../channel_norm_ops.h"

#include "row_tasks.h"

namespace ckpt {
namespace {

// Of planes, each is a task; of rows of channels, each piece of a sample.
template <class Block, class Loop>
void for_pieces_of(const Block& a, Loop loop) {
  const int64_t tasks = a.planes ? a.samples * a.channels : a.samples * a.pieces;
  const int64_t elements = a.planes ? a.size : a.piece_rows * a.channels;
  torch::stable::parallel_for(0, tasks, grain(elements), [&](int64_t begin, int64_t end) { loop(a, begin, end); });
}

template <class Block, class Loop>
void for_rows_of(const Block& a, Loop loop) {
  torch::stable::parallel_for(0, a.rows(), grain(a.columns()),
                              [&](int64_t begin, int64_t end) { loop(a, begin, end); });
}

struct Cpu {
  static void run(const ChannelMoments& a, const Tensor&, ScalarKind kind) {
    for_pieces_of(a, channel_norm_loops(kind).moments);
  }
  static void run(const ChannelForward& a, const Tensor&, ScalarKind kind) {
    for_rows_of(a, channel_norm_loops(kind).forward);
  }
  static void run(const ChannelSums& a, const Tensor&, ScalarKind kind) {
    for_pieces_of(a, channel_norm_loops(kind).sums);
  }
  static void run(const ChannelBackward& a, const Tensor&, ScalarKind kind) {
    for_rows_of(a, channel_norm_loops(kind).backward);
  }
};

}  // namespace
}  // namespace ckpt

STABLE_TORCH_LIBRARY_IMPL(ckpt_kernels_native, CPU, m) { ckpt::ChannelNormOps<ckpt::Cpu>::add_to(m); }
