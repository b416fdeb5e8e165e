"""Runs a backward pass on the backend that was chosen in the forward pass.

On a GPU backward passes run in threads of autograd, which do not see a `use_backend` around the call.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import backends

# Types that are certainly no parameters: `isinstance` is slow for these.
_NO_PARAMETERS = frozenset((Tensor, type(None), bool, int, float, str, tuple, torch.dtype))
Rule = Callable[..., Any]


def same_backend(forward: Rule, backward: Rule) -> tuple[Rule, Rule]:
    """The two functions of an autograd rule, whose first argument is the context. `forward` may be the context's
    setup."""

    def forward_with_backend(ctx: Any, *arguments: Any, **named: Any) -> Any:
        ctx.backend = backends.chosen()
        return forward(ctx, *arguments, **named)

    def backward_with_backend(ctx: Any, *gradients: Any) -> Any:
        # A compiler only traces this function. The traced graph runs later in any case.
        if torch.compiler.is_compiling() or backends.chosen() == ctx.backend:
            return backward(ctx, *gradients)
        with backends.serving(ctx.backend):
            return backward(ctx, *gradients)

    return forward_with_backend, backward_with_backend


def same_backend_function(function: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
    """The same for an autograd.Function class whose backward pass reads biases again.

    torch does not check whether tensors that hooks keep have been written to, so the function checks the biases.
    """
    forward, backward = function.forward, function.backward

    def checked_forward(ctx: Any, *arguments: Any) -> Any:
        ctx.backend = backends.chosen()
        result = forward(ctx, *arguments)
        if not torch.compiler.is_compiling():
            biases = [a for a in arguments if type(a) not in _NO_PARAMETERS and _is_bias(a)]
            # The others are not read again.
            saved = (
                {id(t if t._base is None else t._base) for t in ctx.to_save or () if t is not None} if biases else ()
            )
            ctx.biases = [(p, p._version) for p in biases if id(p) in saved]
        return result

    def checked_backward(ctx: Any, *gradients: Any) -> Any:
        # A compiler only traces this function. The traced graph runs later in any case.
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

    function.forward, function.backward = staticmethod(checked_forward), staticmethod(checked_backward)
    return function


def _is_bias(argument: Any) -> bool:
    is_parameter = isinstance(argument, Tensor) and isinstance(argument, nn.Parameter)
    return is_parameter and argument.dim() == 1 and not argument.is_inference()
