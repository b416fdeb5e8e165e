// Loops over the rows of a dense matrix, in tiles, for the channel norms.
#pragma once

#include "target.h"

namespace ckpt::CKPT_ISA {

template <class T>
CKPT_INLINE const T* row_at(const void* matrix, int64_t row, int64_t columns) {
  return matrix ? static_cast<const T*>(matrix) + row * columns : nullptr;
}

// Calls body(row, count) for all rows from begin to end: for tiles of tile_rows rows, then for single rows. count.value
// is the number of rows, known when the body is compiled.
template <int count>
struct Count {
  static constexpr int value = count;
};
template <class Body>
CKPT_INLINE void for_row_tiles(int64_t begin, int64_t end, Body body) {
  int64_t row = begin;
  for (; row + tile_rows <= end; row += tile_rows) body(row, Count<tile_rows>{});
  for (; row < end; ++row) body(row, Count<1>{});
}

}  // namespace ckpt::CKPT_ISA
