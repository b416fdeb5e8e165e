// The polynomials of the elementary functions in vec_math.h: coefficients by rising powers.
//
// `python -m tools.polynomials` computes the coefficients and measures the errors. Each polynomial minimizes the
// greatest relative error over the range for its degree (Remez's exchange algorithm, 1934, in float64); the
// coefficients are then rounded to float32. Coefficients that differ from the script's do so by less than 1e-4 of their
// size, and are as good. An error in ulp is the error of the whole function in float32, with or without fused
// multiply-adds, whichever is greater. The Triton kernels have the same coefficients.
#pragma once

#include "target.h"
#include "vec.h"

namespace ckpt::CKPT_ISA {

// expm1(r) = r + r^2 q(r) for |r| <= log(2) / 2.
// Greatest error: 2^-22.8 of q; 1.05 ulp of exp, 1.11 ulp of expm1.
constexpr float expm1_coefficients[] = {0.5f, 0.16666576266288757f, 0.04166685417294502f, 0.008363213390111923f,
                                        0.001390131190419197f};

// 2^r = 1 + r q(r) for 0 <= r <= 1. The polynomial minimizes the relative error of 2^r.
// Greatest error: 2^-26.3 of 2^r; 1.52 ulp of exp2.
constexpr float exp2_coefficients[] = {0.6931470444279537f,   0.2402293058151528f,    0.055485279192989914f,
                                       0.009675454874961268f, 0.0012467812152290561f, 0.0002161304550139567f};

// 2^r = q(r) for 0 <= r <= 1, for results that are stored in 16 bits.
// Greatest error: 2^-18.5 of 2^r; 43.7 ulp of rough exp2.
constexpr float rough_exp2_coefficients[] = {1.0000025903257852f, 0.6930038678840404f, 0.2414426718400436f,
                                             0.05201151784198876f, 0.013534170413511619f};

// log(1 + x) = 2 atanh(s) = 2 s + 2 s z q(z) with s = x / (2 + x) and z = s^2, for 0 <= x <= 1.
// Greatest error: 2^-25.0 of q; 1.90 ulp of log1p.
constexpr float log1p_coefficients[] = {0.3333333432674408f, 0.19999851286411285f, 0.1429625004529953f,
                                        0.10852266848087311f, 0.11616778373718262f};

// The tail of the standard normal distribution beyond a >= 0 is exp(-a^2 / 2) p(s) with s = k a / (1 + k a) and
// k = 0.33, for a <= 14.5, beyond which the tail is below the range of float32. (1 - s is the variable of C. Hastings's
// formula for erf, "Approximations for digital computers", 1955, with a k of similar size.) Rounding the coefficients
// costs accuracy mostly in the far tail; before rounding the error is 2^-26.3.
// Greatest error: 2^-20.3 of p; 53.0 ulp of normal tail, 9.97 ulp of normal tail up to 6.
constexpr float normal_tail_coefficients[] = {
    0.5f,
    -1.2089165449142456f,
    1.0867732763290405f,
    -0.317866712808609f,
    -0.1541757881641388f,
    0.06502029299736023f,
    0.02268778719007969f,
    0.06473537534475327f,
    -0.0840807780623436f,
    0.02582946978509426f,
};

// The same as p(t) with t = 1 - s = 1 / (1 + k a), for a <= 14 and results that are stored in 16 bits.
// Greatest error: 2^-14.2 of p; 861 ulp of rough normal tail.
constexpr float rough_normal_tail_coefficients[] = {
    0.0005198995702081829f, 0.12334211330235831f, 0.18286271595263165f,
    -0.03654818829362204f,  0.3185031685168183f,  -0.08865411325990875f,
};

// The polynomial's value at x, by Horner's rule.
template <int k = 0, int count>
CKPT_INLINE Raw<float>::type horner(const float (&coefficients)[count], Raw<float>::type x) {
  if constexpr (k == count - 2)
    return coefficients[k + 1] * x + coefficients[k];
  else
    return horner<k + 1>(coefficients, x) * x + coefficients[k];
}

}  // namespace ckpt::CKPT_ISA
