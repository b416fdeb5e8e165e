"""The channel-norm op: batch, group and instance norm, with an activation and a residual added before it.

One way to compute all of them. Every channel of every sample is a set of numbers, whose moments one kernel finds. From
these, in small tensors, come the statistics of each norm (a batch norm merges the moments over samples, a group norm
over the channels of a group) and for each channel of each sample the coefficients by which another kernel makes the
output: activation((x - mean) * scale + bias + residual). Backward likewise: a kernel for two sums over each set, and
one for the gradient from coefficients.

Kept for backward: the input, and the statistics, from which the coefficients are found again to the last bit. With a
residual, what says how the activation slopes: for relu and leaky_relu the output, whose sign is that of what the
activation was given, and which whatever reads it keeps too; for other activations the residual; for the identity
neither.
"""

import functools
import math
from collections.abc import Collection, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from .. import backends, recompute
from ..activations import SIGNED_BY_OUTPUT
from ..backends import reference
from .block import Block
from .operands import constant, in_dtypes_of, vector, wide, zero
from .sharding import Sharding, channels_of_input, every_dim, like_input

# How many pieces the rows of a channels-last tensor are summed in: enough to keep every processor busy, few enough
# that the pieces' own sums cost nothing. Fixed for a device, so that results do not depend on the number of threads.
_PIECES = {"cpu": 64}
_PIECES_ELSEWHERE = 512
_LEAST_ROWS = 64


