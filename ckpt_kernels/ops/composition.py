"""Decides which calls must run as separate torch ops, and differentiates such compositions."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .registration import is_plain, is_transformed


def is_fused(*tensors: Tensor | None) -> bool:
    """Whether a call may run as one fused autograd.Function: gradients are recorded, and nothing must see single
    ops."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return False
    return is_plain(tensors) and not is_transformed()


def by_composition(grads: Sequence[Tensor | None]) -> bool:
    """Whether a backward pass must run as torch ops: for second derivatives, and if the gradients are batched."""
    if torch.is_grad_enabled() or is_transformed():
        return True
    return any(g is not None and torch._C._functorch.is_legacy_batchedtensor(g) for g in grads)


def composed_gradients(
    compute: Callable[..., Sequence[Tensor]],
    operands: Sequence[Tensor | None],
    needs: Sequence[bool],
    grads: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """The gradients of `compute(*operands)` for the operands that need one.

    If gradients are enabled, the result is a graph for second derivatives.

    Args:
        compute: a function that returns as many tensors as there are `grads`.
        operands: the arguments of `compute`.
        needs: for each operand, whether its gradient is needed; False for None.
        grads: the gradients of the results of `compute`; None for no gradient.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Differentiate with respect to views, because the derivatives are partial.
        views = [t.view_as(t) if t is not None and n else t for t, n in zip(operands, needs, strict=True)]
        outputs = compute(*views)
    pairs = [(y, g) for y, g in zip(outputs, grads, strict=True) if g is not None and y.requires_grad]
    sources = [view for view, need in zip(views, needs, strict=True) if view is not None and need]
    if not sources or not pairs:
        return [None] * len(operands)
    gradients = iter(
        torch.autograd.grad(
            [y for y, _ in pairs], sources, [g for _, g in pairs], create_graph=create_graph, allow_unused=True
        )
    )
    return [next(gradients) if need else None for need in needs]
