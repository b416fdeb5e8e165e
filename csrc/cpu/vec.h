// A register of floats or doubles as a value, for the instruction set of target.h.
#pragma once

#include "target.h"

namespace ckpt::CKPT_ISA {

// The compiler's vector types with S in each lane, and the types of comparison masks and bits.
template <class S>
struct Raw;
template <>
struct Raw<float> {
  static constexpr int width = CKPT_VECTOR_BYTES / 4;
  typedef float type __attribute__((vector_size(width * 4)));
  typedef int32_t mask __attribute__((vector_size(width * 4)));
  static constexpr int32_t magnitude = 0x7fffffff;  // all bits but the sign
  typedef uint32_t bits __attribute__((vector_size(width * 4)));
  typedef uint16_t half __attribute__((vector_size(width * 2)));
};
template <>
struct Raw<double> {
  static constexpr int width = CKPT_VECTOR_BYTES / 8;
  typedef double type __attribute__((vector_size(width * 8)));
  typedef int64_t mask __attribute__((vector_size(width * 8)));
  static constexpr int64_t magnitude = 0x7fffffffffffffff;
};

// One register of S. The elementary functions (vec_math.h) of a rough vector have relative errors up to 2^-14, which is
// accurate enough for results that are stored in 16 bits.
template <class S, bool rough = false>
struct Vec {
  static constexpr int width = Raw<S>::width;
  using Type = typename Raw<S>::type;
  using Mask = typename Raw<S>::mask;
  Type v;

  CKPT_INLINE Vec() {}
  CKPT_INLINE Vec(Type raw) : v(raw) {}
  CKPT_INLINE explicit Vec(double scalar) : v(Type{} + S(scalar)) {}
  CKPT_INLINE explicit Vec(Vec<S, !rough> other) : v(other.v) {}

  CKPT_INLINE friend Vec operator+(Vec a, Vec b) { return a.v + b.v; }
  CKPT_INLINE friend Vec operator-(Vec a, Vec b) { return a.v - b.v; }
  CKPT_INLINE friend Vec operator*(Vec a, Vec b) { return a.v * b.v; }
  CKPT_INLINE friend Vec operator/(Vec a, Vec b) { return a.v / b.v; }
  CKPT_INLINE friend Vec operator-(Vec a) { return -a.v; }
  CKPT_INLINE Vec& operator+=(Vec b) { return v += b.v, *this; }
  CKPT_INLINE friend Mask operator>(Vec a, Vec b) { return a.v > b.v; }
  CKPT_INLINE friend Mask operator>=(Vec a, Vec b) { return a.v >= b.v; }
  CKPT_INLINE friend Mask operator<(Vec a, Vec b) { return a.v < b.v; }
  CKPT_INLINE friend Mask operator<=(Vec a, Vec b) { return a.v <= b.v; }
  CKPT_INLINE friend Vec select(Mask m, Vec yes, Vec no) { return m ? yes.v : no.v; }
  CKPT_INLINE friend Vec abs(Vec a) { return Type(Mask(a.v) & Raw<S>::magnitude); }
};

// Which lanes of a vector belong to a row: all of them (Full), or the first `count` (Partial), in the last vector of a
// row whose length is not a multiple of the width. `keep` puts zeros into the other lanes.
template <class S>
struct Full {
  CKPT_INLINE Vec<S> keep(Vec<S> a) const { return a; }
  CKPT_INLINE int64_t size() const { return Vec<S>::width; }
};
template <class S>
struct Partial {
  int64_t count;
  CKPT_INLINE Vec<S> keep(Vec<S> a) const {
    for (int i = 0; i < Vec<S>::width; ++i)
      if (i >= count) a.v[i] = 0;
    return a;
  }
  CKPT_INLINE int64_t size() const { return count; }
};

// shuffle<Order>(a, b) takes lane Order::lane(i, width) of the pair as its lane i; the lanes of b are numbered on from
// those of a. Evens and Odds undo what InterleaveLow and InterleaveHigh do together: a0 b0 a1 b1 ...
struct Evens {
  static constexpr int lane(int i, int) { return 2 * i; }
};
struct Odds {
  static constexpr int lane(int i, int) { return 2 * i + 1; }
};
struct InterleaveLow {
  static constexpr int lane(int i, int width) { return i / 2 + i % 2 * width; }
};
struct InterleaveHigh {
  static constexpr int lane(int i, int width) { return width / 2 + i / 2 + i % 2 * width; }
};
template <class Order, class V, int... i>
CKPT_INLINE V shuffle(V a, V b, std::integer_sequence<int, i...>) {
  constexpr int width = sizeof...(i);
#if defined(__clang__)
  return __builtin_shufflevector(a, b, Order::lane(i, width)...);
#else
  typedef decltype(a < b) Lanes;
  return __builtin_shuffle(a, b, Lanes{Order::lane(i, width)...});
#endif
}
template <class Order, class V>
CKPT_INLINE V shuffle(V a, V b) {
  return shuffle<Order>(a, b, std::make_integer_sequence<int, sizeof(V) / sizeof(a[0])>{});
}

// The sum of all lanes: adds to each lane the lane half a vector further on, then a quarter, ... by shuffles, because
// accesses to single lanes would go through memory.
template <int by>
struct Rotate {
  static constexpr int lane(int i, int width) { return (i + by) % width; }
};
template <class S, int half = Vec<S>::width / 2>
CKPT_INLINE S sum_lanes(Vec<S> a) {
  if constexpr (half == 0)
    return a.v[0];
  else
    return sum_lanes<S, half / 2>(Vec<S>(a.v + shuffle<Rotate<half>>(a.v, a.v)));
}

}  // namespace ckpt::CKPT_ISA
