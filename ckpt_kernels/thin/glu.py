"""Plans of `glu` and `packed_glu`."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..activations import CODES
from ..ops.operands import is_in_order
from .direct import direct
from .plan import Plan, thread

_forward, _backward = direct("glu_forward"), direct("glu_backward")
_packed_forward, _packed_backward = direct("packed_glu_forward"), direct("packed_glu_backward")
_empty_like = torch.empty_like


class Glu(Plan):
    """Plans for (gate, value)."""

    op = ops.glu.glu

    def __init__(self, options: ops.glu.Options, dtype: torch.dtype) -> None:
        activation, *limits = self.options = options
        self._native = (CODES[activation], *limits)
        self._of_gradients = (CODES[activation], *options.of_gradients(dtype)[1:])

    @staticmethod
    def forward(ctx: Any, gate: Tensor, value: Tensor, plan: "Glu") -> Tensor:
        output = _empty_like(gate)
        if not _forward(gate, value, output, *plan._native):
            rows = _as_rows(gate, value, output)
            if rows is None or not _forward(*rows, *plan._native):
                return plan.fall_back(ctx, gate, value)
        if ctx is not None:
            ctx.plan, ctx.options = plan, plan.options
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(gate, value)
            if thread.active:
                plan.announce(ctx, (gate, value), (output,))
        return output

    def backward(self, ctx: Any, saved: Sequence[Tensor | None], grad_output: Tensor) -> tuple | None:
        wanted = ctx.needs_input_grad
        gate, value = saved
        grad_gate = _empty_like(gate) if wanted[0] else None
        grad_value = _empty_like(value) if wanted[1] else None
        if not _backward(grad_output, gate, value, grad_gate, grad_value, None, *self._of_gradients):
            # The full path gives contiguous gradients if the strides of grad_output decrease.
            is_usual = grad_output is not None and is_in_order(grad_output) and is_in_order(gate)
            rows = _as_rows(grad_output, gate, value, grad_gate, grad_value) if is_usual else None
            if rows is None or not _backward(*rows, None, *self._of_gradients):
                return None
        return grad_gate, grad_value, None


def _as_rows(*tensors: Tensor | None) -> list[Tensor | None] | None:
    """Views of the tensors as rows, for halves of one tensor, which the kernels take as rows only; None if strides do
    not allow that."""
    try:
        return [None if t is None else t.view(-1, t.shape[-1]) for t in tensors]
    except RuntimeError:
        return None


class PackedGlu(Plan):
    """Plans for (packed,)."""

    op = ops.glu.packed_glu

    def __init__(self, packed: Tensor, options: ops.glu.PackedOptions) -> None:
        activation, layout, *limits = self.options = options
        self._shape = (*packed.shape[:-1], packed.shape[-1] // 2)
        codes = CODES[activation], ops.glu.LAYOUTS.index(layout)
        self._native = (*codes, *limits)
        self._of_gradients = (*codes, *options.of_two.of_gradients(packed.dtype)[1:])

    @staticmethod
    def forward(ctx: Any, packed: Tensor, plan: "PackedGlu") -> Tensor:
        output = packed.new_empty(plan._shape)
        if not _packed_forward(packed, output, *plan._native):
            return plan.fall_back(ctx, packed)
        if ctx is not None:
            ctx.plan, ctx.options = plan, plan.options
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(packed)
            if thread.active:
                plan.announce(ctx, (packed,), (output,))
        return output

    def backward(self, ctx: Any, saved: Sequence[Tensor | None], grad_output: Tensor) -> tuple | None:
        (packed,) = saved
        grad_packed = _empty_like(packed)
        if not _packed_backward(grad_output, packed, grad_packed, *self._of_gradients):
            return None
        return grad_packed, None


def glu(gate: Tensor, value: Tensor, options: ops.glu.Options) -> Glu | None:
    return Glu(options, gate.dtype) if gate.numel() and gate.dtype == value.dtype else None


def packed_glu(packed: Tensor, options: ops.glu.PackedOptions) -> PackedGlu | None:
    return PackedGlu(packed, options) if packed.numel() else None
