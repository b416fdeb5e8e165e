// Teams: the threads that share a row, a warp for short rows, a CUDA block for long rows.
#pragma once

#include "../math/moments.h"
#include "elements.cuh"

namespace ckpt {

// A warp processes rows of up to this many columns, so that eight rows share a block.
constexpr int64_t warp_columns = 1024;

// The team processes rows first() + k * count(); a thread of the team has number rank() of size.
template <bool WARP>
struct Team {
  static constexpr int size = WARP ? warp_threads : block_threads;

  __device__ __forceinline__ static int rank() { return threadIdx.x % size; }
  __device__ __forceinline__ static int64_t first() {
    return int64_t(blockIdx.x) * (block_threads / size) + threadIdx.x / size;
  }
  __device__ __forceinline__ static int64_t count() { return int64_t(gridDim.x) * (block_threads / size); }

  __device__ __forceinline__ static float sum(float x) {
    for (int lane = warp_threads / 2; lane > 0; lane /= 2) x += __shfl_xor_sync(0xffffffffu, x, lane);
    if (WARP) return x;
    __shared__ float partial[block_warps];
    if (threadIdx.x % warp_threads == 0) partial[threadIdx.x / warp_threads] = x;
    __syncthreads();
    float total = 0;
    for (int warp = 0; warp < block_warps; ++warp) total += partial[warp];
    // The next sum overwrites the partial sums.
    __syncthreads();
    return total;
  }

  __device__ __forceinline__ static Moments merge(Moments m) {
    for (int lane = warp_threads / 2; lane > 0; lane /= 2) {
      Moments other;
      other.count = __shfl_xor_sync(0xffffffffu, m.count, lane);
      other.mean = __shfl_xor_sync(0xffffffffu, m.mean, lane);
      other.squares = __shfl_xor_sync(0xffffffffu, m.squares, lane);
      // Both lanes of a pair merge in the same order, so that all lanes end with the same bits.
      if (threadIdx.x & lane) {
        other.merge(m);
        m = other;
      } else {
        m.merge(other);
      }
    }
    if (WARP) return m;
    __shared__ Moments partial[block_warps];
    if (threadIdx.x % warp_threads == 0) partial[threadIdx.x / warp_threads] = m;
    __syncthreads();
    Moments total = partial[0];
    for (int warp = 1; warp < block_warps; ++warp) total.merge(partial[warp]);
    __syncthreads();
    return total;
  }
};

// CUDA blocks for a loop in which each team takes every count()-th row.
inline int64_t blocks_for_rows(int64_t rows, bool warp) {
  const int64_t blocks = warp ? divide_up(rows, block_warps) : rows;
  return blocks < most_blocks ? blocks : most_blocks;
}

}  // namespace ckpt
