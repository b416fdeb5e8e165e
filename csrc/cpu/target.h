// The instruction set that the loops are built for, and all that they take from outside of csrc/cpu.
//
// Each isa_*.cpp includes the loops once, for its own set. Before that it defines CKPT_ISA, the namespace of the set,
// and CKPT_VECTOR_BYTES, the width of the set's registers; without them the loops are the generic ones. It includes
// this header before it tells the compiler of the set, so that no function of a system header is compiled for the set:
// the linker keeps one copy of such a function for the whole library, and an older processor would crash in a copy
// built for AVX-512. For the same reason the loops call no template of the standard library, and every function of
// their own that is not in the set's namespace is always inlined.
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
// After the parameters of a lambda. What a lambda that is called as a function has captured lies in memory, and is read
// again after each store.
#define CKPT_INLINE_BODY __attribute__((always_inline))

// Defines name(kind), which returns the loops that name_for<storage type>() makes. Loops in float64 serve tests of
// gradients more than they serve speed, so only the generic set has them.
#if CKPT_VECTOR_BYTES == 16
#define CKPT_DEFINE_LOOPS(Loops, name)                                                                    \
  const Loops& name(ScalarKind kind) {                                                                    \
    static constexpr Loops loops[] = {name##_for<float>(), name##_for<bfloat16>(), name##_for<float16>(), \
                                      name##_for<double>()};                                              \
    return loops[int(kind)];                                                                              \
  }
#else
#define CKPT_DEFINE_LOOPS(Loops, name)                                                                     \
  const Loops& name(ScalarKind kind) {                                                                     \
    static constexpr Loops loops[] = {name##_for<float>(), name##_for<bfloat16>(), name##_for<float16>()}; \
    return kind == ScalarKind::float64 ? generic::name(kind) : loops[int(kind)];                           \
  }
#endif
