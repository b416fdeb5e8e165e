"""Gradients of gradients, for every op, through the reference."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def second_order(
    first_order: Callable[..., Sequence[Tensor | None]], differentiable: int
) -> tuple[Callable[..., None], Callable[..., tuple], Callable[..., Any]]:
    """The autograd rule of a backward op, through the reference, and the composition of which it is the derivative.

    `first_order` takes the op's arguments and finds the same gradients as a graph; the op's first `differentiable`
    arguments can be differentiated.
    """

    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        tensors = [t for t in inputs if isinstance(t, Tensor)]
        ctx.arguments = [None if isinstance(t, Tensor) else t for t in inputs]
        ctx.places = [place for place, t in enumerate(inputs) if isinstance(t, Tensor)]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)

    def backward(ctx: Any, *grad_gradients: Tensor | None) -> tuple:
        arguments = list(ctx.arguments)
        for place, tensor in zip(ctx.places, ctx.saved_tensors, strict=True):
            arguments[place] = tensor
        wanted = [place for place in range(differentiable) if ctx.needs_input_grad[place]]
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            # Through a view of each, because one may be made from another (a gradient from an output, say), and
            # the derivatives asked for are partial.
            for place in wanted:
                arguments[place] = arguments[place].view_as(arguments[place])
            first = first_order(*arguments)
            pairs = [
                (g, gg)
                for g, gg in zip(first, grad_gradients, strict=True)
                if g is not None and gg is not None and g.requires_grad
            ]
            found = (
                torch.autograd.grad(
                    [g for g, _ in pairs],
                    [arguments[place] for place in wanted],
                    [gg for _, gg in pairs],
                    create_graph=create_graph,
                    allow_unused=True,
                )
                if pairs
                else [None] * len(wanted)
            )
        result: list[Tensor | None] = [None] * len(arguments)
        for place, gradient in zip(wanted, found, strict=True):
            result[place] = gradient
        return tuple(result)

    def composition(*arguments: Any) -> Any:
        with torch.enable_grad():
            arguments = [a.view_as(a) if isinstance(a, Tensor) else a for a in arguments]
        first = first_order(*arguments)
        return tuple(first) if len(first) > 1 else first[0]

    return setup_context, backward, composition
