"""The steps of a channel norm: statistics, coefficients, outputs and gradients, each by a kernel, or all in one call.

Every channel of every sample is a set of numbers, whose moments one kernel finds. From these, in small tensors, come
the statistics of each norm (a batch norm merges the moments over samples, a group norm over the channels of a group)
and for each channel of each sample the coefficients by which another kernel makes the output: activation((x - mean) *
scale + bias + residual). Backward likewise: a kernel for two sums over each set, and one for the gradient from
coefficients.
"""

from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from .. import backends, recompute
from ..activations import SIGNED_BY_OUTPUT
from ..backends import reference
from .channel_layout import Maps, maps_of
from .operands import vector


class Options(NamedTuple):
    groups: int
    eps: float
    activation: str


class GradientOptions(NamedTuple):
    """`fixed` statistics have no gradient; `by_output` the activation's slope comes from the output."""

    groups: int
    eps: float
    activation: str
    fixed: bool
    by_output: bool


class Statistics(NamedTuple):
    """Mean and (biased) variance of what is normalised together: (channels,) for a batch norm, (samples, groups) for a
    group norm."""

    mean: Tensor
    var: Tensor

    @classmethod
    def empty(cls, input: Tensor, groups: int) -> "Statistics":
        shape = (input.shape[0], groups) if groups else (input.shape[1],)
        dtype = reference.compute_dtype(input.dtype)
        return cls(*(torch.empty(shape, dtype=dtype, device=input.device) for _ in range(2)))

    @classmethod
    def of(cls, input: Tensor, matrix: Tensor, maps: Maps, groups: int) -> "Statistics":
        backend, found = backends.select(input), cls.empty(input, groups)
        means, squares = maps.statistics(2, matrix)
        backend.channel_moments(matrix, means, squares, maps.planes, maps.piece_rows)
        backend.channel_statistics(means, squares, *found, groups, maps.size, maps.piece_rows)
        return found

    @classmethod
    def given(cls, input: Tensor, mean: Tensor, var: Tensor) -> "Statistics":
        """Copies in the compute type: what an op returns is not what it was given."""
        dtype = reference.compute_dtype(input.dtype)
        return cls(*(t.to(dtype, copy=True).contiguous() for t in (mean, var)))

    def coefficients(self, weight: Tensor | None, bias: Tensor | None, channels: int, eps: float) -> Tensor:
        """Mean, weight / sqrt(var + eps) and bias for each channel of each sample, or of all: (3, samples or 1,
        channels). The same to the last bit whenever they are found."""
        rows = self.mean.shape[0] if self.mean.dim() == 2 else 1
        found = self.mean.new_empty(3, rows, channels)
        backends.select(self.mean).channel_coefficients(*self, vector(weight), vector(bias), found, eps)
        return found


def apply(
    input: Tensor, residual: Tensor | None, coefficients: Tensor, maps: Maps, activation: str, matrix: Tensor
) -> Tensor:
    """The output by these coefficients."""
    output = maps.empty(input)
    if not input.numel():
        return output
    backends.select(input).channel_forward(
        matrix,
        maps.matrix(residual),
        coefficients,
        maps.matrix(output),
        maps.planes,
        maps.samples,
        activation,
    )
    return output


def single_call_backend(input: Tensor) -> ModuleType | None:
    """The backend that serves, if it takes all steps of such a norm in one call."""
    backend = backends.select(input)
    return backend if input.device.type in getattr(backend, "WHOLE_CHANNEL_NORMS", ()) else None


def slope_source(activation: str, residual: Tensor | None, output: Tensor) -> tuple[Tensor | None, bool]:
    """What is kept to find the activation's slope beside the input, and whether it is the output.

    Where outputs are let go of it is the residual, which in a network another layer's recipe has, or keeps, anyway.
    """
    if residual is None or activation == "identity":
        return None, False
    if recompute.discarding() is not None:
        return residual, False
    return (output, True) if activation in SIGNED_BY_OUTPUT else (residual, False)


def normalized(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    given: Statistics | None,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor]:
    """The output and its statistics: those given, or else found."""
    maps = maps_of(input, options.groups)
    if not input.numel():
        return maps.empty(input), *(given or (t.zero_() for t in Statistics.empty(input, options.groups)))
    matrix = maps.matrix(input)
    if (backend := single_call_backend(input)) is not None:
        output, statistics = maps.empty(input), given or Statistics.empty(input, options.groups)
        operands = (matrix, maps.matrix(residual), vector(weight), vector(bias), maps.matrix(output), *statistics)
        backend.channel_norm_forward(*operands, *maps.sizes, *options, given is not None)
        return output, *statistics
    statistics = given or Statistics.of(input, matrix, maps, options.groups)
    coefficients = statistics.coefficients(weight, bias, maps.channels, options.eps)
    return apply(input, residual, coefficients, maps, options.activation, matrix), *statistics


def rematerialized(
    options: Options,
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *statistics: Tensor,
) -> Tensor:
    """The output again, from what is kept."""
    return normalized(input, residual, weight, bias, Statistics(*statistics), options)[0]


def gradient_sums(
    grads: Tensor, matrix: Tensor, other: Tensor | None, coefficients: Tensor, maps: Maps, options: tuple
) -> Tensor:
    """The sums of g, the gradient before the norm, and of g * (x - mean) over each piece of each channel of each
    sample: (2, samples, pieces, channels)."""
    sums = maps.statistics(2, matrix)
    backends.select(matrix).channel_sums(
        grads, matrix, other, coefficients, *sums, maps.planes, maps.piece_rows, *options
    )
    return sums


def backward_coefficients(
    coefficients: Tensor,
    sums: Tensor,
    var: Tensor,
    weight: Tensor | None,
    affine: Sequence[Tensor | None],
    count: float,
    options: GradientOptions,
) -> Tensor:
    """The coefficients of the backward pass: (6, samples or 1, channels). And the gradients of weight and bias."""
    six = coefficients.new_empty(6, *coefficients.shape[1:])
    six[:3] = coefficients
    groups, eps, _, fixed, _ = options
    backends.select(coefficients).channel_backward_coefficients(
        *sums, var, weight, six, *affine, groups, count, eps, fixed
    )
    return six


def input_gradients(
    grads: Tensor,
    matrix: Tensor,
    other: Tensor | None,
    coefficients: Tensor,
    maps: Maps,
    options: tuple,
    wanted: list[bool],
    input: Tensor,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of input and residual by these coefficients."""
    grad_input = maps.empty(input) if wanted[0] else None
    grad_residual = maps.empty(input) if wanted[1] else None
    if input.numel() and (wanted[0] or wanted[1]):
        backends.select(matrix).channel_backward(
            grads,
            matrix,
            other,
            coefficients,
            maps.matrix(grad_input),
            maps.matrix(grad_residual),
            maps.planes,
            maps.samples,
            *options,
        )
    return grad_input, grad_residual
