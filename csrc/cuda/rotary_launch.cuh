// Launches the rotary kernels: chooses vector width, team and grid. elements.cuh explains `launch`.
#pragma once

#include "rotary_kernels.cuh"

namespace ckpt {

// Memory for a backward pass with gradients of weight or bias; each pointer is null if not needed.
struct RotarySums {
  HeadStatistics* statistics;  // of each row
  float *weight, *bias;        // PartialSums(rows, rows).elements(columns) each
};

inline bool is_vectorizable(const Angles& angles, int vec) {
  const int64_t size = size_of(angles.kind), bytes = size * vec < 16 ? size * vec : 16;
  const auto divides = [&](int64_t elements) { return elements * size % bytes == 0; };
  const Rows& rows = angles.rows;
  return reinterpret_cast<uintptr_t>(rows.data) % bytes == 0 && divides(rows.stride) && divides(rows.middle_stride) &&
         divides(rows.inner_stride) && (angles.step == 2 || divides(angles.shift));
}

template <class T>
bool is_vectorizable(const Rotary& a) {
  constexpr int VEC = 16 / sizeof(T);
  return a.columns % VEC == 0 && a.start % VEC == 0 && a.pairs() % VEC == 0 && is_vectorizable<T>(a.input) &&
         is_aligned(a.weight) && is_aligned(a.bias) && is_vectorizable(a.cos, VEC) && is_vectorizable(a.sin, VEC);
}

template <class T, int VEC, class Launch>
void launch_turn(const Rotary& a, const Rows& source, const Rows& target, bool back, const Launch& launch) {
  launch(rotary_kernel<T, VEC>, blocks_for(a.rows * units_of<VEC>(a)), a, source, target, back);
}

template <class T, int VEC, class Launch>
void launch_rotary(const RotaryForward& a, const Launch& launch) {
  if (a.norm == HeadNorm::none) return launch_turn<T, VEC>(a, a.input, a.output, false, launch);
  const bool warp = a.columns <= warp_columns;
  const int64_t blocks = blocks_for_rows(a.rows, warp);
  if (warp)
    launch(rotary_norm_forward_kernel<T, VEC, true>, blocks, a);
  else
    launch(rotary_norm_forward_kernel<T, VEC, false>, blocks, a);
}

template <class T, class Launch>
void launch_rotary(const RotaryForward& a, const Launch& launch) {
  if (is_vectorizable<T>(a) && is_vectorizable<T>(a.output))
    launch_rotary<T, 16 / sizeof(T)>(a, launch);
  else
    launch_rotary<T, 1>(a, launch);
}

template <class T, int VEC, class Launch>
void launch_rotary(const RotaryBackward& a, float* grad_weight, float* grad_bias, const RotarySums& sums,
                   const Launch& launch) {
  if (a.norm == HeadNorm::none) return launch_turn<T, VEC>(a, a.grad_output, a.grad_input, true, launch);
  const bool warp = a.columns <= warp_columns;
  const int64_t blocks = blocks_for_rows(a.rows, warp);
  if (warp)
    launch(rotary_norm_backward_kernel<T, VEC, true>, blocks, a, sums.statistics);
  else
    launch(rotary_norm_backward_kernel<T, VEC, false>, blocks, a, sums.statistics);
  if (!grad_weight && !grad_bias) return;
  const PartialSums shares(a.rows, a.rows);
  const int64_t strips = divide_up(units_of<VEC>(a), block_threads);
  launch(rotary_norm_weight_kernel<T, VEC>, shares.group_tasks * strips, a, (const HeadStatistics*)sums.statistics,
         shares.task_rows, strips, sums.weight, sums.bias);
  add_up(shares, a.columns, {sums.weight, grad_weight}, {sums.bias, grad_bias}, launch);
}

template <class T, class Launch>
void launch_rotary(const RotaryBackward& a, float* grad_weight, float* grad_bias, const RotarySums& sums,
                   const Launch& launch) {
  if (is_vectorizable<T>(a) && is_vectorizable<T>(a.grad_output) && is_vectorizable<T>(a.grad_input))
    launch_rotary<T, 16 / sizeof(T)>(a, grad_weight, grad_bias, sums, launch);
  else
    launch_rotary<T, 1>(a, grad_weight, grad_bias, sums, launch);
}

}  // namespace ckpt
