// Chunks: columns of a row that are processed together, few enough to stay in the first-level cache.
#pragma once

#include "target.h"
#include "vec.h"

namespace ckpt::CKPT_ISA {

// A multiple of every vector width, and of the four columns that one draw of Philox serves.
constexpr int64_t chunk_columns = 512;

// Rows of at most this many columns are processed in tiles, which then stay in the first-level cache.
constexpr int64_t tile_columns = 1024;

template <class S>
struct Chunk {
  alignas(64) S value[chunk_columns];
};

// n rounded up to whole vectors.
template <class S>
CKPT_INLINE int64_t whole_vectors(int64_t n) {
  return (n + Vec<S>::width - 1) / Vec<S>::width * Vec<S>::width;
}

}  // namespace ckpt::CKPT_ISA
