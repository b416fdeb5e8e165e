"""What the ops say of their outputs, while these are let go of: how they can be made again."""

from typing import Any

import torch
from torch import Tensor

from . import nodes
from .active import discarding, innermost, sees_what_is_saved, thread
from .announced import Announcement, Total


def announce(
    announcement: Announcement | None, elementwise: bool = False, total: tuple[Tensor, Announcement] | None = None
) -> None:
    """From within an op's forward: how its output can be had again, from what it keeps anyway; None if it cannot.

    What an `elementwise` op saves may be a product that runs again, where that was asked for. `total` is another
    result, which the op saves, and how that can be had.
    """
    discarder = innermost()
    if discarder is None:
        return
    seen = sees_what_is_saved(discarder) and not discarder.is_paused
    discarder.announced = announcement if seen else None
    discarder.saved = [] if seen else None
    discarder.is_elementwise = elementwise and seen
    discarder.total = Total(total[0].untyped_storage()._cdata, total[1]) if seen and total is not None else None


def announce_in_layer(announcement: Announcement) -> bool:
    """The same of a product, which runs again within a layer alone, before its op; whether it is to be recorded."""
    discarder = discarding()
    if discarder is None or not discarder.is_in_layer:
        return False
    announce(announcement)
    return True


def record(output: Tensor, recipe: Announcement | None = None) -> None:
    """From now on what reads `output` for a gradient, and is discarding, keeps a recipe in the place of it.

    After an op's forward: the recipe is the one that was announced. Of another output it is given, and is kept as long
    as the output is.
    """
    discarder = innermost() if recipe is None else discarding()
    if discarder is not None and (recipe is None or output.requires_grad):
        discarder.record(output, recipe)


def note(output: Any, *operands: Any) -> None:
    """After an operation of torch's, a sum, say: where nobody has written to its operands, so that what it made may be
    made again from what they were made of; and which number stood for one."""
    if torch.compiler.is_compiling() or not thread.active or type(output) is not Tensor:
        return
    if output.grad_fn is None or output._version or discarding() is None:
        return
    tensors = [o for o in operands if isinstance(o, Tensor)]
    numbers = [o for o in operands if type(o) in (int, float)]
    if len(tensors) + len(numbers) != len(operands) or not all(map(nodes.is_as_made, tensors)):
        return
    nodes.note(output.grad_fn, (*(None for _ in tensors), *numbers))
