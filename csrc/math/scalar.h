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
CKPT_HD float exp2(float x) { return exp2f(x); }
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

// The standard normal distribution function at x. The second argument is exp(-x*x/2), which only vectors need.
CKPT_HD float normal_cdf(float x, float) { return 0.5f * erfcf(-x * 0.70710678118654752f); }
CKPT_HD double normal_cdf(double x, double) { return 0.5 * ::erfc(-x * 0.70710678118654752); }

}  // namespace ckpt
