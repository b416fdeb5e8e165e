// The DyT kernels for CUDA, and their launchers: y = t * w + b with t = tanh(alpha * x) (J. Zhu et al., "Transformers
// without normalization", 2025). elements.cuh explains `launch` and VEC.
//
// Backward, by the chain rule, with g = dL/dy and s = g * w * (1 - t^2), the gradient of alpha * x: dL/dx = alpha * s,
// dL/dalpha is the sum of s * x over all elements, and dL/dw and dL/db are the sums of g * t and of g over the rows.
#pragma once

#include "../dyt.h"
#include "elements.cuh"
#include "team.cuh"

namespace ckpt {

// Sums for the gradients of a block: the gradients themselves, or partial sums. A sum is null if not needed.
struct DytSums {
  float *alpha, *weight, *bias;

  explicit operator bool() const { return alpha || weight || bias; }
};

// VEC columns of a weight or bias, or `absent` without one.
template <int VEC>
__device__ __forceinline__ void load_coefficient(const void* p, int64_t j, float absent, float* v) {
  if (p)
    load<VEC>(static_cast<const float*>(p) + j, v);
  else
    for (int i = 0; i < VEC; ++i) v[i] = absent;
}

template <class T, int VEC>
__global__ void __launch_bounds__(block_threads) dyt_forward_kernel(DytForward a) {
  const int64_t packs = a.columns / VEC;
  const float alpha = *static_cast<const float*>(a.alpha);
  for (int64_t k = first_element(); k < a.rows * packs; k += grid_threads()) {
    const int64_t row = k / packs, j = k % packs * VEC;
    float y[VEC], weight[VEC], bias[VEC];
    load<VEC>(a.input.row<const T>(row) + j, y);
    load_coefficient<VEC>(a.weight, j, 1, weight);
    load_coefficient<VEC>(a.bias, j, 0, bias);
    for (int i = 0; i < VEC; ++i) y[i] = Tanh::value(alpha * y[i]) * weight[i] + bias[i];
    store<VEC>(a.output.row<T>(row) + j, y);
  }
}

// CUDA block (task, strip) processes the rows of a task in order, in a strip of columns, VEC columns a thread. The
// partial sums are one number for alpha, (tasks, strips), and one for each column for weight and bias, (tasks,
// columns).
template <class T, int VEC>
__global__ void __launch_bounds__(block_threads)
    dyt_backward_kernel(DytBackward a, int64_t task_rows, int64_t strips, DytSums sums) {
  const int64_t task = blockIdx.x / strips;
  const int64_t j = (blockIdx.x % strips * block_threads + threadIdx.x) * VEC;
  const int64_t begin = task * task_rows, end = begin + task_rows < a.rows ? begin + task_rows : a.rows;
  const float alpha = *static_cast<const float*>(a.alpha);
  float alpha_sum = 0;
  if (j < a.columns) {
    float weight[VEC], weight_sum[VEC] = {}, bias_sum[VEC] = {};
    load_coefficient<VEC>(a.weight, j, 1, weight);
    for (int64_t row = begin; row < end; ++row) {
      float x[VEC], g[VEC];
      load<VEC>(a.input.row<const T>(row) + j, x);
      load<VEC>(a.grad_output.row<const T>(row) + j, g);
      for (int i = 0; i < VEC; ++i) {
        const float t = Tanh::value(alpha * x[i]);
        weight_sum[i] += g[i] * t;
        bias_sum[i] += g[i];
        const float s = g[i] * weight[i] * (1 - t * t);
        alpha_sum += s * x[i];
        x[i] = alpha * s;
      }
      if (a.grad_input) store<VEC>(a.grad_input.row<T>(row) + j, x);
    }
    if (sums.weight) store<VEC>(sums.weight + task * a.columns + j, weight_sum);
    if (sums.bias) store<VEC>(sums.bias + task * a.columns + j, bias_sum);
  }
  // All threads of the block take part.
  if (!sums.alpha) return;
  alpha_sum = Team<false>::sum(alpha_sum);
  if (threadIdx.x == 0) sums.alpha[blockIdx.x] = alpha_sum;
}

// The sum of `count` numbers, by one CUDA block.
static __global__ void __launch_bounds__(block_threads) sum_kernel(const float* values, int64_t count, float* result) {
  float sum = 0;
  for (int64_t k = threadIdx.x; k < count; k += block_threads) sum += values[k];
  sum = Team<false>::sum(sum);
  if (threadIdx.x == 0) *result = sum;
}

template <class T, int VEC, class Launch>
void launch_dyt(const DytForward& a, const Launch& launch) {
  launch(dyt_forward_kernel<T, VEC>, blocks_for(a.rows * (a.columns / VEC)), a);
}

template <class T, int VEC, class Launch>
void launch_dyt(const DytBackward& a, const DytSums& gradients, const DytSums& sums, const Launch& launch) {
  const PartialSums shares(a.rows, a.rows);
  const int64_t strips = divide_up(a.columns, block_threads * VEC), blocks = shares.group_tasks * strips;
  launch(dyt_backward_kernel<T, VEC>, blocks, a, shares.task_rows, strips, sums);
  if (gradients.alpha) launch(sum_kernel, 1, (const float*)sums.alpha, blocks, gradients.alpha);
  add_up(shares, a.columns, {sums.weight, gradients.weight}, {sums.bias, gradients.bias}, launch);
}

template <class T>
bool is_vectorizable(const Dyt& a) {
  return a.columns * sizeof(T) % 16 == 0 && is_vectorizable<T>(a.input) && is_aligned(a.weight) && is_aligned(a.bias);
}

template <class T, class Launch>
void launch_dyt(const DytForward& a, const Launch& launch) {
  if (is_vectorizable<T>(a) && is_vectorizable<T>(a.output))
    launch_dyt<T, 16 / sizeof(T)>(a, launch);
  else
    launch_dyt<T, 1>(a, launch);
}

// An upper bound on the number of partial sums of alpha's gradient. The gradients of weight and bias have
// PartialSums(rows, rows).elements(columns) each.
inline int64_t alpha_sums_of(const Dyt& a) {
  return PartialSums(a.rows, a.rows).group_tasks * divide_up(a.columns, block_threads);
}

// For each gradient that is needed, `sums` has memory for the partial sums.
template <class T, class Launch>
void launch_dyt(const DytBackward& a, const DytSums& gradients, const DytSums& sums, const Launch& launch) {
  if (is_vectorizable<T>(a) && is_vectorizable<T>(a.grad_output) && is_vectorizable<T>(a.grad_input))
    launch_dyt<T, 16 / sizeof(T)>(a, gradients, sums, launch);
  else
    launch_dyt<T, 1>(a, gradients, sums, launch);
}

}  // namespace ckpt
