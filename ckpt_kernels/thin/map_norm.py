"""Plans of the norms over the channels of maps."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops, recompute
from ..activations import CODES
from ..backends.reference import compute_dtype
from ..ops.channel_layout import last_strides
from ..ops.map_norm import MapNormOptions, as_map
from .direct import direct, is_plain
from .plan import Plan, thread

_forward, _backward = direct("map_norm_forward"), direct("map_norm_backward")
_empty_like, _empty_strided = torch.empty_like, torch.empty_strided


class MapNorm(Plan):
    """Plans for (input, weight, bias)."""

    op = ops.map_norm.map_norm

    def __init__(self, input: Tensor, options: MapNormOptions) -> None:
        self.options = options
        eps, self._centered, activation, *others, channels_last = options
        self._pixels, self._shape = input.numel() // input.shape[1], tuple(input.shape)
        contiguous = torch.empty(input.shape, device="meta").stride()
        self._strides = last_strides(self._shape) if channels_last else contiguous
        self._dtype, self._statistics = input.dtype, compute_dtype(input.dtype)
        self._native = (CODES[activation], *others)
        self._native_forward = (eps, *self._native)

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor | None, bias: Tensor | None, plan: "MapNorm") -> Tensor:
        rstd = input.new_empty(plan._pixels, dtype=plan._statistics)
        mean = _empty_like(rstd) if plan._centered else None
        output = plan._normalized(input, weight, bias, mean, rstd, False)
        if output is None:
            return plan.fall_back(ctx, input, weight, bias)
        if ctx is not None:
            kept = (input, weight, bias, mean, rstd)
            ctx.plan, ctx.options = plan, plan.options
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(*kept)
            if thread.active:
                recompute.announce((plan.rebuilt, kept))
        return output

    def _normalized(
        self,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor | None,
        rstd: Tensor,
        given_statistics: bool,
    ) -> Tensor | None:
        """The output; None if the kernel does not support a tensor."""
        output = _empty_strided(self._shape, self._strides, dtype=self._dtype)
        is_computed = _forward(input, weight, bias, mean, rstd, output, *self._native_forward, given_statistics)
        return output if is_computed else None

    def backward(self, ctx: Any, saved: Sequence[Tensor | None], grad_output: Tensor | None) -> tuple | None:
        input, weight, bias, mean, rstd = saved
        if input is None or grad_output is None:
            return None
        wants_input, wants_weight, wants_bias, _ = ctx.needs_input_grad
        gradients = (
            _empty_like(input) if wants_input else None,
            _empty_like(weight) if wants_weight else None,
            _empty_like(bias) if wants_bias else None,
        )
        others = (input, weight, bias, mean, rstd, *gradients, *self._native)
        if not (_backward(grad_output, *others) or _backward(as_map(grad_output), *others)):
            return None
        return *gradients, None

    def rebuilt(self, *kept: Tensor | None) -> Tensor:
        """Recomputes the output from the kept tensors."""
        output = self._normalized(*kept, True) if is_plain(*kept) else None
        return ops.map_norm.rebuilt(kept, self.options) if output is None else output


def map_norm(input: Tensor, weight: Tensor | None, bias: Tensor | None, options: MapNormOptions) -> MapNorm | None:
    """A plan, for weights in the compute dtype. None in a trace, where sizes are no integers but recorded or
    symbolic."""
    dtype = compute_dtype(input.dtype)
    if any(type(size) is not int for size in input.shape) or input.shape[1] == 1 or not input.numel():
        return None
    return None if any(t is not None and t.dtype != dtype for t in (weight, bias)) else MapNorm(input, options)
