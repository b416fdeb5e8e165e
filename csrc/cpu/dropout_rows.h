// Dropout factors for the columns of a row, drawn by Philox for several counters at a time.
#pragma once

#include "../math/dropout.h"
#include "../math/philox.h"
#include "target.h"
#include "vec.h"
#include "vec_memory.h"

namespace ckpt::CKPT_ISA {

// A vector of 32-bit counters for Philox (csrc/math/philox.h), one in the lower half of each 64-bit lane, as required
// by the instructions for wide products. The upper halves are arbitrary, so a wide product can serve as a vector of
// lower halves without a mask.
struct Counters {
  typedef uint64_t Type __attribute__((vector_size(CKPT_VECTOR_BYTES)));
  static constexpr int width = CKPT_VECTOR_BYTES / 8;
  static constexpr uint64_t lower = 0xffffffffu;
  Type v;

  CKPT_INLINE Counters() {}
  CKPT_INLINE Counters(Type raw) : v(raw) {}
  CKPT_INLINE explicit Counters(uint32_t scalar) : v(Type{} + scalar) {}
  CKPT_INLINE friend Counters operator^(Counters a, Counters b) { return a.v ^ b.v; }
  CKPT_INLINE friend Counters operator^(Counters a, uint32_t b) { return a.v ^ uint64_t(b); }
  CKPT_INLINE friend Counters upper_half(Counters product) { return product.v >> 32; }
  CKPT_INLINE friend Counters lower_half(Counters product) { return product; }
};
CKPT_INLINE Counters wide_product(Counters a, uint32_t b) {
#if CKPT_VECTOR_BYTES == 64
  return Counters::Type(_mm512_mul_epu32((__m512i)a.v, _mm512_set1_epi64(b)));
#elif CKPT_VECTOR_BYTES == 32
  return Counters::Type(_mm256_mul_epu32((__m256i)a.v, _mm256_set1_epi64x(b)));
#else
  return (a.v & Counters::lower) * uint64_t(b);
#endif
}

// Converts the draws of W counters to factors. Word k of a counter serves the k-th of four columns, so the words are
// interleaved: words 0 to 3 of the first counter, then words 0 to 3 of the second.
CKPT_INLINE void store_factors(const Dropout& dropout, const PhiloxState<Counters>& bits, float* factor) {
  constexpr int W = Counters::width;
  using V = Raw<float>::type;
  using B = Raw<float>::bits;
  using Pairs = Counters::Type;
  const V scale = V{} + float(dropout.scale), none{};
  const B threshold = B{} + uint32_t(dropout.threshold);
  Pairs first = (bits.word[0].v & Counters::lower) | bits.word[1].v << 32;
  Pairs last = (bits.word[2].v & Counters::lower) | bits.word[3].v << 32;
  const B early = B(shuffle<InterleaveLow>(first, last)), late = B(shuffle<InterleaveHigh>(first, last));
  store(factor, Vec<float>(early >= threshold ? scale : none), Full<float>{});
  store(factor + 2 * W, Vec<float>(late >= threshold ? scale : none), Full<float>{});
}
CKPT_INLINE void store_factors(const Dropout& dropout, const PhiloxState<Counters>& bits, double* factor) {
  for (int i = 0; i < Counters::width; ++i)
    for (int k = 0; k < 4; ++k) factor[4 * i + k] = dropout.factor<double>(uint32_t(bits.word[k].v[i]));
}

// Writes the factors, 0 or 1 / (1 - p), of n columns of a row from column j0 on, which must be a multiple of four. The
// last counters may write beyond n, but not beyond the chunk.
template <class S>
__attribute__((noinline)) void dropout_factors(const Dropout& dropout, int64_t row, int64_t j0, int64_t n, S* factor) {
  constexpr int W = Counters::width;
  if (dropout.threshold >> 32) {  // p is 1
    __builtin_memset(factor, 0, n * sizeof(S));
    return;
  }
  Counters::Type lane_index;
  for (int i = 0; i < W; ++i) lane_index[i] = i;
  const Counters low_row{uint32_t(row)}, high_row{uint32_t(row >> 32)}, zero{0u};
  for (int64_t j = 0; j < n; j += 4 * W) {
    const Counters quad(lane_index + uint64_t((j0 + j) / 4));
    store_factors(dropout, philox4x32_10<Counters>({{quad, low_row, high_row, zero}}, uint64_t(*dropout.seed)),
                  factor + j);
  }
}

}  // namespace ckpt::CKPT_ISA
