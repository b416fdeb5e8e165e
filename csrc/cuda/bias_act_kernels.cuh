// The bias_act kernels for CUDA, and their launchers: y = factor * act(z) with z = input + bias and dropout's factor, 0
// or 1 / (1 - p). elements.cuh explains `launch` and VEC.
//
// Backward, by the chain rule: dL/dz = g * factor * act'(z) with g = dL/dy. z is a sum, so that is the gradient of the
// input, and the gradient of the bias is its sum over the rows. The factors are drawn again from the seed (dropout:
// N. Srivastava et al., 2014).
#pragma once

#include "../bias_act.h"
#include "elements.cuh"

namespace ckpt {

// input + bias, for VEC columns of a row.
template <class T, int VEC>
__device__ __forceinline__ void load_sum(const BiasAct& a, int64_t row, int64_t j, float* z) {
  load<VEC>(a.input.row<const T>(row) + j, z);
  if (!a.bias) return;
  float bias[VEC];
  load<VEC>(static_cast<const float*>(a.bias) + j, bias);
  for (int i = 0; i < VEC; ++i) z[i] += bias[i];
}

template <int VEC>
__device__ __forceinline__ void drop(const BiasAct& a, int64_t row, int64_t j, float* y) {
  if (!a.dropout) return;
  float factor[VEC];
  dropout_factors<VEC>(a.dropout, row, j, factor);
  for (int i = 0; i < VEC; ++i) y[i] *= factor[i];
}

template <class T, int VEC>
__global__ void __launch_bounds__(block_threads) bias_act_forward_kernel(BiasActForward a) {
  const int64_t packs = a.columns / VEC;
  for (int64_t k = first_element(); k < a.rows * packs; k += grid_threads()) {
    const int64_t row = k / packs, j = k % packs * VEC;
    float y[VEC];
    load_sum<T, VEC>(a, row, j, y);
    activate<VEC>(a.activation, y);
    drop<VEC>(a, row, j, y);
    store<VEC>(a.output.row<T>(row) + j, y);
  }
}

// g = dL/dz for VEC columns of a row. Stores g as the gradient of the input, and stores the output again, unless the
// respective matrix is null.
template <class T, int VEC>
__device__ __forceinline__ void input_gradient(const BiasActBackward& a, int64_t row, int64_t j, float* g) {
  float slope[VEC];
  load_sum<T, VEC>(a, row, j, slope);
  if (a.output) {
    float y[VEC];
    for (int i = 0; i < VEC; ++i) y[i] = slope[i];
    activate<VEC>(a.activation, y);
    drop<VEC>(a, row, j, y);
    store<VEC>(a.output.row<T>(row) + j, y);
  }
  differentiate<VEC>(a.activation, slope);
  load<VEC>(a.grad_output.row<const T>(row) + j, g);
  drop<VEC>(a, row, j, g);
  for (int i = 0; i < VEC; ++i) g[i] *= slope[i];
  if (a.grad_input) store<VEC>(a.grad_input.row<T>(row) + j, g);
}

template <class T, int VEC>
__global__ void __launch_bounds__(block_threads) bias_act_backward_kernel(BiasActBackward a) {
  const int64_t packs = a.columns / VEC;
  for (int64_t k = first_element(); k < a.rows * packs; k += grid_threads()) {
    float g[VEC];
    input_gradient<T, VEC>(a, k / packs, k % packs * VEC, g);
  }
}

// The same with partial sums of the gradient of the bias, (tasks, columns): CUDA block (task, strip) processes the rows
// of a task in order, in a strip of columns, VEC columns a thread.
template <class T, int VEC>
__global__ void __launch_bounds__(block_threads)
    bias_act_backward_sums_kernel(BiasActBackward a, int64_t task_rows, int64_t strips, float* sums) {
  const int64_t task = blockIdx.x / strips;
  const int64_t j = (blockIdx.x % strips * block_threads + threadIdx.x) * VEC;
  if (j >= a.columns) return;
  const int64_t begin = task * task_rows, end = begin + task_rows < a.rows ? begin + task_rows : a.rows;
  float g[VEC], total[VEC] = {};
  for (int64_t row = begin; row < end; ++row) {
    input_gradient<T, VEC>(a, row, j, g);
    for (int i = 0; i < VEC; ++i) total[i] += g[i];
  }
  store<VEC>(sums + task * a.columns + j, total);
}

template <class T, int VEC, class Launch>
void launch_bias_act(const BiasActForward& a, const Launch& launch) {
  launch(bias_act_forward_kernel<T, VEC>, blocks_for(a.rows * (a.columns / VEC)), a);
}

template <class T, int VEC, class Launch>
void launch_bias_act(const BiasActBackward& a, float* grad_bias, float* sums, const Launch& launch) {
  if (!grad_bias) {
    launch(bias_act_backward_kernel<T, VEC>, blocks_for(a.rows * (a.columns / VEC)), a);
    return;
  }
  const PartialSums shares(a.rows, a.rows);
  const int64_t strips = divide_up(a.columns, block_threads * VEC);
  launch(bias_act_backward_sums_kernel<T, VEC>, shares.group_tasks * strips, a, shares.task_rows, strips, sums);
  add_up(shares, a.columns, {sums, grad_bias}, {}, launch);
}

template <class T>
bool is_vectorizable(const BiasAct& a) {
  return a.columns * sizeof(T) % 16 == 0 && is_vectorizable<T>(a.input) && is_aligned(a.bias);
}

template <class T, class Launch>
void launch_bias_act(const BiasActForward& a, const Launch& launch) {
  if (is_vectorizable<T>(a) && is_vectorizable<T>(a.output))
    launch_bias_act<T, 16 / sizeof(T)>(a, launch);
  else
    launch_bias_act<T, 1>(a, launch);
}

// With a grad_bias, `sums` has PartialSums(rows, rows).elements(columns) floats.
template <class T, class Launch>
void launch_bias_act(const BiasActBackward& a, float* grad_bias, float* sums, const Launch& launch) {
  if (is_vectorizable<T>(a) && is_vectorizable<T>(a.grad_output) && is_vectorizable<T>(a.grad_input) &&
      is_vectorizable<T>(a.output))
    launch_bias_act<T, 16 / sizeof(T)>(a, grad_bias, sums, launch);
  else
    launch_bias_act<T, 1>(a, grad_bias, sums, launch);
}

}  // namespace ckpt
