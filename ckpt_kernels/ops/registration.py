"""How a block becomes an op: its schema, its fake function and its autograd rule, given once, used two ways."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_library = torch.library.Library("ckpt_kernels", "DEF")


class Op:
    """A differentiable op of this package, `torch.ops.ckpt_kernels.<name>`.

    Args:
        schema: the op's schema, name first.
        implementation: computes it on real tensors, without autograd.
        fake: makes outputs of the right shape and dtype, for torch.compile.
        setup_context, backward: the autograd rule, as for `torch.autograd.Function`.

    Calling it with plain tensors goes straight to the implementation, inside a `torch.autograd.Function` where
    gradients are on: on small inputs the dispatcher's path costs more than eager torch's whole layer. Whatever
    must see the op (torch.compile, dispatch modes, tensor subclasses) gets it from the dispatcher, under the
    same autograd rule.
    """

    def __init__(
        self,
        schema: str,
        implementation: Callable[..., Any],
        fake: Callable[..., Any],
        setup_context: Callable[[Any, tuple, Any], None],
        backward: Callable[..., Any],
    ) -> None:
        name = schema.partition("(")[0]
        qualified = f"ckpt_kernels::{name}"
        _library.define(schema)
        _library.impl(name, implementation, "CompositeExplicitAutograd")
        torch.library.register_fake(qualified, fake, lib=_library)
        torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=_library)
        self._dispatched = getattr(torch.ops.ckpt_kernels, name).default
        self._implementation = implementation

        def forward(ctx: Any, *arguments: Any) -> Any:
            output = implementation(*arguments)
            setup_context(ctx, arguments, output)
            return output

        self._function = _autograd_function(name, forward=forward, backward=backward)
        self._transformable = _autograd_function(
            name, forward=implementation, setup_context=setup_context, backward=backward
        )

    def __call__(self, *arguments: Any) -> Any:
        if torch.compiler.is_compiling() or not _all_plain(arguments):
            return self._dispatched(*arguments)
        if torch._C._are_functorch_transforms_active():
            return self._transformable.apply(*arguments)
        if torch.is_grad_enabled():
            return self._function.apply(*arguments)
        return self._implementation(*arguments)


def _autograd_function(name: str, **methods: Callable[..., Any]) -> type[torch.autograd.Function]:
    """One with a `setup_context` works under torch.func, at the price of binding its arguments at every call."""
    return type(name, (torch.autograd.Function,), {key: staticmethod(value) for key, value in methods.items()})


def _all_plain(arguments: Sequence[Any]) -> bool:
    """Whether nothing but autograd needs to see the op: no subclass among the tensors, and no mode."""
    if torch._C._len_torch_dispatch_stack():
        return False
    for argument in arguments:
        kind = type(argument)
        if kind is not Tensor and kind is not torch.nn.Parameter and isinstance(argument, Tensor):
            return False
    return True
