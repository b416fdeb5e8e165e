"""Every activation and its derivative as Triton functions: `name(x)` and `name_grad(x)`, on float32.

`activate` and `differentiate` choose by name when a kernel is compiled. To add an activation: the two functions,
and their two lines in each of these. The polynomials, but for that of `normal_cdf`, are those of
csrc/cpu/polynomials.h, which says how they were found and how accurate they are; tests/test_polynomials.py compares the
coefficients.
"""

import torch
import triton
import triton.language as tl
from triton.language.target_info import is_cuda

# Those that have a shorter form for results of 16 bits.
_ROUGH = ("gelu", "tanh")


def as_stored(activation: str, *stored: torch.Tensor | None) -> str:
    """The activation as `activate` knows it, where these are all tensors that are computed from it, or like them.

    Where all have 16 bits, a shorter polynomial errs by less than what they are rounded by.
    """
    short = all(tensor is None or tensor.element_size() == 2 for tensor in stored)
    return f"rough {activation}" if short and activation in _ROUGH else activation


@triton.jit
def reciprocal(x):
    """1 / x. NVIDIA's GPUs have one instruction for that, to an ulp, where a division takes eight."""
    if is_cuda():
        r = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        r = 1.0 / x
    return r


@triton.jit
def exp(x):
    """e^x as a power of 2, which GPUs have an instruction for: the product's rounding costs |x| ulp at most."""
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
def logistic(x):
    """1 / (1 + exp(-x)) and its derivative, as a product: value - value^2 would lose all digits for a large x."""
    e = exp(-x)
    value = reciprocal(1.0 + e)
    # Where the exponential is infinite and the value 0, their product is to be 0 and not NaN.
    return value, tl.minimum(e, 3e38) * value * value


