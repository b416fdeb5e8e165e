"""The channel-norm op: batch, group and instance norm, with an activation and a residual that is added before the
activation.

Kept for backward are the input and the statistics, from which the coefficients are recomputed bitwise equal. With a
residual, one more tensor gives the slope of the activation. For relu and leaky_relu this is the output, which its
reader keeps too: the sign of the output equals that of the activation's input. For other activations this is the
residual, for the identity there is none.
"""

import functools
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends import reference
from .block import Block
from .channel_layout import maps_of
from .channel_steps import (
    GradientOptions,
    Options,
    Statistics,
    backward_coefficients,
    gradient_sums,
    input_gradients,
    normalized,
    rematerialized,
    single_call_backend,
    slope_source,
)
from .operands import constant, in_dtypes_of, vector, wide_empty, zero
from .sharding import Sharding, channels_of_input, every_dim, like_input


def _splits(arguments: Sequence[Any]) -> Collection[int]:
    """The dimensions that may be split: samples if each has statistics, channels if they have, all if statistics are
    given."""
    given_mean, _, options = arguments[4:]
    if given_mean is not None:
        return every_dim(arguments)
    return (0,) if options.groups else (1,)


def _statistics_of_input(statistics: Tensor, arguments: Sequence[Any]) -> Sequence[int | None]:
    """The input's dimensions of statistics, which are (channels,) or (samples, groups)."""
    return (1,) if statistics.dim() == 1 else (0, None)


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
        return maps_of(input, groups).empty(input), *Statistics.empty(input, groups)

    def forward(self, input: Tensor, residual: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
        weight, bias, given_mean, given_var, options = rest
        given = None if given_mean is None else Statistics.given(input, given_mean, given_var)
        return normalized(input, residual, weight, bias, given, options)

    def keep(self, arguments: Sequence[Any], results: Sequence[Tensor], wanted: Sequence[bool]) -> tuple:
        input, residual, weight, bias, given_mean, _, options = arguments
        other, by_output = slope_source(options.activation, residual, results[0])
        # The slope belongs to the values that the forward pass computed.
        statistics = results[1:] if options.activation != "identity" else self._statistics(arguments, results)
        kept = (input, other, weight, bias, *statistics)
        return kept, GradientOptions(*options, given_mean is not None, by_output)

    def recipe(self, ctx: Any, arguments: Sequence[Any], results: Sequence[Tensor]) -> tuple:
        return functools.partial(rematerialized, arguments[-1]), (*arguments[:4], *results[1:])

    def _statistics(self, arguments: Sequence[Any], results: Sequence[Tensor]) -> Sequence[Tensor]:
        """The caller's statistics if they can be kept, as torch keeps them; else copies in the compute dtype.

        A later forward pass in training updates a module's running statistics, and no version counter shows that.
        """
        own, given = results[1:], arguments[4:6]
        if given[0] is not None and all(t.dtype == own[0].dtype and t.is_contiguous() for t in given):
            return given
        return own

    def gradients(
        self, grads: Sequence[Tensor], kept: Sequence[Tensor | None], options: GradientOptions, wanted: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        input, other, weight, bias, *statistics = kept
        var = statistics[1]
        maps = maps_of(input, options.groups)
        affine = [wide_empty(t, var.dtype) if w else None for t, w in zip((weight, bias), wanted[2:], strict=True)]
        if not input.numel():
            zero(*affine)
            large = [maps.empty(input) if w else None for w in wanted[:2]]
            return in_dtypes_of((input, input, weight, bias), (*large, *affine))
        matrix, grad, other = (maps.matrix(t) for t in (input, *grads, other))
        count = float(maps.count(options.groups))
        if (backend := single_call_backend(input)) is not None:
            large = [maps.empty(input) if w else None for w in wanted[:2]]
            operands = (grad, matrix, other, vector(weight), vector(bias), *statistics)
            groups, eps, activation, fixed, by_output = options
            numbers = (groups, count, eps, fixed, activation, by_output)
            backend.channel_norm_backward(*operands, *map(maps.matrix, large), *affine, *maps.sizes, *numbers)
        else:
            slopes = (options.activation, options.by_output)
            coefficients = Statistics(*statistics).coefficients(weight, bias, maps.channels, options.eps)
            sums = gradient_sums(grad, matrix, other, coefficients, maps, slopes)
            six = backward_coefficients(coefficients, sums, var, vector(weight), affine, count, options)
            large = input_gradients(grad, matrix, other, six, maps, slopes, wanted, input)
        return in_dtypes_of((input, input, weight, bias), (*large, *affine))

    def empty_gradients(
        self, grads: Sequence[Tensor], kept: Sequence[Tensor | None], options: GradientOptions, wanted: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        input, _, *affine = kept[:4]
        maps = maps_of(input, options.groups)
        large = [maps.empty(input) if w else None for w in wanted[:2]]
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
                # The residual that gives this output. Only its sign matters.
                norm = reference.channel_norm(input, None, weight, bias, *given, groups, eps, "identity")[0]
                residual = (other - norm).detach() + residual - residual.detach()
            return (reference.channel_norm(input, residual, weight, bias, *given, groups, eps, activation)[0],)

        residual = None if by_output else other
        if residual is None and (by_output or wanted[1]):
            residual = torch.zeros_like(input, requires_grad=True)
        return reference.gradients(block, (input, residual, weight, bias), grads, wanted)


channel_norm = _ChannelNorm()
