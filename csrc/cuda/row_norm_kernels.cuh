// The row-norm kernels for CUDA (csrc/row_norm.h): LayerNorm (J. Ba et al., "Layer normalization", 2016) and RMSNorm
// (B. Zhang and R. Sennrich, "Root mean square layer normalization", 2019), each with a prologue and an epilogue.
//
// Backward, with z = x_hat * weight + bias, g = dL/dz, h = g * weight = dL/dx_hat and N columns: x_hat_i = (u_i - mean)
// * rstd, and mean and rstd depend on every u_j, so dx_hat_i/du_j = rstd * ((i == j) - 1 / N - x_hat_i * x_hat_j / N),
// and so
//   dL/du = rstd * (h - x_hat * c1 - c2) with c1 = mean(h * x_hat) and c2 = mean(h),
//   dL/dweight = sum(g * x_hat) and dL/dbias = sum(g) over the rows.
// In an RMSNorm the mean does not depend on u, and c2 is 0. With cast_before_weight, z and dL/dweight use the rounded
// x_hat, and the derivative of rounding is taken as 1.
//
// A row belongs to a team (team.cuh). elements.cuh explains VEC.
#pragma once

#include "../row_norm.h"
#include "team.cuh"

namespace ckpt {

// u for VEC columns of a row. residual + dropout(input) is also stored as residual_out, and u is the stored, rounded
// sum: the backward pass starts from residual_out and must compute the same u.
template <class T, int VEC>
__device__ __forceinline__ void load_operand(const RowNorm& a, const Rows& residual_out, int64_t row, int64_t j,
                                             float* u) {
  load<VEC>(a.input.row<const T>(row) + j, u);
  if (a.pre_activation) activate<VEC>(a.pre_activation, u);
  if (a.gate_before_norm) {
    float gate[VEC];
    load<VEC>(a.gate.row<const T>(row) + j, gate);
    activate<VEC>(a.activation, gate);
    for (int i = 0; i < VEC; ++i) u[i] *= gate[i];
  }
  if (a.residual) {
    float residual[VEC];
    load<VEC>(a.residual.row<const T>(row) + j, residual);
    if (a.dropout) {
      float factor[VEC];
      dropout_factors<VEC>(a.dropout, row, j, factor);
      for (int i = 0; i < VEC; ++i) u[i] *= factor[i];
    }
    for (int i = 0; i < VEC; ++i) u[i] += residual[i];
    store<VEC>(residual_out.row<T>(row) + j, u);
    load<VEC>(residual_out.row<const T>(row) + j, u);
  }
}

template <int VEC>
__device__ __forceinline__ void load_coefficients(const RowNorm& a, int64_t row, int64_t j, float* w, float* b) {
  const int64_t offset = row / a.rows_per_group * a.columns + j;
  for (int i = 0; i < VEC; ++i) w[i] = 1, b[i] = 0;
  if (a.weight) load<VEC>(static_cast<const float*>(a.weight) + offset, w);
  if (a.bias) load<VEC>(static_cast<const float*>(a.bias) + offset, b);
}

// x_hat, and x_hat for the product with the weight: with cast_before_weight, rounded to the storage type.
template <class T, int VEC>
__device__ __forceinline__ void normalize(const RowNorm& a, const float* u, float mean, float rstd, float* x_hat,
                                          float* rounded) {
  for (int i = 0; i < VEC; ++i) {
    x_hat[i] = rounded[i] = (u[i] - mean) * rstd;
    if (a.cast_before_weight) {
      T stored;
      from_float(x_hat[i], &stored);
      rounded[i] = to_float(stored);
    }
  }
}

template <class T, int VEC, bool WARP>
__global__ void __launch_bounds__(block_threads) row_norm_forward_kernel(RowNormForward a) {
  using Rowteam = Team<WARP>;
  constexpr int64_t step = Rowteam::size * VEC;
  for (int64_t row = Rowteam::first(); row < a.rows; row += Rowteam::count()) {
    float u[VEC], mean, rstd;
    if (a.given_statistics) {
      mean = a.mean ? static_cast<const float*>(a.mean)[row] : 0;
      rstd = static_cast<const float*>(a.rstd)[row];
    } else {
      Moments moments;
      for (int64_t j = Rowteam::rank() * VEC; j < a.columns; j += step) {
        load_operand<T, VEC>(a, a.residual_out, row, j, u);
        if (a.centered)
          moments.merge(Moments::of(u, VEC));
        else
          for (int i = 0; i < VEC; ++i) moments.squares += u[i] * u[i];
      }
      if (a.centered)
        moments = Rowteam::merge(moments);
      else
        moments.squares = Rowteam::sum(moments.squares);
      mean = moments.mean;
      rstd = 1 / sqrtf(moments.squares / float(a.columns) + float(a.eps));
      if (Rowteam::rank() == 0) {
        if (a.mean) static_cast<float*>(a.mean)[row] = mean;
        static_cast<float*>(a.rstd)[row] = rstd;
      }
    }
    for (int64_t j = Rowteam::rank() * VEC; j < a.columns; j += step) {
      float w[VEC], b[VEC], x_hat[VEC], y[VEC];
      // This thread has stored the sum with the residual itself, so no barrier is needed.
      if (a.residual)
        load<VEC>(a.residual_out.row<const T>(row) + j, u);
      else
        load_operand<T, VEC>(a, a.residual_out, row, j, u);
      load_coefficients<VEC>(a, row, j, w, b);
      normalize<T, VEC>(a, u, mean, rstd, x_hat, y);
      for (int i = 0; i < VEC; ++i) y[i] = y[i] * w[i] + b[i];
      if (!a.gate) {
        activate<VEC>(a.activation, y);
      } else if (!a.gate_before_norm) {
        float gate[VEC];
        load<VEC>(a.gate.row<const T>(row) + j, gate);
        activate<VEC>(a.activation, gate);
        for (int i = 0; i < VEC; ++i) y[i] *= gate[i];
      }
      store<VEC>(a.output.row<T>(row) + j, y);
    }
  }
}

// g = dL/dz, x_hat, and x_hat for the product with the weight, for VEC columns of a row. With a gate that multiplies z,
// g = dL/dy * act(gate), and with store_gate dL/dgate = dL/dy * z * act'(gate) is stored.
template <class T, int VEC>
__device__ __forceinline__ void norm_gradient(const RowNormBackward& a, int64_t row, int64_t j, const float* w,
                                              const float* b, bool store_gate, float* g, float* x_hat, float* rounded) {
  float u[VEC], slope[VEC];
  load_operand<T, VEC>(a, Rows{}, row, j, u);
  const float mean = a.mean ? static_cast<const float*>(a.mean)[row] : 0;
  normalize<T, VEC>(a, u, mean, static_cast<const float*>(a.rstd)[row], x_hat, rounded);
  load<VEC>(a.grad_output.row<const T>(row) + j, g);
  if (!a.gate) {
    if (a.activation == 0) return;
    for (int i = 0; i < VEC; ++i) slope[i] = rounded[i] * w[i] + b[i];
    differentiate<VEC>(a.activation, slope);
    for (int i = 0; i < VEC; ++i) g[i] *= slope[i];
  } else if (!a.gate_before_norm) {
    float gate[VEC];
    load<VEC>(a.gate.row<const T>(row) + j, gate);
    if (store_gate && a.grad_gate) {
      for (int i = 0; i < VEC; ++i) slope[i] = gate[i];
      differentiate<VEC>(a.activation, slope);
      for (int i = 0; i < VEC; ++i) slope[i] *= g[i] * rounded[i] * w[i];
      store<VEC>(a.grad_gate.row<T>(row) + j, slope);
    }
    activate<VEC>(a.activation, gate);
    for (int i = 0; i < VEC; ++i) g[i] *= gate[i];
  }
}

// The gradients of the operands of u, from du = dL/du.
template <class T, int VEC>
__device__ __forceinline__ void store_input_gradients(const RowNormBackward& a, int64_t row, int64_t j, float* du) {
  float x[VEC], other[VEC];
  if (a.gate_before_norm) {
    load<VEC>(a.input.row<const T>(row) + j, x);
    load<VEC>(a.gate.row<const T>(row) + j, other);
    differentiate<VEC>(a.activation, other);
    for (int i = 0; i < VEC; ++i) other[i] *= du[i] * x[i];
    store<VEC>(a.grad_gate.row<T>(row) + j, other);
    load<VEC>(a.gate.row<const T>(row) + j, other);
    activate<VEC>(a.activation, other);
    for (int i = 0; i < VEC; ++i) du[i] *= other[i];
  } else if (a.pre_activation) {
    load<VEC>(a.input.row<const T>(row) + j, x);
    differentiate<VEC>(a.pre_activation, x);
    for (int i = 0; i < VEC; ++i) du[i] *= x[i];
  }
  if (a.grad_residual_out) {
    load<VEC>(a.grad_residual_out.row<const T>(row) + j, other);
    for (int i = 0; i < VEC; ++i) du[i] += other[i];
  }
  if (a.grad_residual) {
    store<VEC>(a.grad_residual.row<T>(row) + j, du);
    load<VEC>(a.grad_residual.row<const T>(row) + j, du);
    dropout_factors<VEC>(a.dropout, row, j, other);
    for (int i = 0; i < VEC; ++i) du[i] *= other[i];
  }
  store<VEC>(a.grad_input.row<T>(row) + j, du);
}

template <class T, int VEC, bool WARP>
__global__ void __launch_bounds__(block_threads) row_norm_backward_input_kernel(RowNormBackward a) {
  using Rowteam = Team<WARP>;
  constexpr int64_t step = Rowteam::size * VEC;
  for (int64_t row = Rowteam::first(); row < a.rows; row += Rowteam::count()) {
    float w[VEC], b[VEC], g[VEC], x_hat[VEC], rounded[VEC];
    float sum_h = 0, sum_h_x_hat = 0;
    for (int64_t j = Rowteam::rank() * VEC; j < a.columns; j += step) {
      load_coefficients<VEC>(a, row, j, w, b);
      norm_gradient<T, VEC>(a, row, j, w, b, true, g, x_hat, rounded);
      for (int i = 0; i < VEC; ++i) {
        sum_h += g[i] * w[i];
        sum_h_x_hat += g[i] * w[i] * x_hat[i];
      }
      if (a.output) {
        for (int i = 0; i < VEC; ++i) rounded[i] = rounded[i] * w[i] + b[i];
        activate<VEC>(a.activation, rounded);
        store<VEC>(a.output.row<T>(row) + j, rounded);
      }
    }
    if (!a.grad_input) continue;
    const float rstd = static_cast<const float*>(a.rstd)[row];
    const float c2 = a.centered ? Rowteam::sum(sum_h) / float(a.columns) : 0;
    const float c1 = Rowteam::sum(sum_h_x_hat) / float(a.columns);
    for (int64_t j = Rowteam::rank() * VEC; j < a.columns; j += step) {
      load_coefficients<VEC>(a, row, j, w, b);
      norm_gradient<T, VEC>(a, row, j, w, b, false, g, x_hat, rounded);
      for (int i = 0; i < VEC; ++i) g[i] = (g[i] * w[i] - c2 - x_hat[i] * c1) * rstd;
      store_input_gradients<T, VEC>(a, row, j, g);
    }
  }
}

// Partial sums of the gradients of weight and bias, (tasks, columns): CUDA block (task, strip) processes the rows of a
// task in order, in a strip of columns, VEC columns a thread. `group_tasks` tasks share the rows of a group.
template <class T, int VEC>
__global__ void __launch_bounds__(block_threads)
    row_norm_backward_weight_kernel(RowNormBackward a, int64_t group_tasks, int64_t task_rows, int64_t strips,
                                    float* weight_sums, float* bias_sums) {
  const int64_t task = blockIdx.x / strips;
  const int64_t j = (blockIdx.x % strips * block_threads + threadIdx.x) * VEC;
  if (j >= a.columns) return;
  const int64_t group_begin = task / group_tasks * a.rows_per_group, group_end = group_begin + a.rows_per_group;
  const int64_t begin = group_begin + task % group_tasks * task_rows;
  const int64_t end = begin + task_rows < group_end ? begin + task_rows : group_end;
  float w[VEC], b[VEC], g[VEC], x_hat[VEC], rounded[VEC], dw[VEC] = {}, db[VEC] = {};
  load_coefficients<VEC>(a, group_begin, j, w, b);
  for (int64_t row = begin; row < end; ++row) {
    norm_gradient<T, VEC>(a, row, j, w, b, false, g, x_hat, rounded);
    for (int i = 0; i < VEC; ++i) {
      dw[i] += g[i] * rounded[i];
      db[i] += g[i];
    }
  }
  if (weight_sums) store<VEC>(weight_sums + task * a.columns + j, dw);
  if (bias_sums) store<VEC>(bias_sums + task * a.columns + j, db);
}

}  // namespace ckpt
