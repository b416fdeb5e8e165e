// Defines the instruction set of the loops, and includes everything that the loops need from outside of csrc/cpu.
//
// Each isa_*.cpp includes the loops once, for one set. The file first defines CKPT_ISA, the namespace of the set, and
// CKPT_VECTOR_BYTES, the width of the set's registers; the defaults are those of the generic set. The file then
// includes this header, and only afterwards enables the set in the compiler. So no function of a system header is
// compiled for the set: the linker keeps one copy of such a function for the whole library, and an older processor
// would crash in a copy built for AVX-512. For the same reason the loops call no template of the standard library, and
// every function outside the set's namespace is always inlined.
#pragma once

#include <math.h>
#include <stdint.h>

#include <utility>

#include "../math/scalar.h"
#include "../math/storage.h"
#include "isa.h"

#ifndef CKPT_VECTOR_BYTES
#define CKPT_ISA generic
#define CKPT_VECTOR_BYTES 16
#endif
#if CKPT_VECTOR_BYTES > 16
#include <immintrin.h>
#endif

#define CKPT_INLINE inline __attribute__((always_inline))
// Placed after the parameters of a lambda. Without inlining, the captures of a lambda are in memory, and the compiler
// reads them again after each store.
#define CKPT_INLINE_BODY __attribute__((always_inline))

// Defines name(kind), which returns the loops of name_for<storage type>(). Float64 loops mainly serve gradient checks,
// where speed matters little, so only the generic set has them. A set for bfloat16 alone leaves all other types to
// AVX-512.
#if CKPT_VECTOR_BYTES == 16
#define CKPT_DEFINE_LOOPS(Loops, name)                                                                    \
  const Loops& name(ScalarKind kind) {                                                                    \
    static constexpr Loops loops[] = {name##_for<float>(), name##_for<bfloat16>(), name##_for<float16>(), \
                                      name##_for<double>()};                                              \
    return loops[int(kind)];                                                                              \
  }
#elif defined(CKPT_BFLOAT16_ALONE)
#define CKPT_DEFINE_LOOPS(Loops, name)                                \
  const Loops& name(ScalarKind kind) {                                \
    static constexpr Loops loops = name##_for<bfloat16>();            \
    return kind == ScalarKind::bfloat16 ? loops : avx512::name(kind); \
  }
#else
#define CKPT_DEFINE_LOOPS(Loops, name)                                                                     \
  const Loops& name(ScalarKind kind) {                                                                     \
    static constexpr Loops loops[] = {name##_for<float>(), name##_for<bfloat16>(), name##_for<float16>()}; \
    return kind == ScalarKind::float64 ? generic::name(kind) : loops[int(kind)];                           \
  }
#endif
