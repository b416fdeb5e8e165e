"""The announcement with which an op says how to recompute its output, and the tensors that the op's node saves."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .cells import Cell
from .recipes import Layout

_HAS_PROCESSES = torch.distributed.is_available()
# A function, and the tensors from which the function computes the output.
Announcement = tuple[Callable[..., Tensor], tuple[Tensor | None, ...]]


# A tensor that the announced op saves; the cell that the op's node holds for the tensor; whether the content of the
# cell may be replaced later, together with the content of all other cells of that tensor.
Packed = tuple[Tensor, Cell, bool]


class Total(NamedTuple):
    """A second result that the op saves itself, such as the sum that a norm normalizes."""

    storage: int
    layout: Layout
    recipe: Announcement


class Announced:
    """An op whose forward pass has run, and whose output has not been recorded yet.

    `saved` holds the tensors that the op's node has saved so far, by their identities.
    """

    __slots__ = ("announcement", "is_elementwise", "saved", "total")

    def __init__(self, announcement: Announcement | None, is_elementwise: bool, total: Total | None) -> None:
        self.announcement = announcement
        self.is_elementwise = is_elementwise
        self.total = total
        self.saved: dict[int, Packed] = {}


def share_memory_with(tensors: Sequence[Tensor | None], saved: Mapping[int, Packed]) -> bool:
    """Whether each tensor is saved, or shares its storage with a saved tensor."""
    others = [t for t in tensors if t is not None and id(t) not in saved]
    if not others:
        return True
    storages = {tensor.untyped_storage()._cdata for tensor, _, _ in saved.values()}
    return all(t.untyped_storage()._cdata in storages for t in others)


def copied_if_sharded(tensor: Tensor) -> Tensor:
    """The tensor, or a copy if the tensor is the weight of a norm, which sharding may free before the recipe runs.

    A sharded weight is gathered when the backward pass of its module begins. Readers of the module's output run the
    recipe before that.
    """
    is_weight = tensor.dim() == 1 and (tensor.requires_grad or isinstance(tensor, nn.Parameter))
    return tensor.detach().clone() if is_weight and may_be_sharded() else tensor


def may_be_sharded() -> bool:
    """Whether this process is one of several."""
    return _HAS_PROCESSES and torch.distributed.is_initialized()
