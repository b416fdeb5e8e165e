// Launches the channel-norm kernels: chooses vector width, team and grid. elements.cuh explains `launch`.
#pragma once

#include "channel_norm_kernels.cuh"

namespace ckpt {

template <class T, int VEC, class Launch>
void launch_channel_norm(const ChannelForward& a, const Launch& launch) {
  const int64_t blocks = blocks_for(a.rows() * (a.columns() / VEC));
  a.planes ? launch(channel_forward_kernel<T, VEC, true>, blocks, a)
           : launch(channel_forward_kernel<T, VEC, false>, blocks, a);
}
template <class T, int VEC, class Launch>
void launch_channel_norm(const ChannelBackward& a, const Launch& launch) {
  const int64_t blocks = blocks_for(a.rows() * (a.columns() / VEC));
  a.planes ? launch(channel_backward_kernel<T, VEC, true>, blocks, a)
           : launch(channel_backward_kernel<T, VEC, false>, blocks, a);
}

template <int VEC, class Block, class Kernel, class Launch>
void launch_lines(const Block& a, Kernel kernel, const Launch& launch) {
  const int64_t packs = a.channels / VEC, lanes = packs < block_threads ? packs : block_threads;
  const int64_t strips = divide_up(packs, lanes);
  launch(kernel, a.samples * a.pieces * strips, a, strips, int(lanes));
}
template <class T, int VEC, class Launch>
void launch_channel_norm(const ChannelMoments& a, const Launch& launch) {
  const bool warp = a.size <= warp_columns;
  if (!a.planes)
    launch_lines<VEC>(a, row_moments_kernel<T, VEC>, launch);
  else if (warp)
    launch(plane_moments_kernel<T, VEC, true>, blocks_for_rows(a.rows(), warp), a);
  else
    launch(plane_moments_kernel<T, VEC, false>, blocks_for_rows(a.rows(), warp), a);
}
template <class T, int VEC, class Launch>
void launch_channel_norm(const ChannelSums& a, const Launch& launch) {
  const bool warp = a.size <= warp_columns;
  if (!a.planes)
    launch_lines<VEC>(a, row_sums_kernel<T, VEC>, launch);
  else if (warp)
    launch(plane_sums_kernel<T, VEC, true>, blocks_for_rows(a.rows(), warp), a);
  else
    launch(plane_sums_kernel<T, VEC, false>, blocks_for_rows(a.rows(), warp), a);
}

template <class T>
bool is_wide(const ChannelNorm& a) {
  return a.columns() * sizeof(T) % 16 == 0 && is_aligned(a.input);
}
template <class T>
bool is_wide(const ChannelForward& a) {
  return is_wide<T>(static_cast<const ChannelNorm&>(a)) && is_aligned(a.other) && is_aligned(a.output);
}
template <class T>
bool is_wide(const ChannelSums& a) {
  return is_wide<T>(static_cast<const ChannelNorm&>(a)) && is_aligned(a.other) && is_aligned(a.grad_output);
}
template <class T>
bool is_wide(const ChannelBackward& a) {
  return is_wide<T>(static_cast<const ChannelNorm&>(a)) && is_aligned(a.other) && is_aligned(a.grad_output) &&
         is_aligned(a.grad_input) && is_aligned(a.grad_residual);
}

template <class T, class Block, class Launch>
void launch_channel_norm(const Block& a, const Launch& launch) {
  is_wide<T>(a) ? launch_channel_norm<T, 16 / sizeof(T)>(a, launch) : launch_channel_norm<T, 1>(a, launch);
}

}  // namespace ckpt
