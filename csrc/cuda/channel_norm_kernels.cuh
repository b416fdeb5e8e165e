// The channel-norm kernels for CUDA: y = act(z) with z = (x - mean) * scale + bias + other
// (BatchNorm: S. Ioffe and C. Szegedy, 2015; GroupNorm: Y. Wu and K. He, 2018; InstanceNorm: D. Ulyanov et al., 2016).
// elements.cuh explains VEC.
//
// Backward, with g = dL/dy * act'(z) = dL/dz and x_hat = (x - mean) * rstd over a set of N elements that share their
// statistics: dx_hat_i/dx_j = rstd * ((i == j) - 1 / N - x_hat_i * x_hat_j / N), so
//   dL/dx = rstd * (weight * g - x_hat * c1 - c2) with c1 = mean(weight * g * x_hat), c2 = mean(weight * g),
// and the gradients of weight and bias are the sums of g * x_hat and of g over a channel. The kernels sum g and
// g * (x - mean) by channel; the ops compute coefficients from these sums (channel_norm.h), and a last kernel writes
// dL/dx.
//
// A team sums a plane. With channels last, a CUDA block processes a piece of rows and a strip of columns: the threads
// form lines of `lanes` threads; line k processes rows k, k + lines, k + 2 lines, ..., with VEC columns a thread, and
// the sums of the lines are added in order.
#pragma once

#include "../channel_norm.h"
#include "team.cuh"

