// Transposes matrices, for operands whose rows are not contiguous.
#pragma once

#include "target.h"
#include "vec.h"
#include "vec_loops.h"
#include "vec_memory.h"

namespace ckpt::CKPT_ISA {

template <int... i, class Body>
CKPT_INLINE void for_each(std::integer_sequence<int, i...>, Body body) {
  (body(i), ...);
}
template <int count>
constexpr std::make_integer_sequence<int, count> indices{};

// Transposes a square of vectors in log2(width) equal steps. Each step interleaves vector i with vector i + width / 2,
// which moves the highest bit of an element's vector number below the lowest bit of its lane.
template <class S, int steps = Vec<S>::width>
CKPT_INLINE void transpose_square(Vec<S>* square) {
  constexpr int half = Vec<S>::width / 2;
  if constexpr (steps > 1) {
    Vec<S> mixed[2 * half];
    for_each(indices<half>, [&](int i) CKPT_INLINE_BODY {
      mixed[2 * i] = shuffle<InterleaveLow>(square[i].v, square[half + i].v);
      mixed[2 * i + 1] = shuffle<InterleaveHigh>(square[i].v, square[half + i].v);
    });
    for_each(indices<2 * half>, [&](int i) CKPT_INLINE_BODY { square[i] = mixed[i]; });
    transpose_square<S, steps / 2>(square);
  }
}

// target[j * target_stride + i] = source[i * source_stride + j] for all rows i and columns j of the source.
template <class S, class T>
void transpose(const void* source_data, int64_t source_stride, int64_t rows, int64_t columns, void* target_data,
               int64_t target_stride) {
  constexpr int W = Vec<S>::width;
  step<S>(rows, [=](int64_t i0, auto valid_rows) {
    const T* source = static_cast<const T*>(source_data) + i0 * source_stride;
    T* target = static_cast<T*>(target_data) + i0;
    step<S>(columns, [=](int64_t j0, auto valid_columns) CKPT_INLINE_BODY {
      Vec<S> square[W];
      for_each(indices<W>, [&](int i) CKPT_INLINE_BODY {
        square[i] = i < valid_rows.size() ? load(source + i * source_stride + j0, valid_columns) : Vec<S>(0.0);
      });
      transpose_square<S>(square);
      for_each(indices<W>, [&](int j) CKPT_INLINE_BODY {
        if (j < valid_columns.size()) store(target + (j0 + j) * target_stride, square[j], valid_rows);
      });
    });
  });
}

template <class T>
constexpr TransposeLoops transpose_loops_for() {
  return {transpose<typename ComputeType<T>::type, T>};
}
CKPT_DEFINE_LOOPS(TransposeLoops, transpose_loops)

}  // namespace ckpt::CKPT_ISA
