"""How a block becomes an op: its schema, its fake function and its autograd rule, given once, used two ways."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import recompute
from . import nested
from .pinned import pinned
from .sharding import Sharding, is_sharded

_PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None)))
_library = torch.library.Library("ckpt_kernels", "DEF")


class Op:
    """A differentiable op of this package, `torch.ops.ckpt_kernels.<name>`.

    Args:
        schema: the op's schema, name first, and its tensors before its other arguments.
        implementation: computes it on real tensors, without autograd.
        fake: makes outputs of the right shape and dtype, for torch.compile.
        setup_context, backward: the autograd rule, as for `torch.autograd.Function`.
        results: how many of several outputs a call returns; those that follow are only kept for backward.
        recipe: of (ctx, arguments, outputs), how to make the first output again from what is kept for backward: a
            function and the tensors it takes; None where that is not possible.
        elementwise: whether it goes element by element, so that products which it reads are worth running again
            where memory matters most.
        sharding: how its tensors may be split over processes; None for what is never called with DTensors.

    Calling it with plain tensors goes straight to the implementation, inside a `torch.autograd.Function` where
    gradients are on: on small inputs the dispatcher's path costs more than eager torch's whole layer. Whatever
    must see the op (torch.compile, dispatch modes, tensor subclasses) gets it from the dispatcher, under the
    same autograd rule. Nested tensors and DTensors are taken apart before that: see `nested` and `dtensor`.
    """

    def __init__(
        self,
        schema: str,
        implementation: Callable[..., Any],
        fake: Callable[..., Any],
        setup_context: Callable[[Any, tuple, Any], None],
        backward: Callable[..., Any],
        results: int | None = None,
        recipe: Callable[[Any, tuple, Any], recompute.Announcement | None] | None = None,
        elementwise: bool = False,
        sharding: Sharding | None = None,
    ) -> None:
        name = schema.partition("(")[0]
        qualified = f"ckpt_kernels::{name}"
        setup_context, backward = pinned(setup_context, backward)
        _library.define(schema)
        _library.impl(name, implementation, "CompositeExplicitAutograd")
        torch.library.register_fake(qualified, fake, lib=_library)
        torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=_library)
        self._dispatched = getattr(torch.ops.ckpt_kernels, name).default
        self._implementation = implementation
        self._results = results
        self._recipe = recipe
        self._sharding = sharding
        self._tensors = tensors = sum("Tensor" in argument for argument in schema.partition("->")[0].split(","))

        # A torch.autograd.Function pays for each argument: those that are not tensors go in one.
        def packed_forward(ctx: Any, *arguments: Any) -> Any:
            arguments = (*arguments[:-1], *arguments[-1])
            output = implementation(*arguments)
            setup_context(ctx, arguments, output)
            if recipe is not None and recompute.is_active():
                recompute.announce(recipe(ctx, arguments, output), elementwise)
            return output if results is None else output[:results]

        def packed_backward(ctx: Any, *gradients: Tensor | None) -> tuple:
            return *backward(ctx, *gradients)[:tensors], None

        function = _autograd_function(name, forward=packed_forward, backward=packed_backward)
        # Past `Function.apply`'s own look for torch.func's transforms, which `__call__` has done.
        self._apply = super(torch.autograd.Function, function).apply
        self._transformable = _autograd_function(
            name, forward=implementation, setup_context=setup_context, backward=backward
        )

    def __call__(self, *arguments: Any) -> Any:
        if torch.compiler.is_compiling() or not is_plain(arguments[: self._tensors]):
            if self._sharding is not None:
                if arguments[0].is_nested:
                    return nested.call(self, arguments)
                if is_sharded(arguments[: self._tensors]):
                    from . import dtensor

                    return dtensor.call(self, self._sharding, arguments)
            output = self._dispatched(*arguments)
        elif torch._C._are_functorch_transforms_active():
            output = self._transformable.apply(*arguments)
        elif torch.is_grad_enabled():
            output = self._apply(*arguments[: self._tensors], arguments[self._tensors :])
            if self._recipe is not None and recompute.is_active():
                recompute.offer(output if isinstance(output, Tensor) else output[0])
            return output
        else:
            output = self._implementation(*arguments)
        return output if self._results is None else output[: self._results]


def _autograd_function(name: str, **methods: Callable[..., Any]) -> type[torch.autograd.Function]:
    """One with a `setup_context` works under torch.func, at the price of binding its arguments at every call."""
    return type(name, (torch.autograd.Function,), {key: staticmethod(value) for key, value in methods.items()})


def is_plain(arguments: Sequence[Any]) -> bool:
    """Whether nothing but autograd needs to see the op: no subclass among the tensors, and no mode."""
    if torch._C._len_torch_dispatch_stack():
        return False
    for argument in arguments:
        if type(argument) not in _PLAIN:
            return False
    return True
