"""How a call goes past the full path, and comes back to it where it does not serve."""

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
    """How calls of one op go whose tensors have certain shapes and dtypes, and whose options are these.

    A subclass for each op has
        forward(ctx, *tensors, plan): what a call of the op returns, by `refused` where a tensor is other than expected.
            With gradients it gives `ctx` what the op's own rule gives it; else `ctx` is None.
        backward(ctx, saved, *gradients): the tensors' gradients and a None for the plan; None where a tensor is
            other than expected.
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

    def refused(self, ctx: Any, *tensors: Tensor | None) -> Any:
        """The full path, in the same context."""
        if ctx is None:
            return self.op(*tensors, self.options)
        ctx.plan = None
        return self.op.full_forward(ctx, *tensors, self.options, recompute.is_active())

    def announce(self, ctx: Any, tensors: tuple, results: Sequence[Tensor | None]) -> None:
        """Where outputs are let go of: how this one can be had again."""
        arguments = (*tensors, self.options)
        recipe, total = self.recipe(ctx, arguments, results), self.op.total(arguments, results)
        recompute.announce(recipe, self.op.elementwise, total)

    def recipe(self, ctx: Any, arguments: tuple, results: Sequence[Tensor | None]) -> recompute.Announcement | None:
        """The op's recipe, of an op that makes its first result again by its forward: that goes by this plan too."""
        found = self.op.recipe(ctx, arguments, results)
        if found is None:
            return None
        rebuild, tensors = found
        return functools.partial(self._made_again, rebuild, results[0].stride()), tensors

    def _made_again(self, rebuild: Callable[..., Tensor], strides: tuple[int, ...], *tensors: Tensor | None) -> Tensor:
        output = self.forward(None, *tensors, self) if is_plain(*tensors) else None
        return output if output is not None and output.stride() == strides else rebuild(*tensors)


def _backward_of(op: Block) -> Callable[..., tuple]:
    """The autograd rule of calls by a plan: plain gradients of tensors go by it, and all others the full way."""

    def backward(ctx: Any, *gradients: Tensor | None) -> tuple:
        plan, saved = ctx.plan, None
        if plan is None:
            return op.full_backward(ctx, *gradients)[:-1]
        if not (_is_grad_enabled() or torch.compiler.is_compiling() or forward_ad._current_level >= 0):
            # What was saved comes from whoever's hooks unpacked it, and is asked for the same as gradients are.
            saved = ctx.saved_tensors
            if is_plain(*gradients, *saved):
                found = plan.backward(ctx, saved, *gradients)
                if found is not None:
                    return found
        # There is one argument that is no tensor: the plan, in the place of options and of what is recorded.
        return op.full_backward(_Restored(ctx, saved), *gradients)[:-1]

    return backward


class _Restored:
    """A context as the op's own rule knows it, after a forward pass by a plan.

    The saved tensors are unpacked once: whoever packed them may compute, and may do so only once.
    """

    backend = "native"

    def __init__(self, ctx: Any, saved: Sequence[Tensor | None] | None) -> None:
        self._ctx = ctx
        self.saved_tensors = ctx.saved_tensors if saved is None else saved

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)
