"""A backward pass is served by the backend that was asked for in its forward pass.

On a GPU backward passes run in threads of autograd's own, which know nothing of a `use_backend` around the call.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import backends

# Of what is none of torch's parameters, the question whether it is one takes long.
_NO_PARAMETERS = frozenset((Tensor, type(None), bool, int, float, str, tuple, torch.dtype))
Rule = Callable[..., Any]


def same_backend(forward: Rule, backward: Rule) -> tuple[Rule, Rule]:
    """The two sides of an autograd rule, whose first argument is the context: the first may also be the setup of it."""

    def remembering(ctx: Any, *arguments: Any, **named: Any) -> Any:
        ctx.backend = backends.chosen()
        return forward(ctx, *arguments, **named)

    def under_the_same(ctx: Any, *gradients: Any) -> Any:
        # A compiler traces this, and what it makes runs elsewhere anyway.
        if torch.compiler.is_compiling() or backends.chosen() == ctx.backend:
            return backward(ctx, *gradients)
        with backends.serving(ctx.backend):
            return backward(ctx, *gradients)

    return remembering, under_the_same


def same_backend_function(function: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
    """The same for an autograd.Function written as a class, which reads biases again in its backward pass.

    Of what hooks keep torch does not ask whether it was written to since, so the function does.
    """
    forward, backward = function.forward, function.backward

    def noting(ctx: Any, *arguments: Any) -> Any:
        ctx.backend = backends.chosen()
        if not torch.compiler.is_compiling():
            parameters = [a for a in arguments if type(a) not in _NO_PARAMETERS and isinstance(a, nn.Parameter)]
            ctx.biases = [(p, p._version) for p in parameters if p.dim() == 1 and not p.is_inference()]
        return forward(ctx, *arguments)

    def checking(ctx: Any, *gradients: Any) -> Any:
        # A compiler traces this, and what it makes runs elsewhere anyway.
        if torch.compiler.is_compiling():
            return backward(ctx, *gradients)
        for bias, version in ctx.biases:
            if bias._version != version:
                raise RuntimeError(
                    "a bias needed for the gradient computation was modified by an in-place operation: "
                    f"{bias.dtype} {tuple(bias.shape)} is at version {bias._version}; expected version {version}"
                )
        if backends.chosen() == ctx.backend:
            return backward(ctx, *gradients)
        with backends.serving(ctx.backend):
            return backward(ctx, *gradients)

    function.forward, function.backward = staticmethod(noting), staticmethod(checking)
    return function
