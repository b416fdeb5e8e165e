"""A `Plan` runs small calls of one op past the full path, and falls back to that path where the plan does not apply."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import recompute
from ..ops.block import Block
from ..ops.registration import autograd_apply
from .direct import is_plain

_is_grad_enabled = torch.is_grad_enabled
thread = recompute.thread


class Plan:
    """Runs the calls of one op whose tensors have certain shapes and dtypes, with certain options.

    Each op has a subclass with

        forward(ctx, *tensors, plan): the results of the op; falls back if a tensor is unexpected. With gradients,
            it stores in `ctx` the same values as the op's own rule; else `ctx` is None.
        backward(ctx, saved, *gradients): the gradients of the tensors and a None for the plan; None if a tensor is
            unexpected.
    """

    op: Block
    options: tuple
    _apply: Callable[..., Any]

    def __init_subclass__(cls) -> None:
        cls._apply = staticmethod(autograd_apply(cls.op.name, cls.forward, _backward_of(cls.op)))

    def __call__(self, *tensors: Tensor | None) -> Any:
        if not _is_grad_enabled():
            return self.forward(None, *tensors, self)
        output = self._apply(*tensors, self)
        if thread.active:
            recompute.record(output if isinstance(output, Tensor) else output[0])
        return output

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        raise NotImplementedError

    def backward(self, ctx: Any, saved: Sequence[Tensor | None], *gradients: Tensor | None) -> tuple | None:
        raise NotImplementedError

    def fall_back(self, ctx: Any, *tensors: Tensor | None) -> Any:
        """Runs the full path in the same autograd context."""
        if ctx is None:
            return self.op(*tensors, self.options)
        ctx.plan = None
        return self.op.full_forward(ctx, *tensors, self.options, recompute.is_active())

    def announce(self, ctx: Any, tensors: tuple, results: Sequence[Tensor | None]) -> None:
        """Announces, while outputs are discarded, how to recompute the output."""
        arguments = (*tensors, self.options)
        recipe, total = self.recipe(ctx, arguments, results), self.op.total(arguments, results)
        recompute.announce(recipe, self.op.elementwise, total)

    def recipe(self, ctx: Any, arguments: tuple, results: Sequence[Tensor | None]) -> recompute.Announcement | None:
        """The op's recipe, for an op whose forward pass recomputes the first result: it runs by this plan too."""
        announcement = self.op.recipe(ctx, arguments, results)
        if announcement is None:
            return None
        rebuild, tensors = announcement
        return functools.partial(self._made_again, rebuild), tensors

    def _made_again(self, rebuild: Callable[..., Tensor], *tensors: Tensor | None) -> Tensor:
        return self.forward(None, *tensors, self) if is_plain(*tensors) else rebuild(*tensors)


def _backward_of(op: Block) -> Callable[..., tuple]:
    """The autograd rule of calls by a plan. Plain gradients run by the plan, all others by the full path."""

    def backward(ctx: Any, *gradients: Tensor | None) -> tuple:
        plan, saved = ctx.plan, None
        if plan is None:
            return op.full_backward(ctx, *gradients)[:-1]
        if not (_is_grad_enabled() or torch.compiler.is_compiling() or forward_ad._current_level >= 0):
            # Saved tensors come from the hooks that unpacked them, so they are checked like the gradients.
            saved = ctx.saved_tensors
            if is_plain(*gradients, *saved):
                grads = plan.backward(ctx, saved, *gradients)
                if grads is not None:
                    return grads
        # The plan is the one argument that is no tensor. The full path has two: the options, and whether the output is
        # recorded.
        return op.full_backward(_Restored(ctx, saved), *gradients)[:-1]

    return backward


class _Restored:
    """An autograd context of a plan's forward pass, in the form that the op's own rule expects.

    The saved tensors are unpacked once: the hooks that packed them may compute, and may do so only once.
    """

    backend = "native"

    def __init__(self, ctx: Any, saved: Sequence[Tensor | None] | None) -> None:
        self._ctx = ctx
        self.saved_tensors = ctx.saved_tensors if saved is None else saved

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)
