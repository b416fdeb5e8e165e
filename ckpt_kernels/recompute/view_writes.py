"""Activations that write over a view of an output that has a recipe.

The autograd graph does not show the op that wrote to a view: the node of the whole tensor is a `CopySlices`, whatever
the op was. The caller knows the op. The recipe for the tensor after the write is announced before the write, for the
version that one write leads to, so that the node of the activation keeps a recipe too.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .active import discarding
from .entries import Entry
from .recipes import LONGEST_CHAIN, Claim, FromGraph, Geometry, Recipe, geometry_of
from .small_operands import fills_memory

# The key of the recipe in the metadata of the node of the whole tensor.
_WRITTEN = "ckpt_kernels written"


def write_over_view(write: Callable[[Tensor], Any], compute: Callable[[Tensor], Tensor], view: Tensor) -> Any:
    """The result of `write(view)`, which writes `compute(view)` over the view and does nothing else."""
    discarder = None if torch.compiler.is_compiling() else discarding()
    if discarder is None or discarder.is_paused or not torch.is_grad_enabled():
        return write(view)
    before, whole = discarder.all_entries.of(view), view._base
    recipe = None if before is None or before.version != view._version else before.recipe()
    if before is None or recipe is None or whole is None or recipe.layout is None:
        return write(view)
    if view.dtype is not before.dtype or whole.dtype is not before.dtype or recipe.depth >= LONGEST_CHAIN:
        return write(view)
    operands = (Claim(recipe, None),)
    written = Recipe(FromGraph(_written, compute, geometry_of(view)), operands, 1 + recipe.depth, recipe.layout)
    after = Entry(whole, weakref.ref(written))
    after.version += 1
    try:
        discarder.all_entries.add(after)
        result = write(view)
        # The recipe lives as long as the graph.
        node: Any = whole.grad_fn
        if node is not None:
            node.metadata[_WRITTEN] = written
        return result
    finally:
        if view._version != after.version:
            discarder.all_entries.add(before)


def _written(compute: Callable[[Tensor], Tensor], geometry: Geometry, whole: Tensor) -> Tensor:
    """The tensor after the write. Other readers may read `whole`, which is left as it is."""
    view = whole.as_strided(*geometry)
    result = compute(view)
    is_whole = view.numel() == whole.numel() and not view.storage_offset()
    if is_whole and result.stride() == view.stride() and fills_memory(result) and fills_memory(whole):
        return result.as_strided(whole.size(), whole.stride(), 0)
    written = whole.clone()
    written.as_strided(*geometry).copy_(result)
    return written