class Layout(NamedTuple):
    """How (samples, channels, *space) lies in memory.

    As planes, (samples * channels, size) with a channel a row; or channels last, (samples * size, channels).
    """

    planes: bool
    samples: int
    channels: int
    size: int
    piece_rows: int  # of a sample, that are summed together; a whole plane where there are planes

    @property
    def pieces(self) -> int:
        return 1 if self.planes else -(-self.size // self.piece_rows)

    def matrix(self, tensor: Tensor | None) -> Tensor | None:
        """As a contiguous matrix: a view where `tensor` lies so, else a copy."""
        if tensor is None:
            return None
        if self.planes:
            return tensor.contiguous().view(self.samples * self.channels, self.size)
        rows = self.samples * self.size
        if tensor.stride() == _last_strides(tensor.shape):
            # One view instead of three, which small inputs feel.
            return tensor.as_strided((rows, self.channels), (self.channels, 1))
        return tensor.movedim(1, -1).contiguous().view(rows, self.channels)

    def empty(self, like: Tensor) -> Tensor:
        """Memory for a result of this shape, laid out in this way.

        Not a view of anything: autograd adds gradients up in place only where nobody else has their memory.
        """
        strides = _last_strides(like.shape)
        # Where a channel has one element in each sample, both ways are one, and strides only say which it is meant to
        # be; to torch, three dimensions never have their channels last.
        if self.planes or (like.is_contiguous() and (like.dim() == 3 or like.stride() != strides)):
            return torch.empty(like.shape, dtype=like.dtype, device=like.device)
        return torch.empty_strided(like.shape, strides, dtype=like.dtype, device=like.device)

    def statistics(self, count: int, like: Tensor) -> Tensor:
        """Memory for `count` numbers for each piece of each channel: (count, samples, pieces, channels)."""
        shape = (count, self.samples, self.pieces, self.channels)
        return torch.empty(shape, dtype=reference.compute_dtype(like.dtype), device=like.device)


def _last_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """The strides of a dense (samples, channels, *space) with channels last."""
    strides, step = [], shape[1]
    for size in reversed(shape[2:]):
        strides.append(step)
        step = step * size
    return (step, 1, *reversed(strides))


def layout_of(input: Tensor, groups: int) -> Layout:
    """The layout to compute in, which is that of the output: channels last where torch's memory format says so.

    A batch norm (no groups) takes all samples of a channels-last tensor as one.
    """
    last = (
        not input.is_contiguous()
        and input.dim() in (4, 5)
        # The first of these is the answer to most, and costs less.
        and (input.stride() == _last_strides(input.shape) or suggest_memory_format(input) != torch.contiguous_format)
    )
    arguments = (tuple(input.shape), last, groups, input.device.type)
    try:
        return _layout(*arguments)
    except TypeError:  # of sizes that torch.compile knows only by name, which no cache can hold
        return _layout.__wrapped__(*arguments)


@functools.lru_cache(maxsize=1024)
def _layout(shape: tuple[int, ...], last: bool, groups: int, device: str) -> Layout:
    samples, channels = shape[:2]
    size = math.prod(shape[2:])
    if not (last or len(shape) == 2 or size == 1):
        return Layout(True, samples, channels, size, size)
    if groups == 0:
        samples, size = 1, samples * size
    most = max(_PIECES.get(device, _PIECES_ELSEWHERE) // max(samples, 1), 1)
    least = min(max(-(-size // most), _LEAST_ROWS), max(size, 1))
    # Pieces of one size where that is not much larger: they merge in fewer steps.
    even = next((rows for rows in range(least, 2 * least) if size % rows == 0), least)
    return Layout(False, samples, channels, size, even)


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
    def of(cls, input: Tensor, matrix: Tensor, layout: Layout, groups: int) -> "Statistics":
        backend, found = backends.select(input), cls.empty(input, groups)
        means, squares = layout.statistics(2, matrix)
        backend.channel_moments(matrix, means, squares, layout.planes, layout.piece_rows)
        backend.channel_statistics(means, squares, *found, groups, layout.size, layout.piece_rows)
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
    input: Tensor, residual: Tensor | None, coefficients: Tensor, layout: Layout, activation: str, matrix: Tensor
) -> Tensor:
    """The output by these coefficients."""
    output = layout.empty(input)
    if not input.numel():
        return output
    backends.select(input).channel_forward(
        matrix,
        layout.matrix(residual),
        coefficients,
        layout.matrix(output),
        layout.planes,
        layout.samples,
        activation,
    )
    return output


def _whole(input: Tensor) -> ModuleType | None:
    """The backend that serves, if it takes all steps of such a norm in one call."""
    backend = backends.select(input)
    return backend if input.device.type in getattr(backend, "WHOLE_CHANNEL_NORMS", ()) else None


def _place(layout: Layout) -> tuple[bool, int, int]:
    return layout.planes, layout.samples, layout.piece_rows


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
    options: "Options",
) -> tuple[Tensor, Tensor, Tensor]:
    """The output and its statistics: those given, or else found."""
    layout = layout_of(input, options.groups)
    if not input.numel():
        return layout.empty(input), *(given or (t.zero_() for t in Statistics.empty(input, options.groups)))
    matrix = layout.matrix(input)
    if (backend := _whole(input)) is not None:
        output, statistics = layout.empty(input), given or Statistics.empty(input, options.groups)
        operands = (matrix, layout.matrix(residual), vector(weight), vector(bias), layout.matrix(output), *statistics)
        backend.channel_norm_forward(*operands, *_place(layout), *options, given is not None)
        return output, *statistics
    statistics = given or Statistics.of(input, matrix, layout, options.groups)
    coefficients = statistics.coefficients(weight, bias, layout.channels, options.eps)
    return apply(input, residual, coefficients, layout, options.activation, matrix), *statistics


def rematerialized(
    options: "Options",
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *statistics: Tensor,
) -> Tensor:
    """The output again, from what is kept."""
    return normalized(input, residual, weight, bias, Statistics(*statistics), options)[0]


def gradient_sums(
    grads: Tensor, matrix: Tensor, other: Tensor | None, coefficients: Tensor, layout: Layout, options: tuple
) -> Tensor:
    """The sums of g, the gradient before the norm, and of g * (x - mean) over each piece of each channel of each
    sample: (2, samples, pieces, channels)."""
    sums = layout.statistics(2, matrix)
    backends.select(matrix).channel_sums(
        grads, matrix, other, coefficients, *sums, layout.planes, layout.piece_rows, *options
    )
    return sums


def backward_coefficients(
    coefficients: Tensor,
    sums: Tensor,
    var: Tensor,
    weight: Tensor | None,
    affine: Sequence[Tensor | None],
    count: float,
    options: "GradientOptions",
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
    layout: Layout,
    options: tuple,
    wanted: list[bool],
    input: Tensor,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of input and residual by these coefficients."""
    grad_input = layout.empty(input) if wanted[0] else None
    grad_residual = layout.empty(input) if wanted[1] else None
    if input.numel() and (wanted[0] or wanted[1]):
        backends.select(matrix).channel_backward(
            grads,
            matrix,
            other,
            coefficients,
            layout.matrix(grad_input),
            layout.matrix(grad_residual),
            layout.planes,
            layout.samples,
            *options,
        )
    return grad_input, grad_residual


def _splits(arguments: Sequence[Any]) -> Collection[int]:
    """Samples where each has statistics of its own, channels where these have, anything where statistics are given."""
    given_mean, _, options = arguments[4:]
    if given_mean is not None:
        return every_dim(arguments)
    return (0,) if options.groups else (1,)


def _statistics_of_input(statistics: Tensor, arguments: Sequence[Any]) -> Sequence[int | None]:
    """(channels,), or (samples, groups)."""
    return (1,) if statistics.dim() == 1 else (0, None)


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


class _ChannelNorm(Block):
    name = "channel_norm"
    operands = "Tensor input, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? given_mean, Tensor? given_var"
    differentiable = 4
    options = Options
    results = ("output", "mean", "var")
    returned = 3
    kept = "Tensor input, Tensor? other, Tensor? weight, Tensor? bias, Tensor mean, Tensor var"
    kept_options = GradientOptions
    sharding = Sharding(
        _splits,
        (like_input, like_input, *(channels_of_input,) * 4),
        (like_input, _statistics_of_input, _statistics_of_input),
    )

    def empty(self, input: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        groups = rest[-1].groups
        return layout_of(input, groups).empty(input), *Statistics.empty(input, groups)

    def forward(self, input: Tensor, residual: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
        weight, bias, given_mean, given_var, options = rest
        given = None if given_mean is None else Statistics.given(input, given_mean, given_var)
        return normalized(input, residual, weight, bias, given, options)

    def keep(self, arguments: Sequence[Any], results: Sequence[Tensor], wanted: Sequence[bool]) -> tuple:
        input, residual, weight, bias, given_mean, _, options = arguments
        other, by_output = slope_source(options.activation, residual, results[0])
        kept = (input, other, weight, bias, *self._statistics(arguments, results))
        return kept, GradientOptions(*options, given_mean is not None, by_output)

    def recipe(self, ctx: Any, arguments: Sequence[Any], results: Sequence[Tensor]) -> tuple:
        operands = (*arguments[:4], *self._statistics(arguments, results))
        return functools.partial(rematerialized, arguments[-1]), operands

    def _statistics(self, arguments: Sequence[Any], results: Sequence[Tensor]) -> Sequence[Tensor]:
        """The caller's own where these can be kept, copies in the compute type else."""
        found, given = results[1:], arguments[4:6]
        if given[0] is not None and all(t.dtype == found[0].dtype and t.is_contiguous() for t in given):
            return given
        return found

    def gradients(
        self, grads: Sequence[Tensor], kept: Sequence[Tensor | None], options: GradientOptions, wanted: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        input, other, weight, bias, *statistics = kept
        var = statistics[1]
        layout = layout_of(input, options.groups)
        affine = [wide(t, var.dtype) if w else None for t, w in zip((weight, bias), wanted[2:], strict=True)]
        if not input.numel():
            zero(*affine)
            large = [layout.empty(input) if w else None for w in wanted[:2]]
            return in_dtypes_of((input, input, weight, bias), (*large, *affine))
        matrix, grad, other = (layout.matrix(t) for t in (input, *grads, other))
        count = float(layout.size * (layout.channels // options.groups if options.groups else layout.samples))
        if (backend := _whole(input)) is not None:
            large = [layout.empty(input) if w else None for w in wanted[:2]]
            operands = (grad, matrix, other, vector(weight), vector(bias), *statistics)
            groups, eps, activation, fixed, by_output = options
            numbers = (groups, count, eps, fixed, activation, by_output)
            backend.channel_norm_backward(*operands, *map(layout.matrix, large), *affine, *_place(layout), *numbers)
        else:
            slopes = (options.activation, options.by_output)
            coefficients = Statistics(*statistics).coefficients(weight, bias, layout.channels, options.eps)
            sums = gradient_sums(grad, matrix, other, coefficients, layout, slopes)
            six = backward_coefficients(coefficients, sums, var, vector(weight), affine, count, options)
            large = input_gradients(grad, matrix, other, six, layout, slopes, wanted, input)
        return in_dtypes_of((input, input, weight, bias), (*large, *affine))

    def empty_gradients(
        self, grads: Sequence[Tensor], kept: Sequence[Tensor | None], options: GradientOptions, wanted: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        input, _, *affine = kept[:4]
        layout = layout_of(input, options.groups)
        large = [layout.empty(input) if w else None for w in wanted[:2]]
        return *large, *super().empty_gradients(grads, affine, options, wanted[2:])

    def composition(self, input: Tensor, residual: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
        weight, bias, *given, options = rest
        given = map(constant, given)
        output, mean, var = reference.channel_norm(input, residual, weight, bias, *given, *options)
        return output, constant(mean), constant(var)

    def first_order(
        self, grads: Sequence[Tensor], kept: Sequence[Tensor | None], options: GradientOptions, wanted: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        input, other, weight, bias, mean, var = kept
        groups, eps, activation, fixed, by_output = options
        given = (mean, var) if fixed else (None, None)

        def block(input: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor]:
            if by_output:
                # What added to the norm gives the output: its sign is all that matters.
                norm = reference.channel_norm(input, None, weight, bias, *given, groups, eps, "identity")[0]
                residual = (other - norm).detach() + residual - residual.detach()
            return (reference.channel_norm(input, residual, weight, bias, *given, groups, eps, activation)[0],)

        residual = None if by_output else other
        if residual is None and (by_output or wanted[1]):
            residual = torch.zeros_like(input, requires_grad=True)
        return reference.gradients(block, (input, residual, weight, bias), grads, wanted)


channel_norm = _ChannelNorm()
