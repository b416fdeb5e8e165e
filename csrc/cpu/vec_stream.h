// Streamed (non-temporal) stores, which bypass the caches. A large result is evicted from the caches before the next
// read, and an ordinary store would first read the overwritten line into the cache.
#pragma once

#include "../rows.h"
#include "target.h"
#include "vec.h"
#include "vec_memory.h"

namespace ckpt::CKPT_ISA {

// The address must be aligned to the vector's bytes in memory.
template <class T, class S>
CKPT_INLINE void stream(T* p, Vec<S> a, Full<S>) {
  auto raw = encode(p, a);
#if CKPT_VECTOR_BYTES == 64
  if constexpr (sizeof(raw) == 64) return _mm512_stream_si512((__m512i*)p, (__m512i)raw);
#endif
#if CKPT_VECTOR_BYTES >= 32
  if constexpr (sizeof(raw) == 32) return _mm256_stream_si256((__m256i*)p, (__m256i)raw);
  if constexpr (sizeof(raw) == 16) return _mm_stream_si128((__m128i*)p, (__m128i)raw);
#endif
  __builtin_memcpy(p, &raw, sizeof(raw));
}
template <class S, class T>
CKPT_INLINE void stream(T* p, Vec<S> a, Partial<S> lanes) {
  store(p, a, lanes);
}

// Other threads may see streamed stores out of order; after this call they see all streamed stores of this thread.
// Every loop with streamed stores calls this function at the end.
CKPT_INLINE void end_streams() {
#if CKPT_VECTOR_BYTES >= 32
  _mm_sfence();
#endif
}

// One row of an output: stores are streamed if the matrix is large and the row is aligned.
template <class T>
struct Written {
  T* row;
  bool streams;

  static constexpr int64_t stream_bytes = 16 << 20;
  CKPT_INLINE Written(const Rows& rows, int64_t index, int64_t count, int64_t columns)
      : Written(rows.row<T>(index), count, columns) {}
  CKPT_INLINE Written(T* row_, int64_t count, int64_t columns)
      : row(row_),
        streams(count * columns * int64_t(sizeof(T)) >= stream_bytes && reinterpret_cast<uintptr_t>(row) % 64 == 0) {}
  template <class S, class Lanes>
  CKPT_INLINE void put(int64_t column, Vec<S> a, Lanes lanes) const {
    if (streams)
      stream(row + column, a, lanes);
    else
      store(row + column, a, lanes);
  }
};

}  // namespace ckpt::CKPT_ISA
