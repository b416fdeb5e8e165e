"""Elementary functions for the activations, in Triton, on float32.

Except those of the normal distribution, the polynomials are the same as in csrc/cpu/polynomials.h, which documents
their derivation and accuracy; tests/test_polynomials.py compares the coefficients.
"""

import triton
import triton.language as tl
from triton.language.target_info import is_cuda


@triton.jit
def reciprocal(x):
    """1 / x. On NVIDIA GPUs this is one instruction with an error of 1 ulp; a division takes eight instructions."""
    if is_cuda():
        r = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        r = 1.0 / x
    return r


@triton.jit
def exp(x):
    """e^x as a power of 2, for which GPUs have an instruction; rounding the product costs at most |x| ulp."""
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
def logistic(x):
    """1 / (1 + exp(-x)) and the derivative. value - value^2 would lose all digits for large x; a product does not."""
    e = exp(-x)
    value = reciprocal(1.0 + e)
    # Clamped, because infinity * 0 would be NaN where the exponential overflows.
    return value, tl.minimum(e, 3e38) * value * value


@triton.jit
def expm1_nonpositive(x):
    """e^x - 1 for x <= 0, as 2^n f + (2^n - 1).

    e^x = 2^n (1 + f), where n is the integer nearest to x / log(2), and a polynomial gives f = expm1(r) of the
    remainder r = x - n log(2). log(2) is subtracted in two parts, so that n times the first part is exact (Cody and
    Waite, 1980).
    """
    x = tl.where(x < -40.0, -40.0, x)
    n = tl.floor(x * 1.4426950408889634 + 0.5)
    r = x - n * 0.693359375
    r = r - n * -2.12194440e-4
    q = 0.001390131190419197 * r + 0.008363213390111923
    q = q * r + 0.04166685417294502
    q = q * r + 0.16666576266288757
    q = q * r + 0.5
    scale = tl.exp2(n)
    return scale * ((q * r) * r + r) + (scale - 1.0)


@triton.jit
def log1p_unit(x):
    """log(1 + x) for 0 <= x <= 1, as 2 atanh(s) with s = x / (2 + x), by a polynomial in s^2."""
    s = x * reciprocal(2.0 + x)
    z = s * s
    q = 0.11616778373718262 * z + 0.10852266848087311
    q = q * z + 0.1429625004529953
    q = q * z + 0.19999851286411285
    q = q * z + 0.3333333432674408
    return 2.0 * s + 2.0 * s * z * q


@triton.jit
def normal_cdf(x):
    """The standard normal distribution function; at -|x| the value is 2^p(|x|), with a polynomial p for the logarithm.

    Up to 6 the relative error of the tail is at most 3.2e-6 with an exact p, and 6.2e-6 with p in float32. `python -m
    tools.polynomials` fits p up to 6; beyond, p falls to minus infinity as the logarithm does.
    """
    a = tl.abs(x)
    p = -2.2847158831496017e-08 * a + 7.120326586118608e-07
    p = p * a - 9.473360478295945e-06
    p = p * a + 6.827171455370262e-05
    p = p * a - 0.0002534362720325589
    p = p * a - 5.0046459364239126e-05
    p = p * a + 0.007002450060099363
    p = p * a - 0.05247482284903526
    p = p * a - 0.4592112600803375
    p = p * a - 1.1511050462722778
    p = p * a - 1.0
    tail = tl.exp2(p)
    return tl.where(x > 0, 1.0 - tail, tail)


@triton.jit
def rough_normal_cdf(x):
    """`normal_cdf` for 16-bit results, whose rounding error is more than 50 times as large.

    Up to 6 the relative error of the tail is at most 4.5e-6 with an exact p, and 7.5e-6 with p in float32.
    """
    a = tl.abs(x)
    p = -1.7937808252099785e-06 * a + 6.072616815799847e-05
    p = p * a - 0.0009231857839040458
    p = p * a + 0.008476847782731056
    p = p * a - 0.05389093980193138
    p = p * a - 0.4585415720939636
    p = p * a - 1.151214361190796
    p = p * a - 1.0
    tail = tl.exp2(p)
    return tl.where(x > 0, 1.0 - tail, tail)


@triton.jit
def normal_density(x):
    """exp(-x^2 / 2) / sqrt(2 pi), with all factors in the exponent of a power of 2."""
    return tl.exp2(x * x * -0.7213475204444817 - 1.3257480647361593)


@triton.jit
def gelu_tanh_gate(x):
    """0.5 (1 + tanh(u)) with u of gelu_tanh, as logistic(2u), which stays accurate where tanh(u) is near -1."""
    return logistic(x * (1.5957691216057308 + 0.07135481627260025 * x * x))
