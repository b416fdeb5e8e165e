"""Results that several autograd nodes keep: a recipe may replace the tensor in all of them at once.

Some nodes save their own result. In `x * sigmoid(x)` the nodes of both ops keep the sigmoid, and the product's node
also keeps x, from which the sigmoid can be recomputed.
"""

import weakref

from torch import Tensor

from . import nodes
from .cells import Cell, version_watch
from .nodes import Result
from .recipes import Claim, Step, geometry_of, layout_of, recipe_of_step


def register_keeper(root: Tensor, tensor: Tensor, cell: Cell) -> None:
    """Registers a cell that keeps `tensor`, which is the result `root` of a node or a view of it."""
    keeper = weakref.ref(cell), geometry_of(tensor)
    result_cell = nodes.result_cell(root.grad_fn)
    if result_cell is None:
        cell.attached = Result(layout_of(root), [keeper])
    elif isinstance(result_cell.attached, Result):
        result_cell.attached.keepers.append(keeper)


def replace_result(result_cell: Cell, step: Step) -> None:
    """Replaces a node's result by a recipe in all cells that keep the result, if all keep the same version."""
    result = result_cell.attached
    if not isinstance(result, Result) or not result.layout[-1].is_floating_point:
        return
    keepers = [(cell, geometry) for reference, geometry in result.keepers if (cell := reference()) is not None]
    if any(cell.depth or cell.version != result_cell.version for cell, _ in keepers):
        return
    recipe = recipe_of_step(step, result.layout)
    for cell, geometry in keepers:
        cell.content, cell.watch = Claim(recipe, geometry), version_watch(cell.watch)
