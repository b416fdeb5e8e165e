"""Plans of the channel norms that compute the statistics of their input."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops, recompute
from ..activations import CODES
from ..backends.reference import compute_dtype
from ..ops.channel_layout import maps_of
from ..ops.channel_steps import GradientOptions, Options, rematerialized, slope_source
from .direct import direct, is_plain
from .plan import Plan, thread

_forward, _backward = direct("channel_norm_forward"), direct("channel_norm_backward")
_empty_like = torch.empty_like


class ChannelNorm(Plan):
    """Plans for (input, residual, weight, bias, given_mean, given_var), where the last two are None."""

    op = ops.channel_norm.channel_norm

    def __init__(self, input: Tensor, options: Options) -> None:
        self.options = options
        groups, eps, activation = options
        samples, channels = input.shape[:2]
        maps = maps_of(input, groups)
        count = maps.count(groups)
        sizes = (*maps.sizes, groups)
        self._statistics = (samples, groups) if groups else (channels,)
        self._dtype = compute_dtype(input.dtype)
        self._native_forward = (*sizes, eps, CODES[activation])
        self._native_backward = (*sizes, float(count), eps, False, CODES[activation])
        # The options of the gradient, without and with the activation's slope from the output.
        self._kept_options = [GradientOptions(*options, False, by_output) for by_output in (False, True)]

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
        if not _forward(input, residual, weight, bias, output, mean, var, *plan._native_forward, False):
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

    def rebuilt(self, *tensors: Tensor | None) -> Tensor:
        """Recomputes the output from input, residual, weight, bias and the statistics."""
        if is_plain(*tensors):
            output = _empty_like(tensors[0])
            if _forward(*tensors[:4], output, *tensors[4:], *self._native_forward, True):
                return output
        return rematerialized(self.options, *tensors)

    def backward(self, ctx: Any, saved: Sequence[Tensor | None], grad_output: Tensor | None, *_: None) -> tuple | None:
        input, _, weight, bias, _, _ = saved
        wanted = ctx.needs_input_grad
        gradients = (
            _empty_like(input) if wanted[0] else None,
            _empty_like(input) if wanted[1] else None,
            _empty_like(weight) if wanted[2] else None,
            _empty_like(bias) if wanted[3] else None,
        )
        others = (*saved, *gradients, *self._native_backward, ctx.options.by_output)
        if not _backward(grad_output, *others):
            # The full path copies such gradients too.
            is_copied = grad_output is not None and not grad_output.is_contiguous()
            if not is_copied or not _backward(grad_output.contiguous(), *others):
                return None
        return *gradients, None, None, None


def channel_norm(
    input: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, options: Options
) -> ChannelNorm | None:
    """A plan, if the input is contiguous."""
    dtype = compute_dtype(input.dtype)
    if not input.numel() or not input.is_contiguous() or (residual is not None and residual.dtype != input.dtype):
        return None
    return None if any(t is not None and t.dtype != dtype for t in (weight, bias)) else ChannelNorm(input, options)
