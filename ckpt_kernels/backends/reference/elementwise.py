"""The elementwise blocks in plain torch: gates, biases with activations, and DyT."""

import math

import torch
from torch import Tensor

from .common import ACTIVATIONS, compute_dtype, dropout, fill, slope


def glu(gate: Tensor, value: Tensor, activation: str, limit: float = math.inf, offset: float = 0.0) -> Tensor:
    """activation(min(gate, limit)) * (clamp(value, -limit, limit) + offset)."""
    compute = compute_dtype(gate.dtype)
    u, w = _limited(gate.to(compute), value.to(compute), limit, offset)
    return (ACTIVATIONS[activation](u) * w).to(gate.dtype)


def _limited(gate: Tensor, value: Tensor, limit: float, offset: float) -> tuple[Tensor, Tensor]:
    if limit < math.inf:
        gate, value = gate.clamp(max=limit), value.clamp(-limit, limit)
    return gate, value + offset if offset else value


def bias_act(input: Tensor, bias: Tensor | None, seed: Tensor | None, activation: str, dropout_p: float) -> Tensor:
    """Compute dropout(activation(input + bias))."""
    z = input.to(compute_dtype(input.dtype))
    if bias is not None:
        z = z + bias.to(z.dtype)
    return dropout(ACTIVATIONS[activation](z), seed, dropout_p).to(input.dtype)


def dyt(input: Tensor, alpha: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Compute tanh(alpha * input) * weight + bias, where alpha has one element."""
    x = input.to(compute_dtype(input.dtype))
    output = torch.tanh(alpha.to(x.dtype).reshape(()) * x)
    if weight is not None:
        output = output * weight.to(x.dtype)
    if bias is not None:
        output = output + bias.to(x.dtype)
    return output.to(input.dtype)


def glu_forward(gate, value, output, activation, limit=math.inf, offset=0.0):
    """`glu` into output."""
    fill((output,), (glu(gate, value, activation, limit, offset),))


def glu_backward(grad_output, gate, value, grad_gate, grad_value, output, activation, limit=math.inf, offset=0.0):
    """The gradients of `glu`, and its output where there is memory for it: with u and w, gate and value as they are
    limited, d u = grad * w * activation'(u), d w = grad * activation(u), and 0 beyond the limits."""
    dy, gate, value = (t.to(compute_dtype(gate.dtype)) for t in (grad_output, gate, value))
    u, w = _limited(gate, value, limit, offset)
    factor = ACTIVATIONS[activation](u)
    du, dw = slope(activation, u, dy * w), dy * factor
    if limit < math.inf:
        du, dw = torch.where(gate <= limit, du, 0.0), torch.where(value.abs() <= limit, dw, 0.0)
    fill((grad_gate, grad_value, output), (du, dw, factor * w))


def bias_act_forward(input, bias, seed, output, activation, dropout_p):
    """Compute `bias_act` into output."""
    fill((output,), (bias_act(input, bias, seed, activation, dropout_p),))


def bias_act_backward(grad_output, input, bias, seed, grad_input, grad_bias, output, activation, dropout_p):
    """Compute the gradients of `bias_act`, and the output again unless `output` is None.

    d input = dropout(grad) * activation'(input + bias), and d bias is the sum of d input over rows. A bias of None is
    zero.
    """
    dy, z = (t.to(compute_dtype(input.dtype)) for t in (grad_output, input))
    if bias is not None:
        z = z + bias.to(z.dtype)
    dz = slope(activation, z, dropout(dy, seed, dropout_p))
    fill((grad_input, output), (dz, dropout(ACTIVATIONS[activation](z), seed, dropout_p)))
    if grad_bias is not None:
        grad_bias.copy_(dz.sum(0))


def dyt_forward(input, alpha, weight, bias, output):
    """Compute `dyt` into output."""
    fill((output,), (dyt(input, alpha, weight, bias),))


def dyt_backward(grad_output, input, alpha, weight, grad_input, grad_alpha, grad_weight, grad_bias):
    """Compute the gradients of `dyt`.

    With t = tanh(alpha * x) and the gradient of alpha * x, s = grad * weight * (1 - t**2): d x = alpha * s, d alpha is
    the sum of s * x, and d weight and d bias are the sums of grad * t and of grad over rows.
    """
    dy, x = (t.to(compute_dtype(input.dtype)) for t in (grad_output, input))
    scale = alpha.to(x.dtype).reshape(())
    t = torch.tanh(scale * x)
    s = slope("tanh", scale * x, dy if weight is None else dy * weight.to(x.dtype))
    gradients = (s * scale, (s * x).sum(), (dy * t).sum(0), dy.sum(0))
    fill((grad_input, grad_alpha, grad_weight, grad_bias), gradients)
