"""Small calls: what a block costs beside its kernel, cut to the least.

On a tensor of a few hundred elements a kernel takes a microsecond, and what stands around it twenty: checks of
arguments, the choice of a backend, views, torch's dispatcher. A call of plain tensors in the CPU's memory that nothing
but autograd has to see therefore goes by a `Plan`: what the checks came to when a call with tensors of the same shapes
and dtypes, and with the same options, was made before. The plan runs the same kernels on the same operands (see
`direct`). Everything else takes the full path, with its errors; so does a call that its plan turns out not to serve.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import backends, recompute
from ..ops.registration import Op, autograd_apply
from .direct import is_available, is_plain, key

# Shapes and options of a program are few; where they are not, what is remembered does not grow without end.
MOST_PLANS = 4096

_NATIVE = ("auto", "native")
_REMEMBERED = (str, int, float, bool, tuple, torch.Size, type(None))
_plans: dict[tuple, "Plan"] = {}
_is_grad_enabled = torch.is_grad_enabled
_thread = recompute.thread


class Plan:
    """How calls of one op go whose tensors have certain shapes and dtypes, and whose options are these.

    A subclass for each op has
        forward(ctx, *tensors, plan): the op's first `results` outputs, by `refused` where a tensor is other than
            expected. With gradients it gives `ctx`, by `keep`, what the op's own rule gives it; else `ctx` is None.
        backward(wanted, saved, *gradients): the tensors' gradients and a None for the plan; None where a tensor is
            other than expected.
        restore(ctx): gives `ctx` what the op's own rule reads from it beside the saved tensors.
    """

    op: Op
    options: tuple
    _apply: Callable[..., Any]

    def __init_subclass__(cls) -> None:
        cls._apply = staticmethod(autograd_apply(cls.op.name, cls.forward, _backward_of(cls.op)))

    def __call__(self, *tensors: Tensor | None) -> Any:
        if not _is_grad_enabled():
            return self.forward(None, *tensors, self)
        output = self._apply(*tensors, self)
        if _thread.active:
            recompute.offer(output if isinstance(output, Tensor) else output[0])
        return output

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        raise NotImplementedError

    def backward(self, wanted: Sequence[bool], saved: Sequence[Tensor | None], *gradients: Tensor) -> tuple | None:
        raise NotImplementedError

    def restore(self, ctx: Any) -> None:
        raise NotImplementedError

    def refused(self, ctx: Any, *tensors: Tensor | None) -> Any:
        """The full path, in the same context."""
        if ctx is None:
            output = self.op(*tensors, *self.options)
        else:
            ctx.plan = None
            output = self.op.full_forward(ctx, *tensors, self.options)
        return output[0] if self.op.results == 1 else output

    def announce(self, ctx: Any, tensors: tuple, outputs: Any) -> None:
        """Where outputs are let go of: how this one can be had again."""
        if self.op.recipe is not None:
            self.restore(ctx)
            recompute.announce(self.op.recipe(ctx, (*tensors, *self.options), outputs), self.op.is_elementwise)


def _backward_of(op: Op) -> Callable[..., tuple]:
    """The autograd rule of calls by a plan: plain gradients of tensors go by it, and all others the full way."""

    def backward(ctx: Any, *gradients: Tensor | None) -> tuple:
        plan, saved = ctx.plan, None
        if plan is None:
            return op.full_backward(ctx, *gradients)
        if not (_is_grad_enabled() or torch.compiler.is_compiling() or forward_ad._current_level >= 0):
            if is_plain(*gradients):
                saved = ctx.saved_tensors
                found = plan.backward(ctx.needs_input_grad, saved, *gradients)
                if found is not None:
                    return found
        restored = _Restored(ctx, saved)
        plan.restore(restored)
        return op.full_backward(restored, *gradients)

    return backward


class _Restored:
    """A context as the op's own rule knows it, after a forward pass by a plan.

    The saved tensors are unpacked once: whoever packed them may compute, and may do so only once.
    """

    backend = "native"

    def __init__(self, ctx: Any, saved: Sequence[Tensor | None] | None) -> None:
        self.needs_input_grad = ctx.needs_input_grad
        self.saved_tensors = ctx.saved_tensors if saved is None else saved


def plan_of(block: str, tensors: Sequence[Tensor | None], options: tuple) -> Plan | None:
    """The plan of such a call; None where there was none like it, or where the full path must serve it."""
    # First: a compiler folds this, and sees nothing of the rest.
    if torch.compiler.is_compiling() or forward_ad._current_level >= 0:
        return None
    choice = backends._choice.get()
    if (backends._of_process if choice is None else backends.chosen()) not in _NATIVE:
        return None
    try:
        return _plans.get(key(block, tensors, options))
    except TypeError:  # options that are not hashable
        return None


def remember(plan: Plan | None, block: str, tensors: Sequence[Tensor | None], options: tuple) -> None:
    """After the checks of a call: the next one like it goes by `plan`, if there is one."""
    if plan is None or not is_available or torch.compiler.is_compiling() or len(_plans) >= MOST_PLANS:
        return
    # What else there may be is equal to what it was when something in it has changed.
    if all(type(option) in _REMEMBERED for option in options):
        known = key(block, tensors, options)
        if known is not None:
            _plans[known] = plan


from . import row_norm  # noqa: E402
