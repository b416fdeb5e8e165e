"""Copies of one view of a block's output, as linear layers make of transposed maps for queries, keys and values.

All copies have the recipe of the first, so that the backward pass recomputes the block and the copy once.
"""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .entries import Block, block_of
from .nodes import Edge, is_made_since, name_of
from .recipes import LONGEST_CHAIN, FromGraph, Layout, Recipe
from .rules import VIEWS

# The key of the recipe and the layout of a copy in the metadata of the view's node.
_COPY = "ckpt_kernels copy"


def copied_view(node: Any) -> Any:
    """The node of the view that a node's output is a copy of, in another shape; None for other nodes."""
    if name_of(node) != "UnsafeViewBackward0":
        return None
    clone, output = node.next_functions[0]
    if clone is None or output or name_of(clone) != "CloneBackward0":
        return None
    view, output = clone.next_functions[0]
    return view if view is not None and not output and name_of(view) in VIEWS else None


def recipe_of_copy(view: Any, layout: Layout, owner: Any) -> Recipe | None:
    """The recipe of a copy of this layout, if the view is of a block's output in the context `owner` that has had no
    in-place write since. An earlier copy of the same layout has the same recipe."""
    views, maker, output = [], view, 0
    while maker is not None and name_of(maker) in VIEWS:
        views.append((maker, output))
        maker, output = maker.next_functions[0]
    block = None if output else block_of(maker)
    if block is None or block.owner is not owner or not block.is_unwritten():
        return None
    reference, earlier = view.metadata.get(_COPY, (None, None))
    recipe = None if reference is None or earlier != layout else reference()
    return _first_recipe(views, layout, owner, block) if recipe is None else recipe


def _first_recipe(views: list[Edge], layout: Layout, owner: Any, block: Block) -> Recipe | None:
    """A recipe that makes the views of a block's output again, the last first in the list, and copies the result."""
    if not all(is_made_since(node, owner.first_node) for node, _ in views):
        return None
    steps = []
    for node, output in reversed(views):
        rule = VIEWS[name_of(node)]
        if output and not rule.has_several_outputs:
            return None
        try:
            steps.append((rule.function, rule.options(node), output if rule.has_several_outputs else None))
        except (AttributeError, RuntimeError):
            return None
    source = owner.share(block)
    if source is None or source.depth >= LONGEST_CHAIN:
        return None
    recipe = Recipe(FromGraph(_copy, steps, layout[0]), (source,), 1 + source.depth, layout)
    note_copy(views[0][0], layout, recipe)
    return recipe


def _copy(
    steps: Sequence[tuple[Callable[..., Any], tuple, int | None]], shape: Sequence[int], tensor: Tensor
) -> Tensor:
    for function, options, output in steps:
        tensor = function(tensor, *options) if output is None else function(tensor, *options)[output]
    return tensor.clone(memory_format=torch.contiguous_format).reshape(shape)


def note_copy(view: Any, layout: Layout, recipe: Recipe) -> None:
    """Notes the recipe of a copy for later copies."""
    view.metadata[_COPY] = weakref.ref(recipe), layout
