"""Plans of the channel norms that compute the statistics of their input."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import ops, recompute
from ..activations import CODES
from ..backends.reference import compute_dtype
from ..ops.channel_layout import last_strides, layout
from ..ops.channel_steps import GradientOptions, Options, rematerialized, slope_source
from .direct import direct, is_plain
from .plan import Plan, thread

_forward, _backward = direct("channel_norm_forward"), direct("channel_norm_backward")
_empty_like = torch.empty_like
# The memory formats by the number of dimensions.
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


class _Layout(NamedTuple):
    """The arguments of the kernels other than tensors, for inputs in one memory layout."""

    format: torch.memory_format
    forward: tuple
    backward: tuple
    # For channels last: the shape and strides of the kernels' matrix. A matrix is itself.
    matrix: tuple[tuple[int, int], tuple[int, int]] | None

    def rows(self, tensor: Tensor | None) -> Tensor | None:
        """The tensor, which has this layout, as the kernels take it."""
        return tensor if tensor is None or self.matrix is None else tensor.as_strided(*self.matrix)


class ChannelNorm(Plan):
    """Plans for (input, residual, weight, bias, given_mean, given_var), where the last two are None."""

    op = ops.channel_norm.channel_norm

    def __init__(self, input: Tensor, options: Options) -> None:
        self.options = options
        samples, channels = input.shape[:2]
        self._statistics = (samples, options.groups) if options.groups else (channels,)
        self._dtype = compute_dtype(input.dtype)
        self._contiguous = self._layout(input.shape, torch.contiguous_format)
        format = _CHANNELS_LAST.get(input.dim())
        self._last = None if format is None else self._layout(input.shape, format)
        self._last_strides = last_strides(input.shape)
        # The options of the gradient, without and with the activation's slope from the output.
        self._kept_options = [GradientOptions(*options, False, by_output) for by_output in (False, True)]

    def _layout(self, shape: torch.Size, format: torch.memory_format) -> _Layout:
        groups, eps, activation = self.options
        maps = layout(tuple(shape), format is not torch.contiguous_format, groups, "cpu")
        sizes, count = (*maps.sizes, groups), float(maps.count(groups))
        code = CODES[activation]
        is_matrix = maps.planes or len(shape) == 2
        matrix = None if is_matrix else ((maps.samples * maps.size, maps.channels), (maps.channels, 1))
        kernels = (*sizes, eps, code), (*sizes, count, eps, False, code)
        return _Layout(format, *kernels, matrix)

    def _layout_of(self, input: Tensor, other: Tensor | None) -> _Layout | None:
        """The layout of an input, as in `ops.channel_layout.maps_of`; None for strides that a plan does not support.

        `other` is a tensor that the kernel reads beside the input, and must have the same strides.
        """
        if other is not None and other.stride() != input.stride():
            return None
        if input.is_contiguous():
            return self._contiguous
        return self._last if input.stride() == self._last_strides else None

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        given_mean: None,
        given_var: None,
        plan: "ChannelNorm",
    ) -> tuple[Tensor, Tensor, Tensor]:
        layout = plan._layout_of(input, residual)
        output = _empty_like(input)
        mean = input.new_empty(plan._statistics, dtype=plan._dtype)
        var = _empty_like(mean)
        if layout is None or not plan._normalize(layout, input, residual, weight, bias, output, mean, var, False):
            return plan.fall_back(ctx, input, residual, weight, bias, None, None)
        if ctx is not None:
            other, by_output = slope_source(plan.options.activation, residual, output)
            ctx.plan, ctx.options = plan, plan._kept_options[by_output]
            ctx.mark_non_differentiable(mean, var)
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(input, other, weight, bias, mean, var)
            if thread.active:
                recompute.announce((plan.rebuilt, (input, residual, weight, bias, mean, var)))
        return output, mean, var

    @staticmethod
    def _normalize(
        layout: _Layout,
        input: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        output: Tensor,
        mean: Tensor,
        var: Tensor,
        given_statistics: bool,
    ) -> bool:
        """Computes output and, unless they are given, statistics; False if the kernel does not support a tensor."""
        rows = layout.rows
        operands = rows(input), rows(residual), weight, bias, rows(output), mean, var
        return _forward(*operands, *layout.forward, given_statistics)

    def rebuilt(self, *tensors: Tensor | None) -> Tensor:
        """Recomputes the output from input, residual, weight, bias and the statistics."""
        if is_plain(*tensors):
            input: Any = tensors[0]
            layout, output = self._layout_of(input, tensors[1]), _empty_like(input)
            if layout is not None and self._normalize(layout, *tensors[:4], output, *tensors[4:], True):
                return output
        return rematerialized(self.options, *tensors)

    def backward(self, ctx: Any, saved: Sequence[Tensor | None], grad_output: Tensor | None, *_: None) -> tuple | None:
        input, other, weight, bias, mean, var = saved
        layout = None if input is None else self._layout_of(input, other)
        if layout is None or grad_output is None:
            return None
        wanted = ctx.needs_input_grad
        gradients = (
            _empty_like(input) if wanted[0] else None,
            _empty_like(input) if wanted[1] else None,
            _empty_like(weight) if wanted[2] else None,
            _empty_like(bias) if wanted[3] else None,
        )
        rows = layout.rows
        # The full path copies gradients of another layout too.
        grad = rows(grad_output.contiguous(memory_format=layout.format))
        kept = rows(input), rows(other), weight, bias, mean, var
        large = map(rows, gradients[:2])
        if not _backward(grad, *kept, *large, *gradients[2:], *layout.backward, ctx.options.by_output):
            return None
        return *gradients, None, None, None


def channel_norm(
    input: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, options: Options
) -> ChannelNorm | None:
    """A plan, if the input is contiguous or in channels_last. None in a trace, where sizes are no integers but
    recorded or symbolic."""
    if any(type(size) is not int for size in input.shape):
        return None
    dtype = compute_dtype(input.dtype)
    is_dense = input.is_contiguous() or (input.dim() in _CHANNELS_LAST and input.stride() == last_strides(input.shape))
    if not input.numel() or not is_dense or (residual is not None and residual.dtype != input.dtype):
        return None
    return None if any(t is not None and t.dtype != dtype for t in (weight, bias)) else ChannelNorm(input, options)
