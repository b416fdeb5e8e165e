"""Those who keep the result of a node that saves its result: a recipe may take the place of the tensor for all at once.

In `x * sigmoid(x)` the nodes of both ops keep the sigmoid, and the product's node keeps x too, which gives the sigmoid.
"""

import weakref

from torch import Tensor

from . import nodes
from .cells import Cell, watching
from .nodes import Result
from .recipes import Claim, Step, geometry_of, recipe_of_step


def note_keeper(root: Tensor, tensor: Tensor, cell: Cell) -> None:
    """One more keeps `tensor`, the result `root` or a view of it, by this cell."""
    keeper = weakref.ref(cell), geometry_of(tensor)
    own = nodes.result_cell(root.grad_fn)
    if own is None:
        cell.attached = Result(root.shape, root.stride(), root.dtype, [keeper])
    elif isinstance(own.attached, Result):
        own.attached.keepers.append(keeper)


def exchange(own: Cell, step: Step) -> None:
    """Puts a recipe in the place of a node's result for all who keep it, if all keep the same version."""
    result = own.attached
    if not isinstance(result, Result) or not result.dtype.is_floating_point:
        return
    keepers = [(cell, geometry) for reference, geometry in result.keepers if (cell := reference()) is not None]
    if any(cell.depth or cell.version != own.version for cell, _ in keepers):
        return
    recipe = recipe_of_step(step, result.shape, result.strides, result.dtype)
    for cell, geometry in keepers:
        cell.content, cell.watch = Claim(recipe, geometry), watching(cell.watch)
