// Loads and stores pairs of elements, which lie in two runs of memory, or interleaved in one run: f0 s0 f1 s1 ... From
// an interleaved run two vectors are read and deinterleaved.
#pragma once

#include "target.h"
#include "vec.h"
#include "vec_memory.h"

namespace ckpt::CKPT_ISA {

template <class S>
struct Pairs {
  Vec<S> first, second;
};

template <class S>
CKPT_INLINE Pairs<S> deinterleave(Vec<S> low, Vec<S> high) {
  return {shuffle<Evens>(low.v, high.v), shuffle<Odds>(low.v, high.v)};
}

// The first and the second elements of pairs.
template <class S>
CKPT_INLINE Pairs<S> interleave(Pairs<S> pairs) {
  return {shuffle<InterleaveLow>(pairs.first.v, pairs.second.v),
          shuffle<InterleaveHigh>(pairs.first.v, pairs.second.v)};
}

// Loads from pair j on. For interleaved pairs `second` is first + 1 and is not read.
template <bool interleaved, class S, class T>
CKPT_INLINE Pairs<S> load_pairs(const T* first, const T* second, int64_t j, Full<S> all) {
  if (!interleaved) return {load(first + j, all), load(second + j, all)};
  return deinterleave(load(first + 2 * j, all), load(first + 2 * j + Vec<S>::width, all));
}
template <bool interleaved, class S, class T>
CKPT_INLINE Pairs<S> load_pairs(const T* first, const T* second, int64_t j, Partial<S> lanes) {
  if (!interleaved) return {load(first + j, lanes), load(second + j, lanes)};
  T padded[2 * Vec<S>::width] = {};
  for (int64_t i = 0; i < 2 * lanes.count; ++i) padded[i] = first[2 * j + i];
  return load_pairs<true, S>(padded, padded + 1, 0, Full<S>{});
}

// Stores from pair j on. For pairs in two runs either pointer may be null.
template <bool interleaved, class S, class T, class Lanes>
CKPT_INLINE void store_pairs(T* first, T* second, int64_t j, Pairs<S> pairs, Lanes lanes) {
  if (!interleaved) {
    if (first) store(first + j, pairs.first, lanes);
    if (second) store(second + j, pairs.second, lanes);
    return;
  }
  T mixed[2 * Vec<S>::width];
  pairs = interleave(pairs);
  store(mixed, pairs.first, Full<S>{});
  store(mixed + Vec<S>::width, pairs.second, Full<S>{});
  __builtin_memcpy(first + 2 * j, mixed, 2 * lanes.size() * sizeof(T));
}

}  // namespace ckpt::CKPT_ISA
