// The loops for AVX-512 with the instructions for bfloat16, for this storage type alone.
#if defined(__x86_64__)
#define CKPT_ISA avx512_bf16
#define CKPT_VECTOR_BYTES 64
#define CKPT_BFLOAT16_ALONE
#include "target.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")
#endif

#include "loops.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
