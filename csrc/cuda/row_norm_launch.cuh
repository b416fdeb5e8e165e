// Launches the row-norm kernels: chooses vector width, team and grid. elements.cuh explains `launch`.
#pragma once

#include "row_norm_held_kernels.cuh"

namespace ckpt {

template <class T>
bool is_vectorizable(const RowNorm& a) {
  return a.columns * sizeof(T) % 16 == 0 && is_vectorizable<T>(a.input) && is_vectorizable<T>(a.residual) &&
         is_vectorizable<T>(a.gate) && is_aligned(a.weight) && is_aligned(a.bias);
}

// Whether the held kernels have code for the block, and teams of at most this size hold a row. Their vectors of float32
// have 16 bytes too, but a thread reads two at once.
inline bool is_held(const RowNorm& a, int packs, int most) {
  return a.columns <= most * packs * pack_size && a.columns % pack_size == 0 && a.rows <= most_held_rows && !a.gate &&
         !a.pre_activation;
}

template <class T, class Launch>
void launch_held_forward(const RowNormForward& a, const Launch& launch) {
  const int team = team_for(a.columns, forward_packs<T>), threads = block_for(team);
  const int64_t blocks = divide_up(a.rows, threads / team);
  launch(row_norm_held_forward_kernel<T>, Grid(blocks < most_blocks ? blocks : most_blocks, threads), a, team);
}

// One CUDA block for each task.
template <class T, bool SUMS, class Launch>
void launch_held_backward(const RowNormBackward& a, float* weight_sums, float* bias_sums, const Launch& launch) {
  const int team = team_for(a.columns, backward_packs<T, SUMS>), threads = block_for(team);
  const PartialSums shares =
      SUMS ? PartialSums(a.rows, a.rows_per_group) : PartialSums(a.rows, a.rows_per_group, most_blocks, threads / team);
  launch(row_norm_held_backward_kernel<T, SUMS>, Grid(shares.groups * shares.group_tasks, threads), a, team,
         int(shares.group_tasks), int(shares.task_rows), weight_sums, bias_sums);
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
  if (!is_vectorizable<T>(a) || !is_vectorizable<T>(a.output) || !is_vectorizable<T>(a.residual_out))
    launch_forward<T, 1>(a, launch);
  else if (is_held(a, forward_packs<T>, most_forward_team<T>))
    launch_held_forward<T>(a, launch);
  else
    launch_forward<T, 16 / sizeof(T)>(a, launch);
}

// The gradients of the operands, without those of weight and bias.
template <class T, int VEC, class Launch>
void launch_backward_input(const RowNormBackward& a, const Launch& launch) {
  if (VEC > 1 && is_held(a, backward_packs<T, false>, most_backward_team)) {
    launch_held_backward<T, false>(a, nullptr, nullptr, launch);
  } else {
    const bool warp = a.columns <= warp_columns;
    const int64_t blocks = blocks_for_rows(a.rows, warp);
    if (warp)
      launch(row_norm_backward_input_kernel<T, VEC, true>, blocks, a);
    else
      launch(row_norm_backward_input_kernel<T, VEC, false>, blocks, a);
  }
}

template <class T, int VEC, class Launch>
void launch_backward(const RowNormBackward& a, float* grad_weight, float* grad_bias, float* weight_sums,
                     float* bias_sums, const Launch& launch) {
  const bool sums = grad_weight || grad_bias;
  const bool at_once = VEC > 1 && sums && is_held(a, backward_packs<T, true>, most_backward_team);
  if (at_once)
    launch_held_backward<T, true>(a, weight_sums, bias_sums, launch);
  else if (a.grad_input || a.grad_gate || a.output)
    launch_backward_input<T, VEC>(a, launch);
  if (!sums) return;
  const PartialSums shares(a.rows, a.rows_per_group);
  if (!at_once) {
    const int64_t strips = divide_up(a.columns, block_threads * VEC);
    launch(row_norm_backward_weight_kernel<T, VEC>, shares.groups * shares.group_tasks * strips, a, shares.group_tasks,
           shares.task_rows, strips, weight_sums, bias_sums);
  }
  add_up(shares, a.columns, {weight_sums, grad_weight}, {bias_sums, grad_bias}, launch);
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
