// The row loops for AVX2 with FMA and F16C.
#if defined(__x86_64__)
#include <immintrin.h>
#include <math.h>

#include "../math/scalar.h"
#include "../math/storage.h"
#include "isa.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#include "../math/activations.h"
#include "../math/philox.h"

#define CKPT_VECTOR_BYTES 32
#define CKPT_F16C 1
namespace ckpt {
namespace avx2 {
#include "vec.h"
// After vec.h, which it is written in.
#include "activation_rows.h"
#include "moments_rows.h"

#include "bias_act_rows.h"
#include "channel_norm_rows.h"
#include "glu_rows.h"
#include "row_norm_rows.h"
#include "sum_rows.h"
}  // namespace avx2
}  // namespace ckpt

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
