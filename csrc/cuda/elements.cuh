// The inlined functions that all CUDA kernels share: accesses of several elements, activations, dropout, sums over
// rows.
//
// T is the storage type. A thread reads and writes VEC elements at a time: 16 bytes if alignment allows, otherwise one
// element. The activation is a run-time switch without divergence; a kernel for each activation would multiply the
// compile time. `launch(kernel, grid, arguments...)` launches a kernel: CUDA's own launch in the library
// (launcher.cuh), a loop over blocks in the tests, which compile these files with the host compiler and
// tests/host/cuda_on_host.h.
//
// "Block" in `blocks` and `block_threads` is CUDA's: a block of threads.
#pragma once

#include "../math/activations.h"
#include "../math/dropout.h"
#include "../math/philox.h"
#include "../math/storage.h"
#include "../rows.h"

#ifndef CKPT_CHECK_ALIGNMENT
#define CKPT_CHECK_ALIGNMENT(Pack, p)
#endif
#ifndef CKPT_MOST_BLOCKS
#define CKPT_MOST_BLOCKS (1 << 16)
#endif

namespace ckpt {

constexpr int warp_threads = 32;
constexpr int block_threads = 256;
constexpr int block_warps = block_threads / warp_threads;

// A grid-stride loop: thread k takes the elements k, k + grid_threads(), ...
__device__ __forceinline__ int64_t first_element() { return int64_t(blockIdx.x) * block_threads + threadIdx.x; }
__device__ __forceinline__ int64_t grid_threads() { return int64_t(gridDim.x) * block_threads; }

template <class T, int VEC>
struct alignas(sizeof(T) * VEC < 16 ? sizeof(T) * VEC : 16) Pack {
  T value[VEC];
};

template <int VEC, class T>
__device__ __forceinline__ Pack<T, VEC> load_pack(const T* p) {
  using Packed = Pack<T, VEC>;
  CKPT_CHECK_ALIGNMENT(Packed, p);
  return *reinterpret_cast<const Packed*>(p);
}

// Values of 16 bits are converted in pairs, which share a register.
template <class T, int VEC>
__device__ __forceinline__ void unpack(const Pack<T, VEC>& pack, float* v) {
#pragma unroll
  for (int i = 0; i + 1 < VEC; i += 2) to_floats(pack.value + i, v + i);
  if (VEC == 1) v[0] = to_float(pack.value[0]);
}

template <class T, int VEC>
__device__ __forceinline__ Pack<T, VEC> packed(const float* v) {
  Pack<T, VEC> pack;
#pragma unroll
  for (int i = 0; i + 1 < VEC; i += 2) from_floats(v + i, pack.value + i);
  if (VEC == 1) from_float(v[0], &pack.value[0]);
  return pack;
}

template <class T, int VEC>
__device__ __forceinline__ void store_pack(T* p, const Pack<T, VEC>& pack) {
  using Packed = Pack<T, VEC>;
  CKPT_CHECK_ALIGNMENT(Packed, p);
  *reinterpret_cast<Packed*>(p) = pack;
}

template <int VEC, class T>
__device__ __forceinline__ void load(const T* p, float* v) {
  unpack(load_pack<VEC>(p), v);
}

template <int VEC, class T>
__device__ __forceinline__ void store(T* p, const float* v) {
  store_pack(p, packed<T, VEC>(v));
}

template <int VEC>
__device__ __forceinline__ void activate(int activation, float* v) {
  visit_activation(activation, [v](auto function) {
#pragma unroll
    for (int i = 0; i < VEC; ++i) v[i] = function.value(v[i]);
  });
}

template <int VEC>
__device__ __forceinline__ void differentiate(int activation, float* v) {
  visit_activation(activation, [v](auto function) {
#pragma unroll
    for (int i = 0; i < VEC; ++i) v[i] = function.derivative(v[i]);
  });
}

// 0 or 1 / (1 - p) for VEC columns from column j.
template <int VEC>
__device__ __forceinline__ void dropout_factors(const Dropout& dropout, int64_t row, int64_t j, float* factor) {
  for (int quad = 0; quad < (VEC + 3) / 4; ++quad) {
    const PhiloxState<uint32_t> bits = philox4x32_10<uint32_t>(
        {{uint32_t(j / 4) + quad, uint32_t(row), uint32_t(row >> 32), 0}}, uint64_t(*dropout.seed));
    if (VEC == 1)
      factor[0] = dropout.factor<float>(bits.word[j % 4]);
    else
      for (int lane = 0; lane < 4; ++lane) factor[quad * 4 + lane] = dropout.factor<float>(bits.word[lane]);
  }
}

// Partial sums, (groups, group_tasks, columns), and the sums over the tasks of a group; `total` is null if these are
// not needed.
struct Sums {
  const float* partial;
  float* total;
};

// Adds up `first`, and by the second half of the grid `second`. A CUDA block has `warp_threads` columns of a group;
// each warp adds up every eighth task, with several loads in flight, and the sums of the warps are added in order.
static __global__ void __launch_bounds__(block_threads)
    add_up_kernel(Sums first, Sums second, int64_t group_tasks, int64_t columns, int64_t strips, int64_t blocks) {
  __shared__ float partial[block_warps][warp_threads];
  const Sums sums = blockIdx.x < blocks ? first : second;
  const int64_t block = blockIdx.x % blocks, group = block / strips;
  const int lane = threadIdx.x % warp_threads, warp = threadIdx.x / warp_threads;
  const int64_t column = block % strips * warp_threads + lane;
  float sum = 0;
  if (column < columns) {
    const float* rows = sums.partial + group * group_tasks * columns + column;
#pragma unroll 8
    for (int64_t task = warp; task < group_tasks; task += block_warps) sum += rows[task * columns];
  }
  partial[warp][lane] = sum;
  __syncthreads();
  if (warp > 0 || column >= columns) return;
  for (int other = 1; other < block_warps; ++other) sum += partial[other][lane];
  sums.total[group * columns + column] = sum;
}

// The size of a launch.
struct Grid {
  int64_t blocks;
  int threads;

