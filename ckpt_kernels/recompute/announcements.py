"""An op's announcement of how to make the output again, and the tensors that the op's node saves."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .cells import Cell, Kept

_HAS_PROCESSES = torch.distributed.is_available()
# A function, and the tensors from which the function makes the output.
Announcement = tuple[Callable[..., Tensor], tuple[Tensor | None, ...]]


# A tensor that the announced op saves; the cell that the op's node holds instead; and whether the cell's content may be
# exchanged later, together with that of all others who keep the tensor.
Packed = tuple[Tensor, Cell, bool]


_OF_NONE = id(None)


class Total(NamedTuple):
    """A second result of an op, which the op itself saves, such as the sum that is normalised."""

    storage: int
    recipe: Announcement


class Announced:
    """An op whose forward has run, and whose output has not been recorded yet.

    `saved` is what the node has saved so far, by the tensors' identity, and `kept` that of it which stays as it is to
    the node's end. `kept` has None by None's identity, so that an operand that is missing is looked up like the others.
    """

    __slots__ = ("announcement", "is_elementwise", "kept", "saved", "total")

    def __init__(self, announcement: Announcement | None, is_elementwise: bool, total: Total | None) -> None:
        self.announcement = announcement
        self.is_elementwise = is_elementwise
        self.total = total
        self.saved: dict[int, Packed] = {}
        self.kept: dict[int, Kept | None] = {_OF_NONE: None}


def are_among(tensors: Sequence[Tensor | None], saved: Mapping[int, Packed]) -> bool:
    """Whether each tensor shares the memory of a saved one, found by identity."""
    others = [t for t in tensors if t is not None and id(t) not in saved]
    if not others:
        return True
    storages = {tensor.untyped_storage()._cdata for tensor, _, _ in saved.values()}
    return all(t.untyped_storage()._cdata in storages for t in others)


def outlasting(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of a sharded norm's weight, which may be gone when the recipe runs.

    A sharded weight is gathered when the backward pass of its module begins; readers of the module's output, which run
    the recipe, come before.
    """
    is_weight = tensor.dim() == 1 and (tensor.requires_grad or isinstance(tensor, nn.Parameter))
    return tensor.detach().clone() if is_weight and may_be_sharded() else tensor


def may_be_sharded() -> bool:
    """Whether this process is one of several."""
    return _HAS_PROCESSES and torch.distributed.is_initialized()
