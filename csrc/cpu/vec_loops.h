// Loops over the elements of a row, a vector at a time, and sums over them.
#pragma once

#include "target.h"
#include "vec.h"
#include "vec_memory.h"

namespace ckpt::CKPT_ISA {

// Calls body(offset, lanes) for each vector of n elements: full ones, then one partial vector for the rest.
template <class S, class Body>
CKPT_INLINE void step(int64_t n, Body body) {
  int64_t j = 0;
  for (; j + Vec<S>::width <= n; j += Vec<S>::width) body(j, Full<S>{});
  if (j < n) body(j, Partial<S>{n - j});
}

// The same, four vectors at a time, with one more argument: `slot`, the compile-time index 0 to 3 of the vector among
// the four. With a partial sum for each slot (Accumulator), consecutive additions are independent.
template <int k>
struct Slot {
  static constexpr int index = k;
};
template <class S, class Body>
CKPT_INLINE void sweep(int64_t n, Body body) {
  constexpr int W = Vec<S>::width;
  int64_t j = 0;
  for (; j + 4 * W <= n; j += 4 * W) {
    body(j, Full<S>{}, Slot<0>{});
    body(j + W, Full<S>{}, Slot<1>{});
    body(j + 2 * W, Full<S>{}, Slot<2>{});
    body(j + 3 * W, Full<S>{}, Slot<3>{});
  }
  for (; j + W <= n; j += W) body(j, Full<S>{}, Slot<0>{});
  if (j < n) body(j, Partial<S>{n - j}, Slot<0>{});
}

// Prefetches the next row's elements at p during a sweep over the present row, each cache line once.
template <class T, int k>
CKPT_INLINE void prefetch_lines(const T* p, Slot<k>) {
  if (k * Vec<typename ComputeType<T>::type>::width * sizeof(T) % 64 == 0) prefetch(p);
}

// Calls body(value, lanes, slot) with all n elements at p, in any order.
template <class S, class T, class Body>
CKPT_INLINE void sweep_values(const T* p, int64_t n, Body body) {
  constexpr int W = Vec<S>::width;
  int64_t j = 0;
  for (; j + 4 * W <= n; j += 4 * W) {
    Vec<S> value[4];
    load_pair(p + j, &value[0], &value[1]);
    load_pair(p + j + 2 * W, &value[2], &value[3]);
    body(value[0], Full<S>{}, Slot<0>{});
    body(value[1], Full<S>{}, Slot<1>{});
    body(value[2], Full<S>{}, Slot<2>{});
    body(value[3], Full<S>{}, Slot<3>{});
  }
  for (; j + W <= n; j += W) body(load(p + j, Full<S>{}), Full<S>{}, Slot<0>{});
  if (j < n) body(load(p + j, Partial<S>{n - j}), Partial<S>{n - j}, Slot<0>{});
}

// A sum in four parts, one for each slot.
template <class S>
struct Accumulator {
  Vec<S> part[4];

  // Explicit, because a constructor that the compiler generates is not built for the instruction set.
  CKPT_INLINE Accumulator() {
    for (int i = 0; i < 4; ++i) part[i] = Vec<S>(0.0);
  }
  CKPT_INLINE S total() const { return sum_lanes((part[0] + part[1]) + (part[2] + part[3])); }
};

}  // namespace ckpt::CKPT_ISA
