// The loops for AVX2 with FMA and F16C.
#if defined(__x86_64__)
#define CKPT_ISA avx2
#define CKPT_VECTOR_BYTES 32
#include "target.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#include "loops.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
