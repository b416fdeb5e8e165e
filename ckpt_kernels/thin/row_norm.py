"""Plans of the row norms."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..activations import CODES
from ..backends.reference import compute_dtype
from .direct import direct
from .plan import Plan, thread

_forward = direct("row_norm_forward")
_backward = direct("row_norm_backward")
_add_forward = direct("add_row_norm_forward")
_add_backward = direct("add_row_norm_backward")
_gated_forward = direct("gated_row_norm_forward")
_gated_backward = direct("gated_row_norm_backward")
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
        self._no_mean = input.new_empty(0, dtype=self._dtype)

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
            mean = plan._no_mean if mean is None else mean
            ctx.plan = plan
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(input, weight, bias, mean, rstd)
            if thread.active:
                plan.announce(ctx, (input, weight, bias), (output, mean, rstd))
        return output

    def backward(self, ctx: Any, saved: Sequence[Tensor | None], grad_output: Tensor) -> tuple | None:
        wanted = ctx.needs_input_grad
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

    def rebuilt(self, full: Callable[..., Tensor], *tensors: Tensor | None) -> Tensor:
        input, weight, bias, mean, rstd = tensors
        output = _empty_like(input)
        mean = mean if self._centered else None
        there = _forward(input, weight, bias, output, mean, rstd, *self._native, True)
        return output if there else full(*tensors)


class AddRowNorm(Plan):
    """Of (input, residual, weight, bias, seed); see `ops.add_row_norm`."""

    op = ops.row_norm.add_row_norm

    def __init__(self, input: Tensor, options: tuple) -> None:
        columns, eps, self._centered, activation, weight_offset, cast_before_weight, dropout_p = options
        self.options = options
        self._rows = input.numel() // columns
        self._native = (eps, CODES[activation], weight_offset, cast_before_weight, dropout_p)
        self._dtype = compute_dtype(input.dtype)
        self._no_mean = input.new_empty(0, dtype=self._dtype)

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        residual: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        seed: Tensor | None,
        plan: "AddRowNorm",
    ) -> tuple[Tensor, Tensor]:
        rstd = input.new_empty(plan._rows, dtype=plan._dtype)
        mean = _empty_like(rstd) if plan._centered else None
        output, residual_out = _empty_like(input), _empty_like(input)
        operands = (input, residual, weight, bias, seed)
        if not _add_forward(*operands, output, residual_out, mean, rstd, *plan._native):
            return plan.refused(ctx, *operands)
        if ctx is not None:
            mean = plan._no_mean if mean is None else mean
            ctx.plan = plan
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(residual_out, weight, bias, seed, mean, rstd)
            if thread.active:
                plan.announce(ctx, operands, (output, residual_out, mean, rstd))
        return output, residual_out

    def backward(
        self,
        ctx: Any,
        saved: Sequence[Tensor | None],
        grad_output: Tensor | None,
        grad_residual_out: Tensor | None,
    ) -> tuple | None:
        residual_out, weight, bias, seed, mean, rstd = saved
        wants_input, wants_residual, wants_weight, wants_bias, *_ = ctx.needs_input_grad
        grad_input = _empty_like(residual_out) if wants_input or wants_residual else None
        # Without dropout the two gradients are one tensor.
        grad_residual = None if grad_input is None or seed is None else _empty_like(residual_out)
        grad_weight = _empty_like(weight) if wants_weight else None
        grad_bias = _empty_like(bias) if wants_bias else None
        mean = mean if self._centered else None
        operands = (grad_output, grad_residual_out, residual_out, weight, bias, seed, mean, rstd)
        if not _add_backward(*operands, grad_input, grad_residual, grad_weight, grad_bias, *self._native):
            return None
        if seed is None:
            grad_residual = grad_input
        grad_input, grad_residual = (grad_input if wants_input else None), (grad_residual if wants_residual else None)
        return grad_input, grad_residual, grad_weight, grad_bias, None, None

    def restore(self, ctx: Any) -> None:
        ctx.options = self.options


class GatedRowNorm(Plan):
    """Of (input, gate, weight); see `ops.gated_row_norm`."""

    op = ops.row_norm.gated_row_norm

    def __init__(self, input: Tensor, options: tuple) -> None:
        columns, eps, activation, self._norm_before_gate = self.options = options
        self._rows = input.numel() // columns
        self._native = (eps, CODES[activation], self._norm_before_gate)
        self._dtype = compute_dtype(input.dtype)

    @staticmethod
    def forward(ctx: Any, input: Tensor, gate: Tensor, weight: Tensor | None, plan: "GatedRowNorm") -> Tensor:
        rstd = input.new_empty(plan._rows, dtype=plan._dtype)
        output = _empty_like(input)
        if not _gated_forward(input, gate, weight, output, rstd, *plan._native):
            return plan.refused(ctx, input, gate, weight)
        if ctx is not None:
            ctx.plan = plan
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(input, gate, weight, rstd)
            if thread.active:
                plan.announce(ctx, (input, gate, weight), (output, rstd))
        return output

    def backward(self, ctx: Any, saved: Sequence[Tensor | None], grad_output: Tensor) -> tuple | None:
        input, gate, weight, rstd = saved
        wants_input, wants_gate, wants_weight, _ = ctx.needs_input_grad
        # Of a gate before the norm both gradients come out of the same products.
        both = not self._norm_before_gate and (wants_input or wants_gate)
        grad_input = _empty_like(input) if wants_input or both else None
        grad_gate = _empty_like(gate) if wants_gate or both else None
        grad_weight = _empty_like(weight) if wants_weight else None
        operands = (grad_output, input, gate, weight, rstd, grad_input, grad_gate, grad_weight)
        if not _gated_backward(*operands, *self._native):
            return None
        return grad_input if wants_input else None, grad_gate if wants_gate else None, grad_weight, None

    def restore(self, ctx: Any) -> None:
        ctx.options = self.options


class ModulatedRowNorm(Plan):
    """Of (input, scale, shift, None, None): without a weight and bias of its own; see `ops.modulated_row_norm`."""

    op = ops.row_norm.modulated_row_norm

    def __init__(self, input: Tensor, options: tuple) -> None:
        columns, eps, self._centered, pre_activation, activation = self.options = options
        self._rows = input.numel() // columns
        self._native = (eps, CODES[pre_activation], CODES[activation], 0.0, False)
        self._dtype = compute_dtype(input.dtype)
        self._no_mean = input.new_empty(0, dtype=self._dtype)

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, scale: Tensor, shift: Tensor, weight: None, bias: None, plan: "ModulatedRowNorm"
    ) -> Tensor:
        rstd = input.new_empty(plan._rows, dtype=plan._dtype)
        mean = _empty_like(rstd) if plan._centered else None
        output = _empty_like(input)
        if not _forward(input, 1 + scale, shift, output, mean, rstd, *plan._native, False):
            return plan.refused(ctx, input, scale, shift, None, None)
        if ctx is not None:
            mean = plan._no_mean if mean is None else mean
            ctx.plan = plan
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(input, scale, shift, None, None, mean, rstd)
            if thread.active:
                plan.announce(ctx, (input, scale, shift, None, None), (output, mean, rstd))
        return output

    def backward(self, ctx: Any, saved: Sequence[Tensor | None], grad_output: Tensor) -> tuple | None:
        input, scale, shift, _, _, mean, rstd = saved
        wants_input, wants_scale, wants_shift, *_ = ctx.needs_input_grad
        grad_input = _empty_like(input) if wants_input else None
        grad_scale = _empty_like(scale) if wants_scale else None
        grad_shift = _empty_like(shift) if wants_shift else None
        operands = (grad_output, input, 1 + scale, shift, mean if self._centered else None, rstd)
        if not _backward(*operands, grad_input, grad_scale, grad_shift, None, *self._native):
            return None
        return grad_input, grad_scale, grad_shift, None, None, None

    def restore(self, ctx: Any) -> None:
        ctx.options = self.options


def _serves(input: Tensor, columns: int, coefficients: Sequence[Tensor | None], *others: Tensor) -> bool:
    """Whether it is rows of one dimension, and weights that are read as they are."""
    if columns != input.shape[-1] or not input.numel() or any(t.dtype != input.dtype for t in others):
        return False
    dtype = compute_dtype(input.dtype)
    return all(t is None or t.dtype == dtype for t in coefficients)


def row_norm(input: Tensor, weight: Tensor | None, bias: Tensor | None, options: tuple) -> RowNorm | None:
    columns, centered = options[0], options[2]
    alone = centered and columns == 1  # an element less its mean, which is 0
    return RowNorm(input, options) if not alone and _serves(input, columns, (weight, bias)) else None


def add_row_norm(
    input: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, options: tuple
) -> AddRowNorm | None:
    columns, centered = options[0], options[2]
    alone = centered and columns == 1
    return AddRowNorm(input, options) if not alone and _serves(input, columns, (weight, bias), residual) else None


def gated_row_norm(input: Tensor, gate: Tensor, weight: Tensor | None, options: tuple) -> GatedRowNorm | None:
    return GatedRowNorm(input, options) if _serves(input, options[0], (weight,), gate) else None


def modulated_row_norm(
    input: Tensor, scale: Tensor, shift: Tensor, weight: Tensor | None, bias: Tensor | None, options: tuple
) -> ModulatedRowNorm | None:
    columns, centered = options[0], options[2]
    if weight is not None or bias is not None or (centered and columns == 1):
        return None
    return ModulatedRowNorm(input, options) if _serves(input, columns, (scale, shift)) else None
