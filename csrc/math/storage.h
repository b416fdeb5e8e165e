// The 16-bit storage types, as bits, and the conversions of single values.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

#include "macros.h"

namespace ckpt {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

// The compute type of a storage type.
template <class T>
struct ComputeType {
  using type = float;
};
template <>
struct ComputeType<double> {
  using type = double;
};

CKPT_HD uint32_t float_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits;
}
CKPT_HD float bits_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}

CKPT_HD float to_float(float x) { return x; }
CKPT_HD float to_float(double x) { return float(x); }
CKPT_HD float to_float(bfloat16 x) { return bits_float(uint32_t(x.bits) << 16); }
CKPT_HD void from_float(float x, float* y) { *y = x; }

// Rounding is to nearest even; NaN becomes the quiet NaN that torch writes on the same device.
#if defined(__CUDA_ARCH__)
CKPT_HD void from_float(float x, bfloat16* y) { y->bits = __bfloat16_as_ushort(__float2bfloat16_rn(x)); }
CKPT_HD float to_float(float16 x) { return __half2float(__ushort_as_half(x.bits)); }
CKPT_HD void from_float(float x, float16* y) { y->bits = __half_as_ushort(__float2half_rn(x)); }
#else
CKPT_HD void from_float(float x, bfloat16* y) {
  uint32_t bits = float_bits(x);
  y->bits = x == x ? uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16) : uint16_t(0x7fc0);
}
// A float16's exponent and fraction, read as those of a float32, are 2^112 times too small; a product corrects this for
// denormals too.
CKPT_HD float to_float(float16 x) {
  uint32_t sign = uint32_t(x.bits & 0x8000u) << 16, magnitude = uint32_t(x.bits & 0x7fffu) << 13;
  if (magnitude >= 0x0f800000u) return bits_float(sign | magnitude | 0x7f800000u);
  return bits_float(sign | float_bits(bits_float(magnitude) * 5.192296858534828e+33f));  // 2^112
}
// For a denormal result 0.5f is added: the last place of 0.5f is that of a float16 denormal, so the addition rounds.
CKPT_HD void from_float(float x, float16* y) {
  uint32_t bits = float_bits(x), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu, h;
  if (magnitude > 0x7f800000u)
    h = 0x7e00u;
  else if (magnitude >= 0x477ff000u)
    h = 0x7c00u;
  else if (magnitude < 0x38800000u)
    h = float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000u;
  else
    h = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u) >> 13;
  y->bits = uint16_t(h | sign);
}
#endif

// Two neighbours at once: on a GPU one register holds both, and one instruction rounds both.
template <class T>
CKPT_HD void to_floats(const T* x, float* y) {
  y[0] = to_float(x[0]);
  y[1] = to_float(x[1]);
}
template <class T>
CKPT_HD void from_floats(const float* x, T* y) {
  from_float(x[0], y);
  from_float(x[1], y + 1);
}
#if defined(__CUDA_ARCH__)
CKPT_HD void to_floats(const bfloat16* x, float* y) {
  uint32_t pair;
  memcpy(&pair, x, sizeof(pair));
  y[0] = bits_float(pair << 16);
  y[1] = bits_float(pair & 0xffff0000u);
}
CKPT_HD void from_floats(const float* x, bfloat16* y) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(x[0], x[1]);
  memcpy(y, &pair, sizeof(pair));
}
CKPT_HD void from_floats(const float* x, float16* y) {
  const __half2 pair = __floats2half2_rn(x[0], x[1]);
  memcpy(y, &pair, sizeof(pair));
}
#endif

}  // namespace ckpt
