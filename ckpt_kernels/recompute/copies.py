"""Copies of one view of a block's output, as linear layers make of transposed maps for queries, keys and values.

All copies have the recipe of the first, so that the backward pass recomputes the block and the copy once.
"""

import weakref
from typing import Any

from .entries import block_of
from .nodes import name_of
from .recipes import Layout, Recipe
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
    """The recipe of an earlier copy, if that copy had this layout, and the view is of a block's output in the context
    `owner` that has had no in-place write since."""
    reference, earlier = view.metadata.get(_COPY, (None, None))
    recipe = None if reference is None or earlier != layout else reference()
    if recipe is None:
        return None
    output = 0
    while view is not None and name_of(view) in VIEWS:
        view, output = view.next_functions[0]
    block = None if output else block_of(view)
    return recipe if block is not None and block.owner is owner and block.is_unwritten() else None


def note_copy(view: Any, layout: Layout, recipe: Recipe) -> None:
    """Notes the recipe of a copy for later copies."""
    view.metadata[_COPY] = weakref.ref(recipe), layout
