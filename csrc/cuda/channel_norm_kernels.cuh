// The channel-norm kernels for CUDA, and how they are launched; see elements.cuh for what `launch` and VEC are.
//
// Planes are summed over by a team each. Where channels are last, a block takes a piece of rows and a strip of columns:
// its threads are lines of `lanes` threads, each thread with VEC columns of its own in every so many rows, and the
// lines' sums are added up in their order.
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
  load_coefficient<VEC, PLANES>(a.coefficients, a, 0, row, j, c);
  for (int i = 0; i < VEC; ++i) d[i] -= c[i];
  load_coefficient<VEC, PLANES>(a.coefficients, a, 1, row, j, c);
  for (int i = 0; i < VEC; ++i) z[i] = d[i] * c[i];
  load_coefficient<VEC, PLANES>(a.coefficients, a, 2, row, j, c);
  for (int i = 0; i < VEC; ++i) z[i] += c[i];
  if (!a.other) return;
  load<VEC>(at<T>(a.other, row, a.columns()) + j, c);
  for (int i = 0; i < VEC; ++i) z[i] += c[i];
}

// x - mean, and g = grad_output * activation'(z).
template <class T, int VEC, bool PLANES, class Block>
__device__ __forceinline__ void load_gradient(const Block& a, int64_t row, int64_t j, float* d, float* g) {
  float z[VEC];
  if (a.by_output) {
    load<VEC>(at<T>(a.input, row, a.columns()) + j, d);
    load_coefficient<VEC, PLANES>(a.coefficients, a, 0, row, j, z);
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
    load_coefficient<VEC, PLANES>(a.coefficients, a, 3, row, j, c);
    for (int i = 0; i < VEC; ++i) g[i] *= c[i];
    load_coefficient<VEC, PLANES>(a.coefficients, a, 4, row, j, c);
    for (int i = 0; i < VEC; ++i) g[i] += d[i] * c[i];
    load_coefficient<VEC, PLANES>(a.coefficients, a, 5, row, j, c);
    for (int i = 0; i < VEC; ++i) g[i] += c[i];
    store<VEC>(static_cast<T*>(a.grad_input) + row * a.columns() + j, g);
  }
}

// About the mean of the plane's first few elements.
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

// How a block shares out a piece of rows and a strip of columns.
template <int VEC>
struct Lines {
  int64_t piece, sample_row, begin, end;  // rows of the sample
  int lanes, line, lines;
  int64_t j;  // this thread's columns; beyond them all for a thread that has none

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

  // Adds up two sums over the lines, in the first of them. Every thread of the block must call it.
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

// About the mean of a column's first few elements in the piece.
template <class T, int VEC>
__global__ void __launch_bounds__(block_threads) row_moments_kernel(ChannelMoments a, int64_t strips, int lanes) {
  const Lines<VEC> at_work(a, strips, lanes);
  const int64_t j = at_work.j;
  const float count = float(at_work.end - at_work.begin);
  float center[VEC] = {}, first[VEC] = {}, second[VEC] = {}, x[VEC];
  if (j < a.channels) {
    const T* input = at<T>(a.input, at_work.sample_row, a.channels) + j;
    const int64_t few = at_work.end - at_work.begin < 8 ? at_work.end - at_work.begin : 8;
    for (int64_t row = at_work.begin; row < at_work.begin + few; ++row) {
      load<VEC>(input + row * a.channels, x);
      for (int i = 0; i < VEC; ++i) center[i] += x[i] / float(few);
    }
    for (int64_t row = at_work.begin + at_work.line; row < at_work.end; row += at_work.lines) {
      load<VEC>(input + row * a.channels, x);
      for (int i = 0; i < VEC; ++i) {
        const float d = x[i] - center[i];
        first[i] += d;
        second[i] += d * d;
      }
    }
  }
  at_work.add_up(first, second);
  if (at_work.line != 0 || j >= a.channels) return;
  for (int i = 0; i < VEC; ++i) {
    second[i] -= first[i] * (first[i] / count);
    if (second[i] < 0) second[i] = 0;
    center[i] += first[i] / count;
  }
  store<VEC>(static_cast<float*>(a.first) + at_work.piece * a.channels + j, center);
  store<VEC>(static_cast<float*>(a.second) + at_work.piece * a.channels + j, second);
}

template <class T, int VEC>
__global__ void __launch_bounds__(block_threads) row_sums_kernel(ChannelSums a, int64_t strips, int lanes) {
  const Lines<VEC> at_work(a, strips, lanes);
  const int64_t j = at_work.j;
  float first[VEC] = {}, second[VEC] = {}, d[VEC], g[VEC];
  if (j < a.channels)
    for (int64_t row = at_work.begin + at_work.line; row < at_work.end; row += at_work.lines) {
      load_gradient<T, VEC, false>(a, at_work.sample_row + row, j, d, g);
      for (int i = 0; i < VEC; ++i) {
        first[i] += g[i];
        second[i] += g[i] * d[i];
      }
    }
  at_work.add_up(first, second);
  if (at_work.line != 0 || j >= a.channels) return;
  store<VEC>(static_cast<float*>(a.first) + at_work.piece * a.channels + j, first);
  store<VEC>(static_cast<float*>(a.second) + at_work.piece * a.channels + j, second);
}

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
