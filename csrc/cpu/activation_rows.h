// Activations and their derivatives, of a vector and of a chunk of staged values.
#pragma once

#include "../math/activations.h"
#include "chunk.h"
#include "target.h"
#include "vec.h"
#include "vec_loops.h"
#include "vec_math.h"
#include "vec_memory.h"

namespace ckpt::CKPT_ISA {

// For a 16-bit storage type T the shorter functions of a rough vector are accurate enough.
template <class T, class S, class Function>
CKPT_INLINE Vec<S> value_of(Function function, Vec<S> z) {
  return Vec<S>(function.value(Vec<S, sizeof(T) == 2>(z.v)).v);
}
template <class T, class S, class Function>
CKPT_INLINE Vec<S> derivative_of(Function function, Vec<S> z) {
  return Vec<S>(function.derivative(Vec<S, sizeof(T) == 2>(z.v)).v);
}

// In place, for the n columns of a row in a chunk: the switch over activations runs once a chunk instead of once an
// element. The chunk is computed up to a whole vector; elements beyond n are never read.
template <class T, class S>
__attribute__((noinline)) void activate(int activation, S* z, int64_t n) {
  visit_activation(activation, [=](auto function) {
    step<S>(whole_vectors<S>(n),
            [=](int64_t j, auto lanes) { store(z + j, value_of<T>(function, load(z + j, lanes)), lanes); });
  });
}

template <class T, class S>
__attribute__((noinline)) void differentiate(int activation, S* z, int64_t n) {
  visit_activation(activation, [=](auto function) {
    step<S>(whole_vectors<S>(n),
            [=](int64_t j, auto lanes) { store(z + j, derivative_of<T>(function, load(z + j, lanes)), lanes); });
  });
}

}  // namespace ckpt::CKPT_ISA
