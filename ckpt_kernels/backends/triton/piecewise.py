"""The piecewise polynomial activations, `name(x)`, and their derivatives, `name_grad(x)`, on float32."""

import triton
import triton.language as tl


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
def hardswish(x):
    ramp = x + 3.0
    ramp = tl.where(ramp <= 0, 0.0, ramp)
    return x * (tl.where(ramp >= 6.0, 6.0, ramp) * (1.0 / 6.0))


@triton.jit
def hardswish_grad(x):
    return tl.where(x <= -3.0, 0.0, tl.where(x >= 3.0, 1.0, x / 3.0 + 0.5))


@triton.jit
def relu6(x):
    return tl.where(x <= 0, 0.0, tl.where(x >= 6.0, 6.0, x))


@triton.jit
def relu6_grad(x):
    return tl.where((x > 0) & (x < 6.0), 1.0, 0.0)


@triton.jit
def hardtanh(x):
    return tl.where(x <= -1.0, -1.0, tl.where(x >= 1.0, 1.0, x))


@triton.jit
def hardtanh_grad(x):
    return tl.where((x > -1.0) & (x < 1.0), 1.0, 0.0)
