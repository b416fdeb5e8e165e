"""How ops announce recipes for their outputs, while outputs are let go of."""

from typing import Any

import torch
from torch import Tensor

from . import fast_path, nodes
from .active import discarding, innermost, sees_what_is_saved, thread
from .announcements import Announced, Announcement, Total


def announce(
    announcement: Announcement | None, elementwise: bool = False, total: tuple[Tensor, Announcement] | None = None
) -> None:
    """Called within an op's forward: how to make the output again from kept tensors; None where that cannot be done.

    A tensor that an `elementwise` op saves may be a product that runs again, where that was asked for. `total` is a
    second result, which the op saves, and how to make that again, within a layer.
    """
    discarder = innermost()
    if discarder is None:
        return
    if discarder.is_paused or not sees_what_is_saved(discarder):
        discarder.announced = None
        return
    second = None if total is None or not discarder.is_in_layer else Total(total[0].untyped_storage()._cdata, total[1])
    discarder.announced = Announced(announcement, elementwise, second)


def announce_in_layer(announcement: Announcement) -> bool:
    """The same for a matrix product, before the product runs; such recipes exist only within a layer.

    Returns:
        Whether `record` is to be called with the result.
    """
    discarder = discarding()
    if discarder is None or not discarder.is_in_layer:
        return False
    announce(announcement)
    return True


def record(output: Tensor, recipe: Announcement | None = None) -> None:
    """From now on readers that save `output` within the context keep a recipe instead.

    After an op's forward: the recipe is the one that was announced. Of another output it is given, and is kept as long
    as the output is.
    """
    discarder = innermost() if recipe is None else discarding()
    if discarder is None:
        return
    if recipe is None:
        fast_path.record(discarder, output)
    elif output.requires_grad:
        discarder.record(output, recipe)


def note(output: Any, *operands: Any) -> None:
    """Called after an operation of torch's, such as a sum: notes on the node that nobody has written to operands.

    The output may then be made again from recipes of the operands. An operand that is a number is noted too, and one
    that is small beside the output, of which a recipe may keep a copy.
    """
    if torch.compiler.is_compiling() or not thread.active or type(output) is not Tensor:
        return
    if output.grad_fn is None or output._version or (discarder := discarding()) is None:
        return
    tensors = [o for o in operands if isinstance(o, Tensor)]
    numbers = [o for o in operands if type(o) in (int, float)]
    if len(tensors) + len(numbers) != len(operands) or not all(map(nodes.is_as_made, tensors)):
        return
    small = discarder.small_operands.noted
    # In the order of the node's edges, of which a number's is the last: torch computes 2 + x as x + 2.
    nodes.note(output.grad_fn, (*(small(t, output, discarder) for t in tensors), *numbers))
    if discarder.is_in_layer:
        nodes.watch(output)


def watch(output: Any) -> Any:
    """Called with what a module has just returned, which is given back: writes to it are seen from now on.

    Within a layer, what is made of the output, and keeps nothing of it, may then be made again.
    """
    if torch.compiler.is_compiling() or not thread.active or type(output) is not Tensor:
        return output
    if output.grad_fn is not None and nodes.is_as_made(output):
        discarder = discarding()
        if discarder is not None and discarder.is_in_layer:
            nodes.watch(output)
    return output
