"""Plans of the row norms."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..activations import CODES
from ..backends.reference import compute_dtype
from . import Plan, _thread
from .direct import direct

_forward = direct("row_norm_forward")
_backward = direct("row_norm_backward")
_empty_like = torch.empty_like


class RowNorm(Plan):
    """Of (input, weight, bias); see `ops.row_norm`."""

    op = ops.row_norm.row_norm

    def __init__(self, input: Tensor, options: tuple) -> None:
        columns, eps, self._centered, pre_activation, activation, weight_offset, cast_before_weight = options
        self.options = options
        self._rows = input.numel() // columns
        self._native = (eps, CODES[pre_activation], CODES[activation], weight_offset, cast_before_weight)
        self._dtype = compute_dtype(input.dtype)

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor | None, bias: Tensor | None, plan: "RowNorm") -> Tensor:
        rstd = input.new_empty(plan._rows, dtype=plan._dtype)
        mean = _empty_like(rstd) if plan._centered else None
        output = _empty_like(input)
        if not _forward(input, weight, bias, output, mean, rstd, *plan._native, False):
            return plan.refused(ctx, input, weight, bias)
        if ctx is not None:
            wanted = ctx.needs_input_grad
            if not (wanted[0] or wanted[1]):
                # What is kept for a bias alone is less.
                return plan.refused(ctx, input, weight, bias)
            mean = rstd if mean is None else mean  # in a place that nobody reads
            ctx.plan = plan
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(input, weight, bias, mean, rstd)
            if _thread.active:
                plan.announce(ctx, (input, weight, bias), (output, mean, rstd))
        return output

    def backward(self, wanted: Sequence[bool], saved: Sequence[Tensor | None], grad_output: Tensor) -> tuple | None:
        input, weight, bias, mean, rstd = saved
        grad_input = _empty_like(input) if wanted[0] else None
        grad_weight = _empty_like(weight) if wanted[1] else None
        grad_bias = _empty_like(bias) if wanted[2] else None
        mean = mean if self._centered else None
        gradients = (grad_input, grad_weight, grad_bias)
        if not _backward(grad_output, input, weight, bias, mean, rstd, *gradients, None, *self._native):
            return None
        return *gradients, None

    def restore(self, ctx: Any) -> None:
        ctx.options = self.options
        ctx.bias_only = False


def row_norm(input: Tensor, weight: Tensor | None, bias: Tensor | None, options: tuple) -> RowNorm | None:
    """The plan of such calls: over one dimension, with weights that are read as they are."""
    columns, centered = options[0], options[2]
    if columns != input.shape[-1] or not input.numel() or (centered and columns == 1):
        return None
    dtype = compute_dtype(input.dtype)
    return None if any(t is not None and t.dtype != dtype for t in (weight, bias)) else RowNorm(input, options)
