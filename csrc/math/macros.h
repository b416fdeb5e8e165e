// Marks functions that both the host and the device compile.
#pragma once

#if defined(__CUDACC__)
#define CKPT_HD __host__ __device__ __forceinline__
#else
// Forced, because the instruction-set files compile the same functions under different targets and no
// out-of-line copy of one may stand in for another at link time.
#define CKPT_HD inline __attribute__((always_inline))
#endif
