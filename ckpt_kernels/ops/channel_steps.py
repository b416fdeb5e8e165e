"""The steps of a channel norm: statistics, coefficients, outputs and gradients, each by a kernel, or all in one call.

One kernel computes the moments of every channel of every sample. Small tensors derived from these hold the statistics
of the norm (a batch norm merges moments over samples, a group norm over the channels of a group), and for each channel
of each sample the coefficients for the kernel that computes the output: activation((x - mean) * scale + bias +
residual). The backward pass has the same structure: one kernel for two sums over each channel, and one for the gradient
from coefficients.
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
    """The options of the gradient. `fixed` statistics have no gradient. `by_output` takes the activation's slope from
    the output."""

    groups: int
    eps: float
    activation: str
    fixed: bool
    by_output: bool


class Statistics(NamedTuple):
    """Mean and (biased) variance of the elements that are normalized together.

    (channels,) for a batch norm, (samples, groups) for a group norm.
    """

    mean: Tensor
    var: Tensor

    @classmethod
    def empty(cls, input: Tensor, groups: int) -> "Statistics":
        """Allocates the statistics."""
        shape = (input.shape[0], groups) if groups else (input.shape[1],)
        dtype = reference.compute_dtype(input.dtype)
        return cls(*(torch.empty(shape, dtype=dtype, device=input.device) for _ in range(2)))

    @classmethod
    def of(cls, input: Tensor, matrix: Tensor, maps: Maps, groups: int) -> "Statistics":
        """Computes the statistics of an input."""
        backend, statistics = backends.select(input), cls.empty(input, groups)
        means, squares = maps.statistics(2, matrix)
        backend.channel_moments(matrix, means, squares, maps.planes, maps.piece_rows)
        backend.channel_statistics(means, squares, *statistics, groups, maps.size, maps.piece_rows)
        return statistics

    @classmethod
    def given(cls, input: Tensor, mean: Tensor, var: Tensor) -> "Statistics":
        """Copies of given statistics in the compute dtype: an op must not return its arguments."""
        dtype = reference.compute_dtype(input.dtype)
        return cls(*(t.to(dtype, copy=True).contiguous() for t in (mean, var)))

    def coefficients(self, weight: Tensor | None, bias: Tensor | None, channels: int, eps: float) -> Tensor:
        """Mean, weight / sqrt(var + eps) and bias for each channel: (3, samples or 1, channels).

        Recomputing them gives bitwise the same values.
        """
        rows = self.mean.shape[0] if self.mean.dim() == 2 else 1
        coefficients = self.mean.new_empty(3, rows, channels)
        backends.select(self.mean).channel_coefficients(*self, vector(weight), vector(bias), coefficients, eps)
        return coefficients


def apply(
    input: Tensor, residual: Tensor | None, coefficients: Tensor, maps: Maps, activation: str, matrix: Tensor
) -> Tensor:
    """The output for these coefficients."""
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
    """The backend of the input, if the backend computes a whole channel norm in one call."""
    backend = backends.select(input)
    return backend if input.device.type in getattr(backend, "WHOLE_CHANNEL_NORMS", ()) else None


def slope_source(activation: str, residual: Tensor | None, output: Tensor) -> tuple[Tensor | None, bool]:
    """The tensor to keep beside the input for the activation's slope, and whether that is the output.

    While outputs are discarded the tensor is the residual, which in a network another layer's recipe holds, or keeps,
    anyway.
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
    """The output and the statistics, which are either given or computed."""
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
    """Recomputes the output from the kept tensors."""
    return normalized(input, residual, weight, bias, Statistics(*statistics), options)[0]


def gradient_sums(
    grads: Tensor, matrix: Tensor, other: Tensor | None, coefficients: Tensor, maps: Maps, options: tuple
) -> Tensor:
    """The sums of g, the gradient before the norm, and of g * (x - mean) over each piece of each channel.

    (2, samples, pieces, channels).
    """
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
    """The coefficients of the backward pass, (6, samples or 1, channels). Also fills the gradients of weight and
    bias."""
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
    """The gradients of input and residual for these coefficients."""
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
