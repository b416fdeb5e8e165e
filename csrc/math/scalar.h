// The elementary functions that activations.h uses, for float and double, by the C library. csrc/cpu/vec_math.h has the
// same set for vectors.
#pragma once

#include <math.h>

#include "macros.h"

namespace ckpt {

CKPT_HD float abs(float x) { return fabsf(x); }
CKPT_HD double abs(double x) { return fabs(x); }
CKPT_HD float exp(float x) { return expf(x); }
CKPT_HD double exp(double x) { return ::exp(x); }
// On a GPU one instruction, which gives 0 for results below the normal numbers.
CKPT_HD float exp2(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}
CKPT_HD double exp2(double x) { return ::exp2(x); }

template <class T>
CKPT_HD T select(bool condition, T yes, T no) {
  return condition ? yes : no;
}

// min(x, nearly the largest number), for an exponential that may be infinite: the product with 0 must be 0, not NaN.
CKPT_HD float bounded(float x) { return x > 3e38f ? 3e38f : x; }
CKPT_HD double bounded(double x) { return x > 1e308 ? 1e308 : x; }

// exp(x) - 1 for x <= 0.
CKPT_HD float expm1_nonpositive(float x) { return expm1f(x); }
CKPT_HD double expm1_nonpositive(double x) { return ::expm1(x); }

// log(1 + x) for 0 <= x <= 1.
CKPT_HD float log1p_unit(float x) { return log1pf(x); }
CKPT_HD double log1p_unit(double x) { return ::log1p(x); }

// a / b for b >= 1. On a GPU the error is two units in the last place, and the quotient is 0 for a b beyond 2^126; the
// exact division has a slow path that a kernel would contain once for each call.
CKPT_HD float quotient(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fdividef(a, b);
#else
  return a / b;
#endif
}
CKPT_HD double quotient(double a, double b) { return a / b; }

// The standard normal distribution function at x. The second argument is exp(-x*x/2), which only vectors need. For
// numbers the value at -|x| is 2^p(|x|), as in the Triton kernels, whose coefficients these are: tools/polynomials.py
// computes them. The relative error of the tail is at most 3.2e-6.
CKPT_HD float normal_cdf(float x, float) {
  const float a = fabsf(x);
  float p = -2.2847158831496017e-08f * a + 7.120326586118608e-07f;
  p = p * a - 9.473360478295945e-06f;
  p = p * a + 6.827171455370262e-05f;
  p = p * a - 0.0002534362720325589f;
  p = p * a - 5.0046459364239126e-05f;
  p = p * a + 0.007002450060099363f;
  p = p * a - 0.05247482284903526f;
  p = p * a - 0.4592112600803375f;
  p = p * a - 1.1511050462722778f;
  p = p * a - 1.0f;
  const float tail = exp2(p);
  return x > 0 ? 1 - tail : tail;
}
CKPT_HD double normal_cdf(double x, double) { return 0.5 * ::erfc(-x * 0.70710678118654752); }

}  // namespace ckpt