  Grid(int64_t blocks, int threads = block_threads) : blocks(blocks), threads(threads) {}
};

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The largest grid of a grid-stride loop.
constexpr int64_t most_blocks = CKPT_MOST_BLOCKS;

// The number of blocks for a grid-stride loop over `items`, one a thread.
inline int64_t blocks_for(int64_t items) {
  const int64_t blocks = divide_up(items, block_threads);
  return blocks < most_blocks ? blocks : most_blocks;
}

inline bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

template <class T>
bool is_vectorizable(const Rows& rows) {
  return !rows || (is_aligned(rows.data) && rows.stride * sizeof(T) % 16 == 0 &&
                   rows.middle_stride * sizeof(T) % 16 == 0 && rows.inner_stride * sizeof(T) % 16 == 0);
}

// Divides the rows of each group into tasks, each with one row of partial sums.
struct PartialSums {
  int64_t groups, group_tasks, task_rows;

  PartialSums(int64_t rows, int64_t rows_per_group, int64_t most_tasks = 256, int64_t least_rows = 16) {
    groups = rows / rows_per_group;
    group_tasks = divide_up(rows_per_group, least_rows);
    if (group_tasks > most_tasks) group_tasks = most_tasks;
    task_rows = divide_up(rows_per_group, group_tasks);
    group_tasks = divide_up(rows_per_group, task_rows);
  }
  int64_t elements(int64_t columns) const { return groups * group_tasks * columns; }
};

template <class Launch>
void add_up(const PartialSums& shares, int64_t columns, Sums first, Sums second, const Launch& launch) {
  if (!first.total) first = second;
  if (!first.total) return;
  const bool both = second.total && second.total != first.total;
  const int64_t strips = divide_up(columns, warp_threads), blocks = shares.groups * strips;
  launch(add_up_kernel, blocks * (both ? 2 : 1), first, second, shares.group_tasks, columns, strips, blocks);
}

// Calls body(T{}) for the storage type; returns false for types other than the three that the CUDA kernels support.
template <class Body>
bool dispatch_storage(ScalarKind kind, Body body) {
  switch (kind) {
    case ScalarKind::float32:
      body(float{});
      return true;
    case ScalarKind::bfloat16:
      body(bfloat16{});
      return true;
    case ScalarKind::float16:
      body(float16{});
      return true;
    default:
      return false;
  }
}

}  // namespace ckpt
