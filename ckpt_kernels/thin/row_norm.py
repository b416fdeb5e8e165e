"""Plans of the row norms."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops, recompute
from ..activations import CODES
from ..backends.blocks import RowNormOptions
from ..backends.reference import compute_dtype
from ..ops.operands import contiguous, strided_rows
from .direct import direct, is_plain
from .plan import Plan, thread

_forward, _backward = direct("row_norm_forward"), direct("row_norm_backward")
_empty_like = torch.empty_like


class RowNorm(Plan):
    """Plans for (input, residual, gate, scale, shift, weight, bias, seed). Scale and shift exclude weight and bias."""

    op = ops.row_norm.row_norm

    def __init__(self, input: Tensor, options: RowNormOptions) -> None:
        self.options = options
        columns, eps, self._centered, pre_activation, activation, *rest = options
        self._rows = input.numel() // columns
        self._dtype = compute_dtype(input.dtype)
        self._native = (CODES[pre_activation], CODES[activation], *rest)
        self._native_forward = (eps, *self._native)
        self._gate_before_norm = options.gate_before_norm

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        residual: Tensor | None,
        gate: Tensor | None,
        scale: Tensor | None,
        shift: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        seed: Tensor | None,
        plan: "RowNorm",
    ) -> tuple[Tensor, Tensor | None]:
        operands = (input, residual, gate, scale, shift, weight, bias, seed)
        if ctx is not None:
            wanted = ctx.needs_input_grad
            if wanted[6] and not any(wanted[:6]):
                # For a bias alone less is kept.
                return plan.fall_back(ctx, *operands)
        rstd = input.new_empty(plan._rows, dtype=plan._dtype)
        mean = _empty_like(rstd) if plan._centered else None
        output = contiguous(input)
        residual_out = None if residual is None else contiguous(input)
        factor, offset = (weight, bias) if scale is None else (1 + scale, shift)
        others = (factor, offset, seed, mean, rstd, output, residual_out, *plan._native_forward, False)
        if not (_forward(*operands[:3], *others) or _forward(*plan._as_rows(*operands[:3]), *others)):
            return plan.fall_back(ctx, *operands)
        if ctx is not None:
            ctx.plan, ctx.options = plan, plan.options
            ctx.set_materialize_grads(False)
            kept = (input if residual is None else residual_out, *operands[2:], mean, rstd)
            ctx.save_for_backward(*kept)
            if residual is not None and not (wanted[0] or wanted[1]):
                ctx.mark_non_differentiable(residual_out)
            if thread.active:
                results = (output, residual_out)
                total = None if residual is None else plan.op.total((*operands, plan.options), results)
                recompute.announce((plan.rebuilt, kept), total=total)
        return output, residual_out

    def backward(
        self, ctx: Any, saved: Sequence[Tensor | None], grad_output: Tensor | None, grad_residual_out: Tensor | None
    ) -> tuple | None:
        input, gate, scale, shift, weight, bias, seed, mean, rstd = saved
        wants_input, wants_residual, wants_gate, wants_scale, wants_shift, wants_weight, wants_bias, *_ = (
            ctx.needs_input_grad
        )
        factor, offset, wants_factor, wants_offset = weight, bias, wants_weight, wants_bias
        if scale is not None:
            factor, offset, wants_factor, wants_offset = 1 + scale, shift, wants_scale, wants_shift
        # With a gate before the norm, both gradients come from the same products.
        both = self._gate_before_norm and (wants_input or wants_gate)
        grad_input = contiguous(input) if wants_input or wants_residual or both else None
        # Without dropout the gradients of input and residual are one tensor.
        grad_residual = contiguous(input) if seed is not None and grad_input is not None else None
        grad_gate = contiguous(gate) if wants_gate or both else None
        grad_factor = _empty_like(factor) if wants_factor else None
        grad_offset = _empty_like(offset) if wants_offset else None
        large = (grad_output, grad_residual_out, input, gate)
        gradients = (grad_input, grad_residual, grad_gate, grad_factor, grad_offset)
        others = (factor, offset, seed, mean, rstd, *gradients, None, *self._native)
        if not (_backward(*large, *others) or _backward(*self._as_rows(*large), *others)):
            return None
        total = grad_input if grad_residual is None else grad_residual
        affine = (None, None, grad_factor, grad_offset) if scale is None else (grad_factor, grad_offset, None, None)
        return (
            grad_input if wants_input else None,
            total if wants_residual else None,
            grad_gate if wants_gate else None,
            *affine,
            None,
            None,
        )

    def rebuilt(self, *tensors: Tensor | None) -> Tensor:
        """Recomputes the output from the kept tensors."""
        input, gate, scale, shift, weight, bias, _, mean, rstd = tensors
        if is_plain(*tensors):
            output = contiguous(input)
            factor, offset = (weight, bias) if scale is None else (1 + scale, shift)
            others = (factor, offset, None, mean, rstd, output, None, *self._native_forward, True)
            if _forward(input, None, gate, *others) or _forward(*self._as_rows(input, None, gate), *others):
                return output
        return ops.row_norm.rebuilt(tensors, self.options)

    def _as_rows(self, *tensors: Tensor | None) -> list[Tensor | None]:
        """The tensors as rows, viewed or copied as in the full path, for strides that the kernel does not take."""
        columns = self.options.columns
        return [None if t is None else strided_rows(t, columns) for t in tensors]


def row_norm(
    input: Tensor,
    residual: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    options: RowNormOptions,
) -> RowNorm | None:
    """A plan, for rows in one dimension and weights in the compute dtype. A modulation has no weight or bias."""
    columns, dtype = options.columns, compute_dtype(input.dtype)
    is_always_zero = options.centered and columns == 1  # one element minus its mean
    if is_always_zero or columns != input.shape[-1] or not input.numel():
        return None
    if any(t is not None and t.dtype != input.dtype for t in (residual, gate)):
        return None
    if any(t is not None and t.dtype != dtype for t in (scale, shift, weight, bias)):
        return None
    if scale is not None and not (weight is None and bias is None):
        return None
    return RowNorm(input, options)
