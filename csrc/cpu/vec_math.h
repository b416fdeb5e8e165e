// The elementary functions that csrc/math/activations.h uses, for vectors; csrc/math/scalar.h has the same set for
// scalars.
//
// The functions of floats use the polynomials of polynomials.h, which documents the accuracy; rough vectors have
// shorter polynomials. The functions of doubles call the C library lane by lane.
#pragma once

#include "polynomials.h"
#include "target.h"
#include "vec.h"

namespace ckpt::CKPT_ISA {

// max(x, low) and min(x, high), which give NaN where x is NaN. The instructions return their second operand if either
// is NaN, so x must come second.
#if CKPT_VECTOR_BYTES == 64
CKPT_INLINE Raw<float>::type at_least(Raw<float>::type x, float low) { return _mm512_max_ps(_mm512_set1_ps(low), x); }
CKPT_INLINE Raw<float>::type at_most(Raw<float>::type x, float high) { return _mm512_min_ps(_mm512_set1_ps(high), x); }
#elif CKPT_VECTOR_BYTES == 32
CKPT_INLINE Raw<float>::type at_least(Raw<float>::type x, float low) { return _mm256_max_ps(_mm256_set1_ps(low), x); }
CKPT_INLINE Raw<float>::type at_most(Raw<float>::type x, float high) { return _mm256_min_ps(_mm256_set1_ps(high), x); }
#else
CKPT_INLINE Raw<float>::type at_least(Raw<float>::type x, float low) { return x < low ? Raw<float>::type{} + low : x; }
CKPT_INLINE Raw<float>::type at_most(Raw<float>::type x, float high) {
  return x > high ? Raw<float>::type{} + high : x;
}
#endif

// The nearest integer, for |x| < 2^22. 1.5 * 2^23 + x lies where neighbouring floats are 1 apart, so the sum is rounded
// to an integer.
CKPT_INLINE Raw<float>::type nearest(Raw<float>::type x) {
#if CKPT_VECTOR_BYTES == 64
  return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  return x + 12582912.0f - 12582912.0f;
#endif
}

// m * 2^n for an integer n with |n| <= 160. AVX-512 has an instruction for this, which takes any n and rounds it down
// to an integer first.
CKPT_INLINE Raw<float>::type scale_by_power(Raw<float>::type m, Raw<float>::type n) {
#if CKPT_VECTOR_BYTES == 64
  return Raw<float>::type(_mm512_scalef_ps(m, n));
#else
  // In two factors, because 2^n by itself may be beyond the normal numbers.
  Raw<float>::mask k = __builtin_convertvector(n, Raw<float>::mask), half = k >> 1;
  return m * Raw<float>::type((half + 127) << 23) * Raw<float>::type((k - half + 127) << 23);
#endif
}

// e^x = 2^n (1 + f): n is the integer nearest to x / log(2), and f = expm1(r) for the remainder r = x - n log(2).
// log(2) is subtracted in two parts, the first with so few bits that its product with n is exact (W. Cody and W. Waite,
// "Software manual for the elementary functions", 1980).
struct ScaledExponential {
  Raw<float>::type n, f;
};
CKPT_INLINE ScaledExponential scaled_exponential(Raw<float>::type x) {
  Raw<float>::type n = nearest(x * 1.44269504088896341f);
  Raw<float>::type r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  Raw<float>::type q = horner(expm1_coefficients, r);
  return {n, (q * r) * r + r};
}

// Below -104 the result is 0, above 89 infinite.
CKPT_INLINE Vec<float> exp(Vec<float> x) {
  ScaledExponential e = scaled_exponential(at_most(at_least(x.v, -104.0f), 89.0f));
  return scale_by_power(1.0f + e.f, e.n);
}

// 2^n (1 + f) - 1, as 2^n f + (2^n - 1): near 0, where n is 0, this is f itself. Below -40 the result is -1.
CKPT_INLINE Vec<float> expm1_nonpositive(Vec<float> x) {
  ScaledExponential e = scaled_exponential(at_least(x.v, -40.0f));
  Raw<float>::type scale = scale_by_power(Raw<float>::type{} + 1.0f, e.n);
  return scale * e.f + (scale - 1.0f);
}

// x = floor + fraction. Beyond the exponents of float32 the fraction is arbitrary, because 2^x is 0 or infinite.
struct FloorAndFraction {
  Raw<float>::type floor, fraction;

