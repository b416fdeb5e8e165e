// The rotary kernels for CUDA (csrc/rotary.h): rotary position embeddings (J. Su et al., "RoFormer: Enhanced
// transformer with rotary position embedding", 2021), after an optional norm over each head.
//
// The backward pass applies the transpose of the rotation: a pair of gradients (g1, g2) of the output gives that of z,
//   (g1 * cos1 + g2 * sin2, g2 * cos2 - g1 * sin1).
// With h = dL/dz, the norm's gradients are those of a row norm (row_norm_kernels.cuh): with k = h * weight and N
// columns, dL/dinput = rstd * (k - x_hat * c1 - c2) with c1 = mean(k * x_hat) and c2 = mean(k), which is 0 in an
// RMSNorm; dL/dweight = sum(h * x_hat) and dL/dbias = sum(h) over the rows.
//
// A thread processes a unit of a row at a time. With a norm, a row belongs to a team (team.cuh). elements.cuh explains
// VEC.
#pragma once

#include "../rotary.h"
#include "team.cuh"

namespace ckpt {

// VEC pairs that are rotated, or VEC columns that pass without rotation, as first elements of pairs whose second
// element is 0.
struct Unit {
  bool turns;
  int64_t index;  // the number of the first pair or column
};

template <int VEC>
CKPT_HD int64_t units_of(const Rotary& a) {
  return (a.pairs() + a.columns - a.rotary_dim) / VEC;
}

template <int VEC>
__device__ __forceinline__ Unit unit_of(const Rotary& a, int64_t k) {
  const int64_t turning = a.pairs() / VEC;
  if (k < turning) return {true, k * VEC};
  const int64_t column = (k - turning) * VEC;
  return {false, column < a.start ? column : column + a.rotary_dim};
}

// A unit of the row at p: VEC first elements, then VEC second elements.
template <int VEC, class T>
__device__ __forceinline__ void load_unit(const Rotary& a, bool interleaved, const T* p, Unit unit, float* v) {
  if (!unit.turns) {
    load<VEC>(p + unit.index, v);
    for (int i = 0; i < VEC; ++i) v[VEC + i] = 0;
  } else if (interleaved) {
    float mixed[2 * VEC];
    load<VEC>(p + a.start + 2 * unit.index, mixed);
    load<VEC>(p + a.start + 2 * unit.index + VEC, mixed + VEC);
    for (int i = 0; i < VEC; ++i) {
      v[i] = mixed[2 * i];
      v[VEC + i] = mixed[2 * i + 1];
    }
  } else {
    load<VEC>(p + a.start + unit.index, v);
    load<VEC>(p + a.start + a.pairs() + unit.index, v + VEC);
  }
}

template <int VEC, class T>
__device__ __forceinline__ void store_unit(const Rotary& a, bool interleaved, T* p, Unit unit, const float* v) {
  if (!unit.turns) {
    store<VEC>(p + unit.index, v);
  } else if (interleaved) {
    float mixed[2 * VEC];
    for (int i = 0; i < VEC; ++i) {
      mixed[2 * i] = v[i];
      mixed[2 * i + 1] = v[VEC + i];
    }
    store<VEC>(p + a.start + 2 * unit.index, mixed);
    store<VEC>(p + a.start + 2 * unit.index + VEC, mixed + VEC);
  } else {
    store<VEC>(p + a.start + unit.index, v);
    store<VEC>(p + a.start + a.pairs() + unit.index, v + VEC);
  }
}

template <int VEC, class T>
__device__ __forceinline__ void load_angles(const Angles& angles, const Place& place, int64_t pair, float* v) {
  const T* p = angles.rows.at<const T>(place) + pair * angles.step;
  if (angles.step == 2) {
    float mixed[2 * VEC];
    load<VEC>(p, mixed);
    load<VEC>(p + VEC, mixed + VEC);
    for (int i = 0; i < VEC; ++i) {
      v[i] = mixed[2 * i];
      v[VEC + i] = mixed[2 * i + 1];
    }
  } else {
    load<VEC>(p, v);
    load<VEC>(p + angles.shift, v + VEC);
  }
}

// The dtype of a table is a run-time switch, as the activation.
template <int VEC>
__device__ __forceinline__ void load_angles(const Angles& angles, const Place& place, int64_t pair, float* v) {
  switch (angles.kind) {
    case ScalarKind::float32:
      return load_angles<VEC, float>(angles, place, pair, v);
    case ScalarKind::bfloat16:
      return load_angles<VEC, bfloat16>(angles, place, pair, v);
    case ScalarKind::float16:
      return load_angles<VEC, float16>(angles, place, pair, v);
    case ScalarKind::float64:
      return load_angles<VEC, double>(angles, place, pair, v);
  }
}

// Rotates the pairs of a unit by the angles, or by the transpose.
template <int VEC>
__device__ __forceinline__ void turn(const Rotary& a, const Place& place, Unit unit, bool back, float* v) {
  if (!unit.turns) return;
  float cos[2 * VEC], sin[2 * VEC];
  load_angles<VEC>(a.cos, place, unit.index, cos);
  load_angles<VEC>(a.sin, place, unit.index, sin);
  for (int i = 0; i < VEC; ++i) {
    const float first = v[i], second = v[VEC + i];
    v[i] = first * cos[i] + second * (back ? sin[VEC + i] : -sin[i]);
    v[VEC + i] = second * cos[VEC + i] + first * (back ? -sin[i] : sin[VEC + i]);
  }
}

// Both passes without a norm: rotates the rows of `source` into `target`, or by the transpose.
template <class T, int VEC>
__global__ void __launch_bounds__(block_threads) rotary_kernel(Rotary a, Rows source, Rows target, bool back) {
  const int64_t units = units_of<VEC>(a);
  for (int64_t k = first_element(); k < a.rows * units; k += grid_threads()) {
    const Place place = a.place(k / units);
    const Unit unit = unit_of<VEC>(a, k % units);
    float v[2 * VEC];
    load_unit<VEC>(a, back ? a.interleaved_output : a.interleaved, source.at<const T>(place), unit, v);
    turn<VEC>(a, place, unit, back, v);
    store_unit<VEC>(a, back ? a.interleaved : a.interleaved_output, target.at<T>(place), unit, v);
  }
}

struct HeadStatistics {
  float mean, rstd;
};

// The statistics of one row, computed by a team.
template <class T, int VEC, class Rowteam>
__device__ __forceinline__ HeadStatistics statistics_of(const Rotary& a, const T* x) {
  float v[VEC];
  Moments moments;
  for (int64_t j = Rowteam::rank() * VEC; j < a.columns; j += Rowteam::size * VEC) {
    load<VEC>(x + j, v);
    if (a.norm == HeadNorm::layer)
      moments.merge(Moments::of(v, VEC));
    else
      for (int i = 0; i < VEC; ++i) moments.squares += v[i] * v[i];
  }
  if (a.norm == HeadNorm::layer)
    moments = Rowteam::merge(moments);
  else
    moments.squares = Rowteam::sum(moments.squares);
  return {moments.mean, 1 / sqrtf(moments.squares / float(a.columns) + float(a.eps))};
}

// x_hat of a unit, and x_hat for the product with the weight: with cast_before_weight, rounded to the storage type.
template <int VEC, class T>
__device__ __forceinline__ void normalize_unit(const Rotary& a, const T* x, Unit unit, const HeadStatistics& statistics,
                                               float* x_hat, float* rounded) {
  load_unit<VEC>(a, a.interleaved, x, unit, x_hat);
  for (int i = 0; i < 2 * VEC; ++i) {
    x_hat[i] = rounded[i] = (x_hat[i] - statistics.mean) * statistics.rstd;
    if (a.cast_before_weight) {
      T stored;
      from_float(x_hat[i], &stored);
      rounded[i] = to_float(stored);
    }
  }
}

// A unit of a weight or bias, or `absent` without one.
template <int VEC>
__device__ __forceinline__ void load_coefficients(const Rotary& a, const void* p, Unit unit, float absent, float* v) {
  if (p)
    load_unit<VEC>(a, a.interleaved, static_cast<const float*>(p), unit, v);
  else
    for (int i = 0; i < 2 * VEC; ++i) v[i] = absent;
}

template <class T, int VEC, bool WARP>
__global__ void __launch_bounds__(block_threads) rotary_norm_forward_kernel(RotaryForward a) {
  using Rowteam = Team<WARP>;
  for (int64_t row = Rowteam::first(); row < a.rows; row += Rowteam::count()) {
    const Place place = a.place(row);
    const T* x = a.input.at<const T>(place);
    const HeadStatistics statistics = statistics_of<T, VEC, Rowteam>(a, x);
    for (int64_t k = Rowteam::rank(); k < units_of<VEC>(a); k += Rowteam::size) {
      const Unit unit = unit_of<VEC>(a, k);
      float x_hat[2 * VEC], z[2 * VEC], w[2 * VEC], b[2 * VEC];
      normalize_unit<VEC>(a, x, unit, statistics, x_hat, z);
      load_coefficients<VEC>(a, a.weight, unit, 1, w);
      load_coefficients<VEC>(a, a.bias, unit, 0, b);
      for (int i = 0; i < 2 * VEC; ++i) z[i] = z[i] * w[i] + b[i];
      turn<VEC>(a, place, unit, false, z);
      store_unit<VEC>(a, a.interleaved_output, a.output.at<T>(place), unit, z);
    }
  }
}

// h = dL/dz of a unit.
template <int VEC, class T>
__device__ __forceinline__ void load_gradient(const RotaryBackward& a, const Place& place, Unit unit, float* h) {
  load_unit<VEC>(a, a.interleaved_output, a.grad_output.at<const T>(place), unit, h);
  turn<VEC>(a, place, unit, true, h);
}

// Stores the statistics of each row in `all_statistics` unless that is null.
template <class T, int VEC, bool WARP>
__global__ void __launch_bounds__(block_threads)
    rotary_norm_backward_kernel(RotaryBackward a, HeadStatistics* all_statistics) {
  using Rowteam = Team<WARP>;
  for (int64_t row = Rowteam::first(); row < a.rows; row += Rowteam::count()) {
    const Place place = a.place(row);
    const T* x = a.input.at<const T>(place);
    const HeadStatistics statistics = statistics_of<T, VEC, Rowteam>(a, x);
    if (all_statistics && Rowteam::rank() == 0) all_statistics[row] = statistics;
    if (!a.grad_input) continue;
    float x_hat[2 * VEC], rounded[2 * VEC], h[2 * VEC], w[2 * VEC], sum = 0, sum_x_hat = 0;
    for (int64_t k = Rowteam::rank(); k < units_of<VEC>(a); k += Rowteam::size) {
      const Unit unit = unit_of<VEC>(a, k);
      load_gradient<VEC, T>(a, place, unit, h);
      load_coefficients<VEC>(a, a.weight, unit, 1, w);
      normalize_unit<VEC>(a, x, unit, statistics, x_hat, rounded);
      for (int i = 0; i < 2 * VEC; ++i) {
        sum += h[i] * w[i];
        sum_x_hat += h[i] * w[i] * x_hat[i];
      }
    }
    const float c2 = a.norm == HeadNorm::layer ? Rowteam::sum(sum) / float(a.columns) : 0;
    const float c1 = Rowteam::sum(sum_x_hat) / float(a.columns);
    for (int64_t k = Rowteam::rank(); k < units_of<VEC>(a); k += Rowteam::size) {
      const Unit unit = unit_of<VEC>(a, k);
      load_gradient<VEC, T>(a, place, unit, h);
      load_coefficients<VEC>(a, a.weight, unit, 1, w);
      normalize_unit<VEC>(a, x, unit, statistics, x_hat, rounded);
      for (int i = 0; i < 2 * VEC; ++i) h[i] = (h[i] * w[i] - c2 - x_hat[i] * c1) * statistics.rstd;
      store_unit<VEC>(a, a.interleaved, a.grad_input.at<T>(place), unit, h);
    }
  }
}

// Partial sums of the gradients of weight and bias, (tasks, columns): CUDA block (task, strip) processes the rows of a
// task in a strip of units, one unit a thread. If a row has fewer units than the block has threads, the threads process
// several rows at a time, in `lines`, and the sums of the lines are added up in order.
template <class T, int VEC>
__global__ void __launch_bounds__(block_threads)
    rotary_norm_weight_kernel(RotaryBackward a, const HeadStatistics* all_statistics, int64_t task_rows, int64_t strips,
                              float* weight_sums, float* bias_sums) {
  __shared__ float shared[2 * VEC][block_threads];
  const int64_t units = units_of<VEC>(a), task = blockIdx.x / strips;
  const int strip_units = units < block_threads ? int(units) : block_threads;
  const int line = threadIdx.x / strip_units, lines = block_threads / strip_units;
  const int64_t k = blockIdx.x % strips * block_threads + threadIdx.x % strip_units;
  const int64_t begin = task * task_rows, end = begin + task_rows < a.rows ? begin + task_rows : a.rows;
  const bool takes_part = line < lines && k < units;
  const Unit unit = unit_of<VEC>(a, takes_part ? k : 0);
  float h[2 * VEC], x_hat[2 * VEC], rounded[2 * VEC], dw[2 * VEC] = {}, db[2 * VEC] = {};
  if (takes_part)
    for (int64_t row = begin + line; row < end; row += lines) {
      const Place place = a.place(row);
      load_gradient<VEC, T>(a, place, unit, h);
      normalize_unit<VEC>(a, a.input.at<const T>(place), unit, all_statistics[row], x_hat, rounded);
      for (int i = 0; i < 2 * VEC; ++i) {
        dw[i] += h[i] * rounded[i];
        db[i] += h[i];
      }
    }
  const auto add_up = [&](float* v, float* sums) {
    for (int i = 0; i < 2 * VEC; ++i) shared[i][threadIdx.x] = v[i];
    __syncthreads();
    if (takes_part && line == 0) {
      for (int other = 1; other < lines; ++other)
        for (int i = 0; i < 2 * VEC; ++i) v[i] += shared[i][other * strip_units + threadIdx.x];
      store_unit<VEC>(a, a.interleaved, sums + task * a.columns, unit, v);
    }
    __syncthreads();
  };
  if (weight_sums) add_up(dw, weight_sums);
  if (bias_sums) add_up(db, bias_sums);
}

}  // namespace ckpt
