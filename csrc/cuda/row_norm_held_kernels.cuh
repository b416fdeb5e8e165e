// The row-norm kernels for rows that a team of threads holds in registers (held_rows.cuh): blocks without a gate and
// without an activation before the norm. row_norm_kernels.cuh has the formulas, and the kernels for all other blocks
// and rows.
#pragma once

#include "held_rows.cuh"
#include "row_norm_kernels.cuh"

namespace ckpt {

// The packs of a thread, and the most threads of a team, limited by registers: in the backward pass a thread also holds
// the output's gradient and, with SUMS, sums over the rows. The more packs, the fewer instructions an element for sums
// over the team and for addresses. `chunk` elements are computed at once.
constexpr int chunk = 4, most_backward_team = 512;
template <class T>
constexpr int forward_packs = sizeof(T) == 4 ? 2 : 4;
template <class T>
constexpr int most_forward_team = sizeof(T) == 4 ? 1024 : 512;
template <class T, bool SUMS>
constexpr int backward_packs = SUMS || sizeof(T) == 4 ? 2 : 4;

// The row of weight or bias for a row of the input; null without coefficients.
__device__ __forceinline__ const float* coefficients_of(const RowNorm& a, const void* all, int row) {
  if (!all || a.rows_per_group == a.rows) return static_cast<const float*>(all);
  return static_cast<const float*>(all) + uint32_t(row) / uint32_t(a.rows_per_group) * a.columns;
}

// v = (u - mean) * rstd for N columns. u is 0 beyond the last column, and there v is 0.
template <int N>
__device__ __forceinline__ void standardize(const float* u, float mean, float rstd, bool within, float* v) {
  const float m = within ? mean : 0;
  for (int i = 0; i < N; ++i) v[i] = (u[i] - m) * rstd;
}

template <class T, int N>
__device__ __forceinline__ void round_values(float* v) {
  unpack(packed<T, N>(v), v);
}

// u = residual + dropout(input) for one pack of a row, rounded as it is stored as residual_out.
template <class T>
__device__ __forceinline__ void add_residual(const RowNormForward& a, const Words<T>& residual, int row, int j,
                                             int columns, float* u) {
  float v[pack_size];
  if (a.dropout) {
    dropout_factors<pack_size>(a.dropout, row, j, v);
    for (int i = 0; i < pack_size; ++i) u[i] *= v[i];
  }
  unpack(residual, v);
  for (int i = 0; i < pack_size; ++i) u[i] += v[i];
  const Pack<T, pack_size> stored = packed<T, pack_size>(u);
  if (j < columns) store_pack(row_of<T>(a.residual_out, row) + j, stored);
  unpack(stored, u);
}

// The sum of term(u) over this thread's part of a row, in `chunk` sums that do not wait for one another.
template <int packs, class Term>
__device__ __forceinline__ float sum_of(const float* u, Term term) {
  float sums[chunk] = {};
#pragma unroll
  for (int i = 0; i < packs * pack_size; ++i) sums[i % chunk] += term(u[i]);
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// Subtracts the mean from u, this thread's part of the row. Returns 1 / standard deviation. In two passes over u,
// unless the statistics are given.
template <int packs>
__device__ __forceinline__ float center(const RowNormForward& a, HeldTeam& team, int row, int columns, float* u) {
  float *means = static_cast<float*>(a.mean), *rstds = static_cast<float*>(a.rstd);
  const bool writes = team.rank == 0 && columns > 0;
  float mean = 0;
  if (a.given_statistics) {
    if (means && columns > 0) mean = means[row];
  } else if (a.centered) {
    float total[1] = {sum_of<packs>(u, [](float x) { return x; })};
    team.sum(total);
    mean = total[0] / float(a.columns);
    if (writes) means[row] = mean;
  }
#pragma unroll
  for (int k = 0; k < packs; ++k)
    standardize<pack_size>(u + k * pack_size, mean, 1, team.column(k) < columns, u + k * pack_size);
  if (a.given_statistics) return columns > 0 ? rstds[row] : 0;
  float squares[1] = {sum_of<packs>(u, [](float x) { return x * x; })};
  team.sum(squares);
  const float rstd = 1 / sqrtf(squares[0] / float(a.columns) + float(a.eps));
  if (writes) rstds[row] = rstd;
  return rstd;
}

template <class T>
__global__ void __launch_bounds__(most_forward_team<T>)
    row_norm_held_forward_kernel(RowNormForward a, int team_threads) {
  constexpr int packs = forward_packs<T>, held = packs * pack_size;
  HeldTeam team(team_threads);
  // All teams of a CUDA block take the same number of turns, because sums contain barriers.
  for (int64_t first = int64_t(blockIdx.x) * team.count; first < a.rows; first += int64_t(gridDim.x) * team.count) {
    const int row = int(first) + team.index, columns = row < a.rows ? int(a.columns) : 0;
    HeldRow<T, packs> input, residual;
    input.request(team, row_of<const T>(a.input, row), columns);
    if (a.residual) residual.request(team, row_of<const T>(a.residual, row), columns);
    float u[held];
#pragma unroll
    for (int k = 0; k < packs; ++k) {
      unpack(input.pack[k], u + k * pack_size);
      if (a.residual) add_residual(a, residual.pack[k], row, team.column(k), columns, u + k * pack_size);
    }
    const float rstd = center<packs>(a, team, row, columns, u);
    const float *weight = coefficients_of(a, a.weight, row), *bias = coefficients_of(a, a.bias, row);
#pragma unroll
    for (int k = 0; k < held; k += chunk) {
      const int j = team.column(k / pack_size) + k % pack_size;
      float w[chunk], b[chunk], *y = u + k;
      load_coefficients<chunk>(weight, j, columns, 1, w);
      load_coefficients<chunk>(bias, j, columns, 0, b);
      for (int i = 0; i < chunk; ++i) y[i] *= rstd;
      if (a.cast_before_weight) round_values<T, chunk>(y);
      for (int i = 0; i < chunk; ++i) y[i] = y[i] * w[i] + b[i];
      activate<chunk>(a.activation, y);
    }
#pragma unroll
    for (int k = 0; k < packs; ++k)
      if (team.column(k) < columns) store<pack_size>(row_of<T>(a.output, row) + team.column(k), u + k * pack_size);
  }
}

// This thread's part of the operands of a row in the backward pass.
template <class T, int packs>
struct HeldGradient {
  HeldRow<T, packs> input, grad_output;
  float mean, rstd;

  __device__ __forceinline__ void request(const RowNormBackward& a, const HeldTeam& team, int row, int columns) {
    input.request(team, row_of<const T>(a.input, row), columns);
    grad_output.request(team, row_of<const T>(a.grad_output, row), columns);
    mean = a.mean && columns > 0 ? static_cast<const float*>(a.mean)[row] : 0;
    rstd = columns > 0 ? static_cast<const float*>(a.rstd)[row] : 0;
  }
  // N of this thread's x_hat from the k-th on.
  template <int N>
  __device__ __forceinline__ void normalize(int k, bool within, float* x_hat) const {
    input.template unpack<N>(k, x_hat);
    standardize<N>(x_hat, mean, rstd, within, x_hat);
  }
};

// grad_input and grad_residual for one pack of a row, from du = dL/du. `other` is the gradient of residual_out.
template <class T>
__device__ __forceinline__ void store_gradients(const RowNormBackward& a, const Words<T>& other, int row, int j,
                                                float* du) {
  float v[pack_size];
  if (a.grad_residual_out) {
    unpack(other, v);
    for (int i = 0; i < pack_size; ++i) du[i] += v[i];
  }
  if (a.grad_residual) {
    const Pack<T, pack_size> stored = packed<T, pack_size>(du);
    store_pack(row_of<T>(a.grad_residual, row) + j, stored);
    unpack(stored, du);
    dropout_factors<pack_size>(a.dropout, row, j, v);
    for (int i = 0; i < pack_size; ++i) du[i] *= v[i];
  }
  store<pack_size>(row_of<T>(a.grad_input, row) + j, du);
}

// Numbers of each thread in shared memory: four at a time, of which neighbours are those of neighbouring threads.
using ThreadNumbers = Pack<float, chunk>[most_backward_team];

// Stores sums over the teams of a CUDA block, in their order, as a row of partial sums.
template <int packs>
__device__ __forceinline__ void store_team_sums(const HeldTeam& team, ThreadNumbers* shared, float* v, float* row,
                                                int columns) {
  if (team.count > 1) {
    __syncthreads();
#pragma unroll
    for (int k = 0; k < packs * pack_size; k += chunk) shared[k / chunk][threadIdx.x] = packed<float, chunk>(v + k);
    __syncthreads();
    if (team.index > 0) return;
    for (int other = 1; other < team.count; ++other)
#pragma unroll
      for (int i = 0; i < packs * pack_size; ++i)
        v[i] += shared[i / chunk][other * team.threads + threadIdx.x].value[i % chunk];
  }
#pragma unroll
  for (int k = 0; k < packs; ++k)
    if (team.column(k) < columns) store<pack_size>(row + team.column(k), v + k * pack_size);
}

// The CUDA block of a task processes the rows of the task, its teams in turns. `group_tasks` tasks share the rows of a
// group. With SUMS it also stores the task's partial sums of the gradients of weight and bias, (tasks, columns),
// requests a row of 16-bit elements while it processes the row before, and keeps the weight in shared memory, so that
// no load waits behind the requests.
template <class T, bool SUMS>
__global__ void __launch_bounds__(most_backward_team)
    row_norm_held_backward_kernel(RowNormBackward a, int team_threads, int group_tasks, int task_rows,
                                  float* weight_sums, float* bias_sums) {
  constexpr bool ahead = SUMS && sizeof(T) == 2;
  constexpr int packs = backward_packs<T, SUMS>, held = packs * pack_size;
  HeldTeam team(team_threads);
  const int group_begin = int(blockIdx.x) / group_tasks * int(a.rows_per_group);
  const int begin = group_begin + int(blockIdx.x) % group_tasks * task_rows;
  const int group_end = group_begin + int(a.rows_per_group),
            end = begin + task_rows < group_end ? begin + task_rows : group_end;
  const float *weight = coefficients_of(a, a.weight, begin), *bias = coefficients_of(a, a.bias, begin);
  float dw[held] = {}, db[held] = {};
  __shared__ ThreadNumbers shared[SUMS ? held / chunk : 1];
  if (SUMS)
#pragma unroll
    for (int k = 0; k < held; k += chunk) {
      float w[chunk];
      load_coefficients<chunk>(weight, team.column(k / pack_size) + k % pack_size, int(a.columns), 1, w);
      shared[k / chunk][threadIdx.x] = packed<float, chunk>(w);
    }
  HeldGradient<T, packs> next;
  if (ahead) next.request(a, team, begin + team.index, begin + team.index < end ? int(a.columns) : 0);
  // All teams take the same number of turns, because sums contain barriers.
  for (int first = begin; first < end; first += team.count) {
    const int row = first + team.index, columns = row < end ? int(a.columns) : 0;
    if (!ahead) next.request(a, team, row, columns);
    const HeldGradient<T, packs> now = next;
    if (ahead) next.request(a, team, row + team.count, row + team.count < end ? int(a.columns) : 0);
    float h[held], sums[2] = {0, 0};  // dL/dx_hat; the sums of h * x_hat and of h
#pragma unroll
    for (int k = 0; k < held; k += chunk) {
      const int j = team.column(k / pack_size) + k % pack_size;
      float w[chunk], x_hat[chunk], *g = h + k;
      if (SUMS)
        unpack(shared[k / chunk][threadIdx.x], w);
      else
        load_coefficients<chunk>(weight, j, columns, 1, w);
      now.template normalize<chunk>(k, j < columns, x_hat);
      now.grad_output.template unpack<chunk>(k, g);
      if (a.cast_before_weight) round_values<T, chunk>(x_hat);
      if (a.activation || a.output) {
        float z[chunk];
        load_coefficients<chunk>(bias, j, columns, 0, z);
        for (int i = 0; i < chunk; ++i) z[i] += x_hat[i] * w[i];
        if (a.output) {
          float y[chunk];
          for (int i = 0; i < chunk; ++i) y[i] = z[i];
          activate<chunk>(a.activation, y);
          if (j < columns) store<chunk>(row_of<T>(a.output, row) + j, y);
        }
        differentiate<chunk>(a.activation, z);
        for (int i = 0; i < chunk; ++i) g[i] *= z[i];
      }
      for (int i = 0; i < chunk; ++i) {
        if (SUMS) dw[k + i] += g[i] * x_hat[i];
        if (SUMS) db[k + i] += g[i];
        g[i] *= w[i];
      }
      if (a.cast_before_weight) now.template normalize<chunk>(k, j < columns, x_hat);
      for (int i = 0; i < chunk; ++i) {
        sums[0] += g[i] * x_hat[i];
        sums[1] += g[i];
      }
    }
    if (!a.grad_input) continue;
    HeldRow<T, packs> other;
    if (a.grad_residual_out) other.request(team, row_of<const T>(a.grad_residual_out, row), columns);
    team.sum(sums);
    const float n = float(a.columns), c1 = sums[0] / n, c2 = a.centered ? sums[1] / n : 0;
#pragma unroll
    for (int k = 0; k < packs; ++k) {
      const int j = team.column(k);
      float x_hat[pack_size], *du = h + k * pack_size;
      now.template normalize<pack_size>(k * pack_size, true, x_hat);
      for (int i = 0; i < pack_size; ++i) du[i] = (du[i] - c2 - x_hat[i] * c1) * now.rstd;
      if (j < columns) store_gradients(a, other.pack[k], row, j, du);
    }
  }
  if (!SUMS) return;
  if (weight_sums) store_team_sums<packs>(team, shared, dw, weight_sums + blockIdx.x * a.columns, int(a.columns));
  if (bias_sums) store_team_sums<packs>(team, shared, db, bias_sums + blockIdx.x * a.columns, int(a.columns));
}

}  // namespace ckpt
