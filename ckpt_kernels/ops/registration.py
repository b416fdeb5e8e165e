"""How a block becomes an op: its schema, its fake function and its autograd rule, given once, used two ways.

Where a transform of torch's must see through a block, torch's own operators compute it instead: these have every
derivative and every batching rule that there is.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._library.autograd import Info, make_autograd_impl
from torch.autograd import forward_ad

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
        composition: of the same arguments, what a call returns, by differentiable operators of torch's.
        results: how many of several outputs a call returns; those that follow are only kept for backward.
        recipe: of (ctx, arguments, outputs), how to make the first output again from what is kept for backward: a
            function and the tensors it takes; None where that is not possible.
        elementwise: whether it goes element by element, so that products which it reads are worth running again
            where memory matters most.
        sharding: how its tensors may be split over processes; None for what is never called with DTensors
            or nested tensors.

    Calling it with plain tensors goes straight to the implementation, inside a `torch.autograd.Function` where
    gradients are on: on small inputs the dispatcher's path costs more than eager torch's whole layer. Whatever
    must see the op (torch.compile, dispatch modes, tensor subclasses) gets it from the dispatcher, under the
    same autograd rule. Nested tensors and DTensors are taken apart before that: see `nested` and `dtensor`. Within
    transforms (see `is_transformed`) it is the composition that runs.
    """

    def __init__(
        self,
        schema: str,
        implementation: Callable[..., Any],
        fake: Callable[..., Any],
        setup_context: Callable[[Any, tuple, Any], None],
        backward: Callable[..., Any],
        composition: Callable[..., Any],
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
        _library.impl(name, self._composed, "FuncTorchBatched")
        self._dispatched = getattr(torch.ops.ckpt_kernels, name).default
        self._differentiated = make_autograd_impl(self._dispatched, Info(backward, setup_context))
        _library.impl(name, self._with_autograd, "Autograd", with_keyset=True)
        self._implementation = implementation
        self._composition = composition
        self.name = name
        self.results = results
        self.recipe = recipe
        self.is_elementwise = elementwise
        self._sharding = sharding
        self._tensors = tensors = sum("Tensor" in argument for argument in schema.partition("->")[0].split(","))

        # A torch.autograd.Function pays for each argument: so all that are not tensors go in one tuple.
        def packed_forward(ctx: Any, *arguments: Any) -> Any:
            arguments = (*arguments[:-1], *arguments[-1])
            output = implementation(*arguments)
            setup_context(ctx, arguments, output)
            if recipe is not None and recompute.is_active():
                recompute.announce(recipe(ctx, arguments, output), elementwise)
            return output if results is None else output[:results]

        def packed_backward(ctx: Any, *gradients: Tensor | None) -> tuple:
            return *backward(ctx, *gradients)[:tensors], None

        # For `thin`, whose calls come back to these.
        self.full_forward, self.full_backward = packed_forward, packed_backward
        self._apply = autograd_apply(name, packed_forward, packed_backward)

    def __call__(self, *arguments: Any) -> Any:
        if is_transformed():
            return self._composition(*arguments)
        if torch.compiler.is_compiling() or not is_plain(arguments[: self._tensors]):
            if self._sharding is not None:
                if arguments[0].is_nested:
                    return nested.call(self, arguments)
                if is_sharded(arguments[: self._tensors]):
                    from . import dtensor

                    return dtensor.call(self, self._sharding, arguments)
            output = self._dispatched(*arguments)
        elif torch.is_grad_enabled():
            output = self._apply(*arguments[: self._tensors], arguments[self._tensors :])
            if self.recipe is not None and recompute.is_active():
                recompute.record(output if isinstance(output, Tensor) else output[0])
            return output
        else:
            output = self._implementation(*arguments)
        return output if self.results is None else output[: self.results]

    # Called by the dispatcher, from an exported program say, all results are to be returned, and all are tensors.

    def _composed(self, *arguments: Any) -> Any:
        found = self._composition(*arguments)
        if isinstance(found, Tensor):
            return found
        count = len(self._dispatched._schema.returns)
        return tuple(arguments[0].new_empty(0) if t is None else t for t in (*found, *(None,) * (count - len(found))))

    def _with_autograd(self, keyset: torch._C.DispatchKeySet, *arguments: Any) -> Any:
        """What `torch.library.register_autograd` makes does: but that loses tangents, and torch.func refuses it."""
        return self._composed(*arguments) if is_transformed() else self._differentiated(keyset, *arguments)


def autograd_apply(name: str, forward: Callable[..., Any], backward: Callable[..., tuple]) -> Callable[..., Any]:
    """`apply` of an autograd.Function of these, past its own look for torch.func's transforms, which `__call__` has
    done."""
    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return super(torch.autograd.Function, type(name, (torch.autograd.Function,), methods)).apply


def is_transformed() -> bool:
    """Whether every operation is one of torch's own to be: within torch.func's transforms (vmap, grad, jvp and so on),
    where tangents are carried forward, and where torch.jit.trace records."""
    return (
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
    )


def is_plain(arguments: Sequence[Any]) -> bool:
    """Whether nothing but autograd needs to see the op: no subclass among the tensors, and no mode.

    Nor a batch of gradients, of `is_grads_batched`, which the dispatcher hands to the op one by one. It comes by the
    first argument.
    """
    if torch._C._len_torch_dispatch_stack() or torch._C._functorch.is_legacy_batchedtensor(arguments[0]):
        return False
    for argument in arguments:
        if type(argument) not in _PLAIN:
            return False
    return True
