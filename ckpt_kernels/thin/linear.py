"""Blocks between matrix products, for calls whose tensors and options have passed the checks (see `ops.linear_blocks`).

Each block calls the kernel directly, and falls back to the full block if the kernel refuses a tensor.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..activations import CODES
from ..backends.reference import compute_dtype
from ..ops.linear_blocks import Block
from . import bias_act, glu
from .direct import direct, is_plain
from .plan_cache import plan_of, remember

_act_forward, _act_backward = direct("bias_act_forward"), direct("bias_act_backward")
_glu_forward, _glu_backward = direct("glu_forward"), direct("glu_backward")
_norm_forward, _norm_backward = direct("row_norm_forward"), direct("row_norm_backward")
_empty_like = torch.empty_like


def act_block(dtypes: set[torch.dtype], activation: str, dropout_p: float) -> Block | None:
    """The block of (input,), without dropout; None if the checks depend on more than the arguments."""
    if len(dtypes) != 1 or dropout_p:
        return None
    full, code = ops.linear_blocks.act_block(activation, None, 0.0), CODES[activation]

    def forward(operands: Sequence[Tensor | None]) -> tuple[Tensor, tuple[Tensor, ...]]:
        output = _empty_like(operands[0])
        if _act_forward(operands[0], None, None, output, code, 0.0):
            return output, ()
        return full.forward(operands)

    def backward(grad: Tensor, operands: Sequence[Tensor | None], rest: tuple, wanted: Sequence[bool], rewrite: bool):
        (input,) = operands
        if _overwrites(grad, input):
            grad_input, output = (grad if wanted[0] else None), (_empty_like(input) if rewrite else None)
            if _act_backward(grad, input, None, None, grad_input, None, output, code, 0.0):
                return [grad_input], output
        return full.backward(grad, operands, rest, wanted, rewrite)

    def composed(operands: Sequence[Tensor | None]) -> Tensor:
        call = "bias_act", (operands[0], None), (activation, 0.0, True)
        plan = plan_of(*call)
        if plan is None:
            remember(bias_act.bias_act(*call[1], ops.bias_act.Options(activation, 0.0)), *call)
            return full.composed(operands)
        return plan(operands[0], None, None)

    return Block(forward, backward, composed)


def glu_block(dtypes: set[torch.dtype], activation: str, layout: str, dropout_p: float, packed: bool) -> Block | None:
    """The block of (gate, value), without dropout. For (packed,) the full block."""
    if len(dtypes) != 1 or dropout_p:
        return None
    full, options = ops.linear_blocks.glu_block(activation, layout, None, 0.0), ops.glu.Options(activation)
    if packed:
        return full
    native = (CODES[activation], options.limit, options.offset)

    def forward(operands: Sequence[Tensor | None]) -> tuple[Tensor, tuple[Tensor, ...]]:
        output = _empty_like(operands[0])
        return (output, ()) if _glu_forward(*operands, output, *native) else full.forward(operands)

    def backward(grad: Tensor, operands: Sequence[Tensor | None], rest: tuple, wanted: Sequence[bool], rewrite: bool):
        gate, value = operands
        if _overwrites(grad, gate) and is_plain(value) and value.is_contiguous():
            grad_gate, grad_value = (grad if wanted[0] else None), (_empty_like(value) if wanted[1] else None)
            output = _empty_like(gate) if rewrite else None
            if _glu_backward(grad, gate, value, grad_gate, grad_value, output, *native):
                return [grad_gate, grad_value], output
        return full.backward(grad, operands, rest, wanted, rewrite)

    def composed(operands: Sequence[Tensor | None]) -> Tensor:
        call = "glu", tuple(operands), (activation, None, 0.0)
        plan = plan_of(*call)
        if plan is None:
            remember(glu.glu(*operands, options), *call)
            return full.composed(operands)
        return plan(*operands)

    return Block(forward, backward, composed)


def norm_block(dtypes: set[torch.dtype], input: Tensor, coefficients: Sequence[Tensor | None], options: tuple) -> Any:
    """The block of (input, weight, bias), over the last dimension; options as in `ops.linear_blocks.norm_block`."""
    columns, eps, centered, pre_activation, activation, weight_offset, cast_before_weight = options
    dtype = compute_dtype(input.dtype)
    if len(dtypes) != 1 or not input.numel() or columns == 1:
        return None
    full = ops.linear_blocks.norm_block(*options)
    if any(t is not None and t.dtype != dtype for t in coefficients):
        return full
    # Neither dropout nor a gate.
    native = (CODES[pre_activation], CODES[activation], weight_offset, cast_before_weight, 0.0, False)
    rows = input.numel() // columns

    def forward(operands: Sequence[Tensor | None]) -> tuple[Tensor, tuple[Tensor, ...]]:
        input, weight, bias = operands
        rstd = input.new_empty(rows, dtype=dtype)
        mean = _empty_like(rstd) if centered else None
        output = _empty_like(input)
        if _norm_forward(input, None, None, weight, bias, None, mean, rstd, output, None, eps, *native, False):
            return output, (mean, rstd)
        return full.forward(operands)

    def backward(grad: Tensor, operands: Sequence[Tensor | None], rest: tuple, wanted: Sequence[bool], rewrite: bool):
        # The full block recomputes statistics that were not kept because only the weights need a gradient.
        if rest and is_plain(grad, *operands, *rest):
            input, weight, bias = operands
            grads = [_empty_like(t) if t is not None and w else None for t, w in zip(operands, wanted, strict=True)]
            output = _empty_like(input) if rewrite else None
            gradients = (grads[0], None, None, *grads[1:])
            if _norm_backward(grad, None, input, None, weight, bias, None, *rest, *gradients, output, *native):
                return grads, output
        return full.backward(grad, operands, rest, wanted, rewrite)

    return Block(forward, backward, full.composed)


def _overwrites(grad: Tensor, operand: Tensor) -> bool:
    """Whether the gradient of an operand may be written over the output's gradient, which the block owns."""
    return (
        is_plain(grad, operand)
        and grad.is_contiguous()
        and operand.is_contiguous()
        and grad.shape == operand.shape
        and grad.dtype is operand.dtype
    )
