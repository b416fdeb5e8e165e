// Rows that are read once: each thread of a team keeps a part of the row in registers, in packs of eight elements.
//
// The size of a team is a power of two, chosen at run time by the number of columns, so that one kernel serves all
// widths: a few lanes of a warp for a short row, a whole CUDA block for a long row. All loads of a row are requested
// before the first value is used. Threads beyond the last column or the last row take part in sums with zeros.
#pragma once

#include "elements.cuh"

namespace ckpt {

constexpr int pack_size = 8, least_team = 8, most_team = 1024;

// The least team that holds a row, with this number of packs a thread.
inline int team_for(int64_t columns, int packs) {
  int threads = least_team;
  while (threads * packs * pack_size < columns) threads *= 2;
  return threads;
}

// The threads of a CUDA block for teams of this size.
inline int block_for(int team_threads) { return team_threads < block_threads ? block_threads : team_threads; }

class HeldTeam {
 public:
  const int threads, rank;  // of the team
  const int index, count;   // of the team in its CUDA block

  __device__ __forceinline__ explicit HeldTeam(int team_threads)
      : threads(team_threads),
        rank(threadIdx.x & (team_threads - 1)),
        index(threadIdx.x / team_threads),
        count(blockDim.x / team_threads) {}

  // The first column of this thread's k-th pack.
  __device__ __forceinline__ int column(int k) const { return (k * threads + rank) * pack_size; }

  // Sums over the team, of K numbers at once. Every thread of the CUDA block must call this.
  template <int K>
  __device__ __forceinline__ void sum(float (&x)[K]) {
    add_lanes(x, threads);
    if (threads <= warp_threads) return;
    // Two buffers take turns: a barrier lies between reading one and writing it again.
    __shared__ float partial[2][K][most_team / warp_threads];
    const int lane = threadIdx.x % warp_threads, warps = threads / warp_threads;
    if (lane == 0)
      for (int k = 0; k < K; ++k) partial[turn_][k][threadIdx.x / warp_threads] = x[k];
    __syncthreads();
    for (int k = 0; k < K; ++k) x[k] = partial[turn_][k][index * warps + (lane & (warps - 1))];
    turn_ ^= 1;
    add_lanes(x, warps);
  }

 private:
  // Sums over groups of `lanes` neighbours; a group does not reach beyond the warp.
  template <int K>
  __device__ __forceinline__ static void add_lanes(float (&x)[K], int lanes) {
#pragma unroll
    for (int lane = warp_threads / 2; lane > 0; lane /= 2)
      if (lane < lanes)
        for (int k = 0; k < K; ++k) x[k] += __shfl_xor_sync(0xffffffffu, x[k], lane);
  }

  int turn_ = 0;
};

// Row numbers are of 32 bits, with room for the rows beyond the last of the teams of a CUDA block.
constexpr int64_t most_held_rows = (int64_t(1) << 31) - most_team;

// Row `index` of a matrix.
template <class T>
__device__ __forceinline__ T* row_of(const Rows& rows, int index) {
  int64_t offset = index;
  if (rows.inner == 0) {
    offset *= rows.stride;
  } else {
    const uint32_t inner = uint32_t(rows.inner), middle = uint32_t(rows.middle);
    const uint32_t above = uint32_t(index) / inner, outer = above / middle;
    offset = outer * rows.stride + (above - outer * middle) * rows.middle_stride +
             (uint32_t(index) - above * inner) * rows.inner_stride;
  }
  return static_cast<T*>(rows.data) + offset;
}

// A pack as it lies in memory. Whole words: a compiler would hold 16-bit elements in one register each.
template <class T>
struct Words {
  uint32_t word[pack_size * sizeof(T) / 4];
};

template <class T>
__device__ __forceinline__ Words<T> load_words(const T* p) {
  using Packed = Pack<uint32_t, 4>;
  CKPT_CHECK_ALIGNMENT(Packed, p);
  Words<T> words;
  for (int i = 0; i < int(sizeof(words)); i += 16) {
    const Packed part = *reinterpret_cast<const Packed*>(reinterpret_cast<const char*>(p) + i);
    for (int k = 0; k < 4; ++k) words.word[i / 4 + k] = part.value[k];
  }
  return words;
}

// N values from the k-th on.
template <int N, class T>
__device__ __forceinline__ void unpack(const Words<T>& words, int k, float* v) {
  constexpr int many = 4 / sizeof(T);
#pragma unroll
  for (int i = 0; i < N; i += 2) {
    T pair[2];
    for (int part = 0; part < 2; part += many) memcpy(pair + part, &words.word[(k + i + part) / many], 4);
    to_floats(pair, v + i);
  }
}
template <class T>
__device__ __forceinline__ void unpack(const Words<T>& words, float* v) {
  unpack<pack_size>(words, 0, v);
}

// This thread's part of a row.
template <class T, int packs>
struct HeldRow {
  Words<T> pack[packs];

  // Requests the part; columns from `columns` on are zeros.
  __device__ __forceinline__ void request(const HeldTeam& team, const T* row, int columns) {
#pragma unroll
    for (int k = 0; k < packs; ++k) pack[k] = team.column(k) < columns ? load_words(row + team.column(k)) : Words<T>{};
  }
  // N of this thread's values from the k-th on.
  template <int N>
  __device__ __forceinline__ void unpack(int k, float* v) const {
    ckpt::unpack<N>(pack[k / pack_size], k % pack_size, v);
  }
};

// N columns of a row of coefficients, which are `absent` without the row.
template <int N>
__device__ __forceinline__ void load_coefficients(const float* row, int j, int columns, float absent, float* v) {
  for (int i = 0; i < N; ++i) v[i] = absent;
  if (row && j < columns) load<N>(row + j, v);
}

}  // namespace ckpt