namespace ckpt {

template <class T>
__device__ __forceinline__ const T* at(const void* matrix, int64_t row, int64_t columns) {
  return static_cast<const T*>(matrix) + row * columns;
}

// One coefficient for VEC columns of a row.
template <int VEC, bool PLANES>
__device__ __forceinline__ void load_coefficient(const ChannelCoefficients& all, const ChannelNorm& a, int index,
                                                 int64_t row, int64_t j, float* c) {
  const int64_t stride = (all.by_sample ? a.samples : 1) * a.channels;
  const int64_t sample = all.by_sample ? a.sample_of(row) : 0;
  const float* first = static_cast<const float*>(all.data) + index * stride + sample * a.channels;
  if (PLANES)
    for (int i = 0; i < VEC; ++i) c[i] = first[row % a.channels];
  else
    for (int i = 0; i < VEC; ++i) c[i] = first[j + i];
}

// x - mean, and z = (x - mean) * scale + bias + other.
template <class T, int VEC, bool PLANES, class Block>
__device__ __forceinline__ void load_normalized(const Block& a, int64_t row, int64_t j, float* d, float* z) {
  float c[VEC];
  load<VEC>(at<T>(a.input, row, a.columns()) + j, d);
  load_coefficient<VEC, PLANES>(a.coefficients, a, ChannelCoefficients::mean, row, j, c);
  for (int i = 0; i < VEC; ++i) d[i] -= c[i];
  load_coefficient<VEC, PLANES>(a.coefficients, a, ChannelCoefficients::scale, row, j, c);
  for (int i = 0; i < VEC; ++i) z[i] = d[i] * c[i];
  load_coefficient<VEC, PLANES>(a.coefficients, a, ChannelCoefficients::bias, row, j, c);
  for (int i = 0; i < VEC; ++i) z[i] += c[i];
  if (!a.other) return;
  load<VEC>(at<T>(a.other, row, a.columns()) + j, c);
  for (int i = 0; i < VEC; ++i) z[i] += c[i];
}

// x - mean, and g = dL/dz. With by_output, `other` is the block's output, which has the sign of z, and the derivative
// of the activation depends on that sign only.
template <class T, int VEC, bool PLANES, class Block>
__device__ __forceinline__ void load_gradient(const Block& a, int64_t row, int64_t j, float* d, float* g) {
  float z[VEC];
  if (a.by_output) {
    load<VEC>(at<T>(a.input, row, a.columns()) + j, d);
    load_coefficient<VEC, PLANES>(a.coefficients, a, ChannelCoefficients::mean, row, j, z);
    for (int i = 0; i < VEC; ++i) d[i] -= z[i];
    load<VEC>(at<T>(a.other, row, a.columns()) + j, z);
  } else {
    load_normalized<T, VEC, PLANES>(a, row, j, d, z);
  }
  differentiate<VEC>(a.activation, z);
  load<VEC>(at<T>(a.grad_output, row, a.columns()) + j, g);
  for (int i = 0; i < VEC; ++i) g[i] *= z[i];
}

template <class T, int VEC, bool PLANES>
__global__ void __launch_bounds__(block_threads) channel_forward_kernel(ChannelForward a) {
  const int64_t packs = a.columns() / VEC;
  for (int64_t k = first_element(); k < a.rows() * packs; k += grid_threads()) {
    const int64_t row = k / packs, j = k % packs * VEC;
    float d[VEC], z[VEC];
    load_normalized<T, VEC, PLANES>(a, row, j, d, z);
    activate<VEC>(a.activation, z);
    store<VEC>(static_cast<T*>(a.output) + row * a.columns() + j, z);
  }
}

template <class T, int VEC, bool PLANES>
__global__ void __launch_bounds__(block_threads) channel_backward_kernel(ChannelBackward a) {
  const int64_t packs = a.columns() / VEC;
  for (int64_t k = first_element(); k < a.rows() * packs; k += grid_threads()) {
    const int64_t row = k / packs, j = k % packs * VEC;
    float d[VEC], g[VEC], c[VEC];
    load_gradient<T, VEC, PLANES>(a, row, j, d, g);
    if (a.grad_residual) store<VEC>(static_cast<T*>(a.grad_residual) + row * a.columns() + j, g);
    if (!a.grad_input) continue;
    load_coefficient<VEC, PLANES>(a.coefficients, a, ChannelCoefficients::by_gradient, row, j, c);
    for (int i = 0; i < VEC; ++i) g[i] *= c[i];
    load_coefficient<VEC, PLANES>(a.coefficients, a, ChannelCoefficients::by_deviation, row, j, c);
    for (int i = 0; i < VEC; ++i) g[i] += d[i] * c[i];
    load_coefficient<VEC, PLANES>(a.coefficients, a, ChannelCoefficients::constant, row, j, c);
    for (int i = 0; i < VEC; ++i) g[i] += c[i];
    store<VEC>(static_cast<T*>(a.grad_input) + row * a.columns() + j, g);
  }
}

// One pass over d = x - c for a c near the mean, the mean of the plane's first few elements: mean = c + sum(d) / n,
// squares = sum(d^2) - sum(d)^2 / n.
template <class T, int VEC, bool WARP>
__global__ void __launch_bounds__(block_threads) plane_moments_kernel(ChannelMoments a) {
  using Planeteam = Team<WARP>;
  for (int64_t plane = Planeteam::first(); plane < a.rows(); plane += Planeteam::count()) {
    const T* input = at<T>(a.input, plane, a.size);
    const int64_t few = a.size < 8 ? a.size : 8;
    float center = 0, first = 0, second = 0, x[VEC];
    for (int64_t j = 0; j < few; ++j) center += to_float(input[j]) / float(few);
    for (int64_t j = Planeteam::rank() * VEC; j < a.size; j += Planeteam::size * VEC) {
      load<VEC>(input + j, x);
      for (int i = 0; i < VEC; ++i) {
        const float d = x[i] - center;
        first += d;
        second += d * d;
      }
    }
    first = Planeteam::sum(first);
    second = Planeteam::sum(second) - first * (first / float(a.size));
    if (Planeteam::rank() != 0) continue;
    static_cast<float*>(a.first)[plane] = center + first / float(a.size);
    static_cast<float*>(a.second)[plane] = second < 0 ? 0 : second;
  }
}

template <class T, int VEC, bool WARP>
__global__ void __launch_bounds__(block_threads) plane_sums_kernel(ChannelSums a) {
  using Planeteam = Team<WARP>;
  for (int64_t plane = Planeteam::first(); plane < a.rows(); plane += Planeteam::count()) {
    float first = 0, second = 0, d[VEC], g[VEC];
    for (int64_t j = Planeteam::rank() * VEC; j < a.size; j += Planeteam::size * VEC) {
      load_gradient<T, VEC, true>(a, plane, j, d, g);
      for (int i = 0; i < VEC; ++i) {
        first += g[i];
        second += g[i] * d[i];
      }
    }
    first = Planeteam::sum(first);
    second = Planeteam::sum(second);
    if (Planeteam::rank() != 0) continue;
    static_cast<float*>(a.first)[plane] = first;
    static_cast<float*>(a.second)[plane] = second;
  }
}

// This thread's part of the CUDA block's piece of rows and strip of columns.
template <int VEC>
struct Lines {
  int64_t piece, sample_row, begin, end;  // rows of the sample
  int lanes, line, lines;
  int64_t j;  // this thread's first column; beyond the last column for a thread without columns