@triton.jit
def expm1_nonpositive(x):
    """e^x - 1 for x <= 0, as 2^n f + (2^n - 1).

    e^x = 2^n (1 + f), where n is the integer nearest to x / log(2), and f is expm1 of the rest r = x - n log(2), by a
    polynomial. log(2) is subtracted in two parts, so that n times the first is exact (Cody and Waite, 1980).
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
    """The standard normal distribution function at x: at -|x| it is 2^p(|x|), with a polynomial p for its logarithm.

    That errs by 3.2e-6 of the tail's size at most. Beyond 6, where `python -m tools.polynomials` found it, p falls to
    minus infinity, as the logarithm does.
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
    """The same for results of 16 bits, whose rounding is 50 times as large and more.

    It errs by 4.5e-6 of the tail's size at most.
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
def identity(x):
    return x


@triton.jit
def identity_grad(x):
    return tl.full(x.shape, 1.0, x.dtype)


@triton.jit
def relu(x):
    return tl.where(x <= 0, 0.0, x)


@triton.jit
def relu_grad(x):
    return tl.where(x <= 0, 0.0, 1.0)


@triton.jit
def leaky_relu(x):
    return tl.where(x > 0, x, x * 0.01)


@triton.jit
def leaky_relu_grad(x):
    return tl.where(x > 0, 1.0, 0.01)


@triton.jit
def relu_squared(x):
    r = relu(x)
    return r * r


@triton.jit
def relu_squared_grad(x):
    return 2.0 * relu(x)


@triton.jit
def elu(x):
    return tl.where(x > 0, x, expm1_nonpositive(tl.where(x > 0, 0.0, x)))


@triton.jit
def elu_grad(x):
    return tl.where(x > 0, 1.0, exp(tl.where(x > 0, 0.0, x)))


@triton.jit
def gelu(x):
    return x * normal_cdf(x)


@triton.jit
def normal_density(x):
    # exp(-x^2 / 2) / sqrt(2 pi), its factors in the power's exponent.
    return tl.exp2(x * x * -0.7213475204444817 - 1.3257480647361593)


@triton.jit
def gelu_grad(x):
    return normal_cdf(x) + x * normal_density(x)


@triton.jit
def rough_gelu(x):
    return x * rough_normal_cdf(x)


@triton.jit
def rough_gelu_grad(x):
    return rough_normal_cdf(x) + x * normal_density(x)


@triton.jit
def gelu_tanh_gate(x):
    # 0.5 (1 + tanh(u)) is logistic(2u), which stays accurate where tanh(u) is near -1.
    return logistic(x * (1.5957691216057308 + 0.07135481627260025 * x * x))


@triton.jit
def gelu_tanh(x):
    s, _ = gelu_tanh_gate(x)
    return x * s


@triton.jit
def gelu_tanh_grad(x):
    s, slope = gelu_tanh_gate(x)
    return s + x * slope * (1.5957691216057308 + 0.21406444881780074 * x * x)


@triton.jit
def quick_gelu(x):
    s, _ = logistic(1.702 * x)
    return x * s


@triton.jit
def quick_gelu_grad(x):
    s, slope = logistic(1.702 * x)
    return s + x * slope * 1.702


@triton.jit
def silu(x):
    s, _ = logistic(x)
    return x * s


@triton.jit
def silu_grad(x):
    s, slope = logistic(x)
    return s + x * slope


@triton.jit
def mish(x):
    # tanh(log(1 + e^x)) written in e^-|x|, so that nothing overflows.
    e = exp(-tl.abs(x))
    n = tl.where(x >= 0, 1.0 + 2.0 * e, e * (e + 2.0))
    rest = tl.where(x >= 0, 2.0 * e * e, 2.0)
    return x * (n * reciprocal(n + rest))


@triton.jit
def mish_grad(x):
    e = exp(-tl.abs(x))
    n = tl.where(x >= 0, 1.0 + 2.0 * e, e * (e + 2.0))
    rest = tl.where(x >= 0, 2.0 * e * e, 2.0)
    r = reciprocal(n + rest)
    t = n * r
    s = tl.where(x >= 0, 1.0, e) * reciprocal(1.0 + e)
    return t + x * s * (rest * r) * (1.0 + t)


@triton.jit
def sigmoid(x):
    s, _ = logistic(x)
    return s


@triton.jit
def sigmoid_grad(x):
    _, slope = logistic(x)
    return slope


@triton.jit
def tanh(x):
    m = expm1_nonpositive(-2.0 * tl.abs(x))
    t = m * reciprocal(m + 2.0)
    return tl.where(x > 0, -t, t)


@triton.jit
def tanh_grad(x):
    # Triton's own exponential, whose error does not grow with x: DyT's gradients are this and little else.
    e = tl.exp(-2.0 * tl.abs(x))
    r = reciprocal(1.0 + e)
    return 4.0 * e * r * r


@triton.jit
def rough_tanh(x):
    """For results of 16 bits: near 0 by its series, so that 1 - 2r loses no digits; to 3e-6 of its size."""
    r = reciprocal(1.0 + exp(2.0 * x))
    return tl.where(tl.abs(x) < 0.0625, x - x * x * x * (1.0 / 3.0), 1.0 - 2.0 * r)


@triton.jit
def rough_tanh_grad(x):
    e = exp(-2.0 * tl.abs(x))
    r = reciprocal(1.0 + e)
    return 4.0 * e * r * r


@triton.jit
def hardswish(x):
    ramp = x + 3.0
    ramp = tl.where(ramp <= 0, 0.0, ramp)
    return x * (tl.where(ramp >= 6.0, 6.0, ramp) * (1.0 / 6.0))


@triton.jit
def hardswish_grad(x):
    return tl.where(x <= -3.0, 0.0, tl.where(x >= 3.0, 1.0, x / 3.0 + 0.5))


@triton.jit
def softplus(x):
    # torch's default: the identity above 20.
    return tl.where(x > 20.0, x, tl.where(x > 0, x, 0.0) + log1p_unit(exp(-tl.abs(x))))


@triton.jit
def softplus_grad(x):
    s, _ = logistic(x)
    return tl.where(x > 20.0, 1.0, s)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "identity":
        y = x
    elif ACTIVATION == "relu":
        y = relu(x)
    elif ACTIVATION == "leaky_relu":
        y = leaky_relu(x)
    elif ACTIVATION == "relu_squared":
        y = relu_squared(x)
    elif ACTIVATION == "elu":
        y = elu(x)
    elif ACTIVATION == "gelu":
        y = gelu(x)
    elif ACTIVATION == "rough gelu":
        y = rough_gelu(x)
    elif ACTIVATION == "gelu_tanh":
        y = gelu_tanh(x)
    elif ACTIVATION == "quick_gelu":
        y = quick_gelu(x)
    elif ACTIVATION == "silu":
        y = silu(x)
    elif ACTIVATION == "mish":
        y = mish(x)
    elif ACTIVATION == "sigmoid":
        y = sigmoid(x)
    elif ACTIVATION == "tanh":
        y = tanh(x)
    elif ACTIVATION == "rough tanh":
        y = rough_tanh(x)
    elif ACTIVATION == "hardswish":
        y = hardswish(x)
    else:
        tl.static_assert(ACTIVATION == "softplus")
        y = softplus(x)
    return y


@triton.jit
def differentiate(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "identity":
        y = identity_grad(x)
    elif ACTIVATION == "relu":
        y = relu_grad(x)
    elif ACTIVATION == "leaky_relu":
        y = leaky_relu_grad(x)
    elif ACTIVATION == "relu_squared":
        y = relu_squared_grad(x)
    elif ACTIVATION == "elu":
        y = elu_grad(x)
    elif ACTIVATION == "gelu":
        y = gelu_grad(x)
    elif ACTIVATION == "rough gelu":
        y = rough_gelu_grad(x)
    elif ACTIVATION == "gelu_tanh":
        y = gelu_tanh_grad(x)
    elif ACTIVATION == "quick_gelu":
        y = quick_gelu_grad(x)
    elif ACTIVATION == "silu":
        y = silu_grad(x)
    elif ACTIVATION == "mish":
        y = mish_grad(x)
    elif ACTIVATION == "sigmoid":
        y = sigmoid_grad(x)
    elif ACTIVATION == "tanh":
        y = tanh_grad(x)
    elif ACTIVATION == "rough tanh":
        y = rough_tanh_grad(x)
    elif ACTIVATION == "hardswish":
        y = hardswish_grad(x)
    else:
        tl.static_assert(ACTIVATION == "softplus")
        y = softplus_grad(x)
    return y
