"""The activations, `name(x)`, and their derivatives, `name_grad(x)`, as Triton functions on float32.

`activate` and `differentiate` select one by name when a kernel is compiled. A new activation needs both functions, here
or in `piecewise`, and a branch in each of these two.
"""

import torch
import triton
import triton.language as tl

from .elementary import (
    exp,
    expm1_nonpositive,
    gelu_tanh_gate,
    log1p_unit,
    logistic,
    normal_cdf,
    normal_density,
    reciprocal,
    rough_normal_cdf,
)
from .piecewise import (
    hardswish,
    hardswish_grad,
    hardtanh,
    hardtanh_grad,
    leaky_relu,
    leaky_relu_grad,
    relu,
    relu6,
    relu6_grad,
    relu_grad,
    relu_squared,
    relu_squared_grad,
)

_WITH_ROUGH_FORM = ("gelu", "tanh")  # activations with a shorter form for 16-bit results


def as_stored(activation: str, *stored: torch.Tensor | None) -> str:
    """The name of the activation for `activate`, given tensors of the dtypes in which results are stored.

    If all have 16 bits, this is the rough form, whose error is smaller than the rounding of the results.
    """
    short = all(tensor is None or tensor.element_size() == 2 for tensor in stored)
    return f"rough {activation}" if short and activation in _WITH_ROUGH_FORM else activation


@triton.jit
def identity(x):
    return x


@triton.jit
def identity_grad(x):
    return tl.full(x.shape, 1.0, x.dtype)


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
def gelu_grad(x):
    return normal_cdf(x) + x * normal_density(x)


@triton.jit
def rough_gelu(x):
    return x * rough_normal_cdf(x)


@triton.jit
def rough_gelu_grad(x):
    return rough_normal_cdf(x) + x * normal_density(x)


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
    # tanh(log(1 + e^x)) in terms of e^-|x|, which does not overflow.
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
    # Triton's own exponential, whose error does not grow with x, because DyT's gradients are mostly this derivative.
    e = tl.exp(-2.0 * tl.abs(x))
    r = reciprocal(1.0 + e)
    return 4.0 * e * r * r


@triton.jit
def rough_tanh(x):
    """`tanh` for 16-bit results, with a relative error of at most 3e-6.

    Near 0 it is a series, because 1 - 2r would lose digits.
    """
    r = reciprocal(1.0 + exp(2.0 * x))
    return tl.where(tl.abs(x) < 0.0625, x - x * x * x * (1.0 / 3.0), 1.0 - 2.0 * r)


@triton.jit
def rough_tanh_grad(x):
    e = exp(-2.0 * tl.abs(x))
    r = reciprocal(1.0 + e)
    return 4.0 * e * r * r


@triton.jit
def softplus(x):
    # By torch's default threshold, the identity above 20.
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
    elif ACTIVATION == "softplus":
        y = softplus(x)
    elif ACTIVATION == "relu6":
        y = relu6(x)
    else:
        tl.static_assert(ACTIVATION == "hardtanh")
        y = hardtanh(x)
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
    elif ACTIVATION == "softplus":
        y = softplus_grad(x)
    elif ACTIVATION == "relu6":
        y = relu6_grad(x)
    else:
        tl.static_assert(ACTIVATION == "hardtanh")
        y = hardtanh_grad(x)
    return y