  __device__ __forceinline__ Lines(const ChannelReduction& a, int64_t strips, int lanes_) : lanes(lanes_) {
    piece = blockIdx.x / strips;
    sample_row = piece / a.pieces * a.size;
    begin = a.piece_begin(piece);
    end = a.piece_end(piece);
    line = threadIdx.x / lanes;
    lines = block_threads / lanes;
    j = (blockIdx.x % strips * lanes + threadIdx.x % lanes) * VEC;
    if (line >= lines) j = a.channels;
  }

  // Adds the sums of all lines to those of line 0. Every thread of the CUDA block must call this.
  __device__ __forceinline__ void add_up(float* first, float* second) const {
    __shared__ float sums[2][block_threads * VEC];
    for (int i = 0; i < VEC; ++i) {
      sums[0][threadIdx.x * VEC + i] = first[i];
      sums[1][threadIdx.x * VEC + i] = second[i];
    }
    __syncthreads();
    if (line != 0) return;
    for (int other = 1; other < lines; ++other)
      for (int i = 0; i < VEC; ++i) {
        first[i] += sums[0][(other * lanes + threadIdx.x) * VEC + i];
        second[i] += sums[1][(other * lanes + threadIdx.x) * VEC + i];
      }
  }
};

// The same as plane_moments_kernel, for each column of the piece.
template <class T, int VEC>
__global__ void __launch_bounds__(block_threads) row_moments_kernel(ChannelMoments a, int64_t strips, int lanes) {
  const Lines<VEC> part(a, strips, lanes);
  const int64_t j = part.j;
  const float count = float(part.end - part.begin);
  float center[VEC] = {}, first[VEC] = {}, second[VEC] = {}, x[VEC];
  if (j < a.channels) {
    const T* input = at<T>(a.input, part.sample_row, a.channels) + j;
    const int64_t few = part.end - part.begin < 8 ? part.end - part.begin : 8;
    for (int64_t row = part.begin; row < part.begin + few; ++row) {
      load<VEC>(input + row * a.channels, x);
      for (int i = 0; i < VEC; ++i) center[i] += x[i] / float(few);
    }
    for (int64_t row = part.begin + part.line; row < part.end; row += part.lines) {
      load<VEC>(input + row * a.channels, x);
      for (int i = 0; i < VEC; ++i) {
        const float d = x[i] - center[i];
        first[i] += d;
        second[i] += d * d;
      }
    }
  }
  part.add_up(first, second);
  if (part.line != 0 || j >= a.channels) return;
  for (int i = 0; i < VEC; ++i) {
    second[i] -= first[i] * (first[i] / count);
    if (second[i] < 0) second[i] = 0;
    center[i] += first[i] / count;
  }
  store<VEC>(static_cast<float*>(a.first) + part.piece * a.channels + j, center);
  store<VEC>(static_cast<float*>(a.second) + part.piece * a.channels + j, second);
}

template <class T, int VEC>
__global__ void __launch_bounds__(block_threads) row_sums_kernel(ChannelSums a, int64_t strips, int lanes) {
  const Lines<VEC> part(a, strips, lanes);
  const int64_t j = part.j;
  float first[VEC] = {}, second[VEC] = {}, d[VEC], g[VEC];
  if (j < a.channels)
    for (int64_t row = part.begin + part.line; row < part.end; row += part.lines) {
      load_gradient<T, VEC, false>(a, part.sample_row + row, j, d, g);
      for (int i = 0; i < VEC; ++i) {
        first[i] += g[i];
        second[i] += g[i] * d[i];
      }
    }
  part.add_up(first, second);
  if (part.line != 0 || j >= a.channels) return;
  store<VEC>(static_cast<float*>(a.first) + part.piece * a.channels + j, first);
  store<VEC>(static_cast<float*>(a.second) + part.piece * a.channels + j, second);
}

}  // namespace ckpt
