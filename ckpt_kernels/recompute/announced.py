"""What an op announces of its output, and what its node saves: of these a recipe is made."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .recipes import Cell

# A function, and the tensors that it makes the output of.
Announcement = tuple[Callable[..., Tensor], tuple[Tensor | None, ...]]


class Packed(NamedTuple):
    """A tensor that the op which was announced saves, and what its node holds in the place of it."""

    tensor: Tensor
    cell: Cell
    # Whether the cell may come to hold something smaller, which then all who keep the tensor do.
    is_exchanged: bool


class Total(NamedTuple):
    """Another result of an op than its output, which the op itself saves, such as the sum that is normalised."""

    storage: int
    recipe: Announcement


def are_among(tensors: Sequence[Tensor | None], saved: Sequence[Packed]) -> bool:
    """Whether the memory of each is that of one that is saved."""
    there = {id(packed.tensor) for packed in saved}
    others = [t for t in tensors if t is not None and id(t) not in there]
    if not others:
        return True
    storages = {packed.tensor.untyped_storage()._cdata for packed in saved}
    return all(t.untyped_storage()._cdata in storages for t in others)


def outlasting(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of a norm's weight that may be gone when the recipe is asked for: a sharded one is gathered
    when its own module's backward pass begins, and what reads the module's output comes before."""
    if tensor.dim() != 1 or not (tensor.requires_grad or isinstance(tensor, nn.Parameter)):
        return tensor
    is_sharded = torch.distributed.is_available() and torch.distributed.is_initialized()
    return tensor.detach().clone() if is_sharded else tensor
