"""Plans of `bias_act`."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..activations import CODES, SIGNED_BY_OUTPUT
from ..backends.reference import compute_dtype
from .direct import direct
from .plan import Plan, thread

_forward, _backward = direct("bias_act_forward"), direct("bias_act_backward")
_empty_like = torch.empty_like


class BiasAct(Plan):
    """Plans for (input, bias, seed)."""

    op = ops.bias_act.bias_act

    def __init__(self, options: ops.bias_act.Options) -> None:
        activation, dropout_p = self.options = options
        self._native = (CODES[activation], dropout_p)
        self._by_output = activation in SIGNED_BY_OUTPUT

    @staticmethod
    def forward(ctx: Any, input: Tensor, bias: Tensor | None, seed: Tensor | None, plan: "BiasAct") -> Tensor:
        output = _empty_like(input)
        if not _forward(input, bias, seed, output, *plan._native):
            flat = _flat(input, output) if bias is None and seed is None else None
            if flat is None or not _forward(flat[0], None, None, flat[1], *plan._native):
                return plan.fall_back(ctx, input, bias, seed)
        if ctx is not None:
            ctx.plan, ctx.options = plan, plan.options
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(output if plan._by_output else input, bias, seed)
            if thread.active:
                plan.announce(ctx, (input, bias, seed), (output,))
        return output

    def backward(self, ctx: Any, saved: Sequence[Tensor | None], grad_output: Tensor | None) -> tuple | None:
        wanted = ctx.needs_input_grad
        kept, bias, seed = saved
        grad_input = _empty_like(kept) if wanted[0] else None
        grad_bias = _empty_like(bias) if wanted[1] else None
        added = None if self._by_output else bias  # the saved output includes the bias
        if not _backward(grad_output, kept, added, seed, grad_input, grad_bias, None, *self._native):
            takes_all = grad_output is not None and bias is None and seed is None and wanted[0]
            flat = _flat(grad_output, kept, grad_input) if takes_all else None
            if flat is None or not _backward(*flat[:2], None, None, flat[2], None, None, *self._native):
                return None
        return grad_input, grad_bias, None, None


def _flat(*tensors: Tensor) -> list[Tensor] | None:
    """The elements in the order in which they lie in memory, as in feature maps with channels last; None if that order
    is not the same for all. The last tensor is dense."""
    last = tensors[-1]
    strides, count = last.stride(), last.numel()
    return [t.as_strided((count,), (1,)) for t in tensors] if all(t.stride() == strides for t in tensors) else None


def bias_act(input: Tensor, bias: Tensor | None, options: ops.bias_act.Options) -> BiasAct | None:
    """A plan, unless the activation is the identity, which keeps no tensor."""
    if options.activation == "identity" or not input.numel() or not input.dim():
        return None
    return None if bias is not None and bias.dtype != compute_dtype(input.dtype) else BiasAct(options)
