// Launches the row-norm kernels: chooses vector width, team and grid. elements.cuh explains `launch`.
#pragma once

#include "row_norm_kernels.cuh"

namespace ckpt {

template <class T>
bool is_vectorizable(const RowNorm& a) {
  return a.columns * sizeof(T) % 16 == 0 && is_vectorizable<T>(a.input) && is_vectorizable<T>(a.residual) &&
         is_vectorizable<T>(a.gate) && is_aligned(a.weight) && is_aligned(a.bias);
}

template <class T, int VEC, class Launch>
void launch_forward(const RowNormForward& a, const Launch& launch) {
  const bool warp = a.columns <= warp_columns;
  const int64_t blocks = blocks_for_rows(a.rows, warp);
  if (warp)
    launch(row_norm_forward_kernel<T, VEC, true>, blocks, a);
  else
    launch(row_norm_forward_kernel<T, VEC, false>, blocks, a);
}

template <class T, class Launch>
void launch_forward(const RowNormForward& a, const Launch& launch) {
  if (is_vectorizable<T>(a) && is_vectorizable<T>(a.output) && is_vectorizable<T>(a.residual_out))
    launch_forward<T, 16 / sizeof(T)>(a, launch);
  else
    launch_forward<T, 1>(a, launch);
}

template <class T, int VEC, class Launch>
void launch_backward(const RowNormBackward& a, float* grad_weight, float* grad_bias, float* weight_sums,
                     float* bias_sums, const Launch& launch) {
  if (a.grad_input || a.grad_gate || a.output) {
    const bool warp = a.columns <= warp_columns;
    const int64_t blocks = blocks_for_rows(a.rows, warp);
    if (warp)
      launch(row_norm_backward_input_kernel<T, VEC, true>, blocks, a);
    else
      launch(row_norm_backward_input_kernel<T, VEC, false>, blocks, a);
  }
  if (!grad_weight && !grad_bias) return;
  const PartialSums shares(a.rows, a.rows_per_group);
  const int64_t strips = divide_up(a.columns, block_threads * VEC);
  launch(row_norm_backward_weight_kernel<T, VEC>, shares.groups * shares.group_tasks * strips, a, shares.group_tasks,
         shares.task_rows, strips, weight_sums, bias_sums);
  const int64_t total = shares.groups * a.columns, blocks = divide_up(total, block_threads);
  if (grad_weight)
    launch(sum_partials_kernel, blocks, (const float*)weight_sums, shares.group_tasks, a.columns, total, grad_weight);
  if (grad_bias)
    launch(sum_partials_kernel, blocks, (const float*)bias_sums, shares.group_tasks, a.columns, total, grad_bias);
}

// weight_sums and bias_sums have PartialSums(a.rows, a.rows_per_group).elements(a.columns) floats each, or are null if
// the gradient is not needed.
template <class T, class Launch>
void launch_backward(const RowNormBackward& a, float* grad_weight, float* grad_bias, float* weight_sums,
                     float* bias_sums, const Launch& launch) {
  const bool wide = is_vectorizable<T>(a) && is_vectorizable<T>(a.grad_output) &&
                    is_vectorizable<T>(a.grad_residual_out) && is_vectorizable<T>(a.grad_input) &&
                    is_vectorizable<T>(a.grad_residual) && is_vectorizable<T>(a.grad_gate) &&
                    is_vectorizable<T>(a.output);
  if (wide)
    launch_backward<T, 16 / sizeof(T)>(a, grad_weight, grad_bias, weight_sums, bias_sums, launch);
  else
    launch_backward<T, 1>(a, grad_weight, grad_bias, weight_sums, bias_sums, launch);
}

}  // namespace ckpt
