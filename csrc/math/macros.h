// Marks functions that both the host and the device compile.
#pragma once

#if defined(__CUDACC__)
#define CKPT_HD __host__ __device__ __forceinline__
#else
// Inlining is forced, because the instruction-set files compile the same functions for different targets, and the
// linker must not replace one out-of-line copy by another.
#define CKPT_HD inline __attribute__((always_inline))
#endif
