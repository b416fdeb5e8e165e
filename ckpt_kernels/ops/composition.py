"""Which calls go through operators that torch sees one by one, and the gradients of such a composition."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .registration import is_plain, is_transformed


def is_fused(*tensors: Tensor | None) -> bool:
    """Whether there is something to keep, and nobody must see the ops one by one."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return False
    return is_plain(tensors) and not is_transformed()


def by_composition(grads: Sequence[Tensor | None]) -> bool:
    """Whether a backward pass is to be seen: for gradients of gradients, and where the gradients are batches."""
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

    Where gradients are enabled they are a graph, for gradients of gradients.

    Args:
        compute: gives as many tensors as there are `grads`.
        operands: what it is called with.
        needs: for each operand, whether its gradient is wanted; never of None.
        grads: the gradients of its results; None is none.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Through a view of each, because the derivatives asked for are partial.
        views = [t.view_as(t) if t is not None and n else t for t, n in zip(operands, needs, strict=True)]
        outputs = compute(*views)
    pairs = [(y, g) for y, g in zip(outputs, grads, strict=True) if g is not None and y.requires_grad]
    sources = [view for view, need in zip(views, needs, strict=True) if view is not None and need]
    if not sources or not pairs:
        return [None] * len(operands)
    found = iter(
        torch.autograd.grad(
            [y for y, _ in pairs], sources, [g for _, g in pairs], create_graph=create_graph, allow_unused=True
        )
    )
    return [next(found) if need else None for need in needs]
