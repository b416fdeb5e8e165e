// The loops for AVX-512.
#if defined(__x86_64__)
#define CKPT_ISA avx512
#define CKPT_VECTOR_BYTES 64
#include "target.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif

#include "loops.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