  CKPT_INLINE explicit FloorAndFraction(Raw<float>::type x) {
#if CKPT_VECTOR_BYTES == 64
    // The AVX-512 scale_by_power rounds down. The fraction of an infinity is 0.
    floor = x;
    fraction = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
#else
    x = at_most(at_least(x, -150.0f), 129.0f);
    floor = nearest(x - 0.5f);
    fraction = x - floor;
#endif
  }
};

CKPT_INLINE Vec<float> exp2(Vec<float> x) {
  FloorAndFraction of(x.v);
  Raw<float>::type q = horner(exp2_coefficients, of.fraction);
  return scale_by_power(q * of.fraction + 1.0f, of.floor);
}
CKPT_INLINE Vec<float, true> exp2(Vec<float, true> x) {
  FloorAndFraction of(x.v);
  return scale_by_power(horner(rough_exp2_coefficients, of.fraction), of.floor);
}
CKPT_INLINE Vec<float, true> exp(Vec<float, true> x) { return exp2(x * Vec<float, true>(1.44269504088896341)); }

// min(x, nearly the largest number), for an exponential that may be infinite: the product with 0 must be 0, not NaN.
template <bool rough>
CKPT_INLINE Vec<float, rough> bounded(Vec<float, rough> x) {
  return at_most(x.v, 3e38f);
}
CKPT_INLINE Vec<double> bounded(Vec<double> x) { return select(x > Vec<double>(1e308), Vec<double>(1e308), x); }

template <class S, bool rough>
CKPT_INLINE Vec<S, rough> quotient(Vec<S, rough> a, Vec<S, rough> b) {
  return a / b;
}

// log(1 + x) for 0 <= x <= 1.
CKPT_INLINE Vec<float> log1p_unit(Vec<float> x) {
  Raw<float>::type s = x.v / (2.0f + x.v);
  Raw<float>::type z = s * s;
  Raw<float>::type q = horner(log1p_coefficients, z);
  Raw<float>::type twice = s + s;
  return twice + twice * z * q;
}

// The standard normal distribution function at x; `bell` is exp(-x^2 / 2). The tail beyond |x| is the result for a
// negative x, and 1 minus the result for a positive x.
CKPT_INLINE Vec<float> normal_cdf(Vec<float> x, Vec<float> bell) {
  Raw<float>::type ka = at_most(0.33f * abs(x).v, 1e30f);
  Raw<float>::type s = ka / (1.0f + ka);
  Raw<float>::type tail = bell.v * horner(normal_tail_coefficients, s);
  return select(x > Vec<float>(0.0), Vec<float>(1.0f - tail), Vec<float>(tail));
}
CKPT_INLINE Vec<float, true> normal_cdf(Vec<float, true> x, Vec<float, true> bell) {
  Raw<float>::type t = 1.0f / (0.33f * abs(x).v + 1.0f);
  Raw<float>::type tail = bell.v * horner(rough_normal_tail_coefficients, t);
  return select(x > Vec<float, true>(0.0), Vec<float, true>(1.0f - tail), Vec<float, true>(tail));
}

// These functions have no shorter form.
CKPT_INLINE Vec<float, true> expm1_nonpositive(Vec<float, true> x) {
  return Vec<float, true>(expm1_nonpositive(Vec<float>(x)));
}
CKPT_INLINE Vec<float, true> log1p_unit(Vec<float, true> x) { return Vec<float, true>(log1p_unit(Vec<float>(x))); }

CKPT_INLINE Vec<double> exp(Vec<double> x) {
  for (int i = 0; i < Vec<double>::width; ++i) x.v[i] = ::exp(x.v[i]);
  return x;
}
CKPT_INLINE Vec<double> exp2(Vec<double> x) {
  for (int i = 0; i < Vec<double>::width; ++i) x.v[i] = ::exp2(x.v[i]);
  return x;
}
CKPT_INLINE Vec<double> expm1_nonpositive(Vec<double> x) {
  for (int i = 0; i < Vec<double>::width; ++i) x.v[i] = ::expm1(x.v[i]);
  return x;
}
CKPT_INLINE Vec<double> log1p_unit(Vec<double> x) {
  for (int i = 0; i < Vec<double>::width; ++i) x.v[i] = ::log1p(x.v[i]);
  return x;
}
CKPT_INLINE Vec<double> normal_cdf(Vec<double> x, Vec<double>) {
  for (int i = 0; i < Vec<double>::width; ++i) x.v[i] = 0.5 * ::erfc(x.v[i] * -0.70710678118654752);
  return x;
}

}  // namespace ckpt::CKPT_ISA
