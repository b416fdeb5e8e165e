"""How ops announce recipes for their outputs while a context discards outputs."""

from typing import Any

import torch
from torch import Tensor

from . import fast_path, nodes
from .active import discarding, innermost, thread
from .announcements import Announced, Announcement, Total
from .cheap_recipes import Product
from .hooks import has_innermost_hooks
from .recipes import layout_of


def announce(
    announcement: Announcement | None, elementwise: bool = False, total: tuple[Tensor, Announcement] | None = None
) -> None:
    """Announces, within the forward pass of an op, how to recompute the output from kept tensors.

    Args:
        announcement: None where the output cannot be recomputed.
        elementwise: whether the op is elementwise. A tensor that such an op saves may be a matrix product that runs
            again, if the context asks for that.
        total: a second result that the op saves, and how to recompute that result within a layer.
    """
    library = fast_path.library
    if library is not None and library.announce(announcement, elementwise, total):
        return
    discarder = innermost()
    if discarder is None:
        return
    if discarder.is_paused or not has_innermost_hooks(discarder):
        discarder.announced = None
        return
    second = None
    if total is not None and discarder.is_in_layer:
        result, recipe = total
        second = Total(result.untyped_storage()._cdata, layout_of(result), recipe)
    discarder.announced = Announced(announcement, elementwise, second)


def announce_in_layer(announcement: Announcement) -> bool:
    """Announces a matrix product before the product runs. Such recipes exist only within a layer.

    Returns:
        Whether the caller must call `record` with the result.
    """
    discarder = discarding()
    if discarder is None or not discarder.is_in_layer:
        return False
    function, tensors = announcement
    announce((Product(function), tensors))
    return True


def record(output: Tensor, recipe: Announcement | None = None) -> None:
    """Gives readers that save `output` within the context a recipe instead.

    Without `recipe` the output is that of the announced op. With `recipe` the output is any tensor, and the recipe
    lives as long as the output.
    """
    library = fast_path.library
    if recipe is None and library is not None and library.record(output):
        return
    discarder = innermost() if recipe is None else discarding()
    if discarder is not None:
        discarder.record(output, recipe)


def copied(tensor: Tensor) -> Tensor:
    """A copy, for a block that saves a tensor which the model may write to.

    A context keeps no more for the copy than for the tensor.
    """
    copy = tensor.clone()
    if not torch.compiler.is_compiling() and thread.active and type(copy) is Tensor and copy.grad_fn is not None:
        discarder = discarding()
        if discarder is not None:
            discarder.record_copy(tensor, copy)
    return copy


def note(output: Any, *operands: Any, watches: bool = False) -> None:
    """Notes on the autograd node of a torch op, such as a sum, that no operand has been written to.

    The output may then be recomputed from recipes of the operands. The note holds operands that are scalars, and
    operands that are small beside the output, which a recipe may copy. With `watches`, and within a layer, later
    in-place writes to the output are seen, so that tensors computed from the output may be recomputed too.
    """
    if torch.compiler.is_compiling() or not thread.active or type(output) is not Tensor:
        return
    if output.grad_fn is None or output._version or (discarder := discarding()) is None:
        return
    if watches or discarder.is_in_layer:
        nodes.watch(output)
    tensors = [o for o in operands if isinstance(o, Tensor)]
    scalars = [o for o in operands if type(o) in (int, float)]
    if len(tensors) + len(scalars) != len(operands) or not all(map(nodes.is_unwritten, tensors)):
        return
    small = discarder.small_operands.noted
    # In the order of the node's edges, where a number comes last: torch computes 2 + x as x + 2.
    nodes.note(output.grad_fn, (*(small(t, output, discarder) for t in tensors), *scalars))


def watch(output: Any) -> Any:
    """Records the version counter of a module's result, so that later in-place writes are seen. Returns the result.

    Within a layer, tensors computed from the result by ops that save no operand may then be recomputed.
    """
    if torch.compiler.is_compiling() or not thread.active or type(output) is not Tensor:
        return output
    if output.grad_fn is not None and nodes.is_unwritten(output):
        discarder = discarding()
        if discarder is not None and discarder.is_in_layer:
            nodes.watch(output)
    return output
