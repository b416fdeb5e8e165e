"""Plans of the channel norms, by the statistics of their input."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..activations import CODES
from ..backends.reference import compute_dtype
from ..ops.channel_norm import layout_of, slope_source
from .direct import direct
from .plan import Plan, thread

_forward, _backward = direct("channel_norm_forward"), direct("channel_norm_backward")
_empty_like = torch.empty_like


class ChannelNorm(Plan):
    """Of (input, residual, weight, bias, given_mean, given_var), where the last two are None."""

    op = ops.channel_norm.channel_norm

    def __init__(self, input: Tensor, options: tuple) -> None:
        groups, eps, activation = self.options = options
        samples, channels = input.shape[:2]
        layout = layout_of(input, groups)
        self._statistics = (samples, groups) if groups else (channels,)
        self._coefficients = (3, samples if groups else 1, channels)
        self._place = (layout.planes, layout.samples, layout.piece_rows, groups)
        count = layout.size * (layout.channels // groups if groups else layout.samples)
        self._forward_options = (*self._place, eps, CODES[activation])
        self._backward_options = (*self._place, float(count), eps, False, CODES[activation])
        self._dtype = compute_dtype(input.dtype)

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
        output = _empty_like(input)
        mean = input.new_empty(plan._statistics, dtype=plan._dtype)
        var = _empty_like(mean)
        coefficients = mean.new_empty(plan._coefficients)
        operands = (input, residual, weight, bias)
        if not _forward(*operands, output, mean, var, coefficients, *plan._forward_options):
            return plan.refused(ctx, *operands, None, None)
        if ctx is not None:
            ctx.plan = plan
            ctx.mark_non_differentiable(mean, var)
            ctx.set_materialize_grads(False)
            other, ctx.by_output = slope_source(plan.options[2], residual, output)
            ctx.save_for_backward(input, other, weight, bias, mean, var, coefficients)
            if thread.active:
                plan.announce(ctx, (*operands, None, None), (output, mean, var, coefficients))
        return output, mean, var

    def backward(self, ctx: Any, saved: Sequence[Tensor | None], grad_output: Tensor, *_: None) -> tuple | None:
        input, other, weight, bias, mean, var, coefficients = saved
        wanted = ctx.needs_input_grad
        gradients = (
            _empty_like(input) if wanted[0] else None,
            _empty_like(input) if wanted[1] else None,
            _empty_like(weight) if wanted[2] else None,
            _empty_like(bias) if wanted[3] else None,
        )
        operands = (grad_output, input, other, weight, var, coefficients)
        if not _backward(*operands, *gradients, *self._backward_options, ctx.by_output):
            return None
        return *gradients, None, None, None

    def restore(self, ctx: Any) -> None:
        ctx.groups, ctx.eps, ctx.activation = self.options
        ctx.fixed = False


def channel_norm(
    input: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, options: tuple
) -> ChannelNorm | None:
    """Of a contiguous input."""
    dtype = compute_dtype(input.dtype)
    if not input.numel() or not input.is_contiguous() or (residual is not None and residual.dtype != input.dtype):
        return None
    return None if any(t is not None and t.dtype != dtype for t in (weight, bias)) else ChannelNorm(input, options)
