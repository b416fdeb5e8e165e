"""An op's announcement of how to make the output again, and the tensors that the op's node saves."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .recipes import Cell

# A function, and the tensors from which the function makes the output.
Announcement = tuple[Callable[..., Tensor], tuple[Tensor | None, ...]]


class Packed(NamedTuple):
    """A tensor that the announced op saves, and the cell that the op's node holds instead."""

    tensor: Tensor
    cell: Cell
    # Whether the cell's content may be exchanged later, together with that of all others who keep the tensor.
    is_exchanged: bool


class Total(NamedTuple):
    """A second result of an op, which the op itself saves, such as the sum that is normalised."""

    storage: int
    recipe: Announcement


def are_among(tensors: Sequence[Tensor | None], saved: Sequence[Packed]) -> bool:
    """Whether each tensor shares the memory of a saved one."""
    there = {id(packed.tensor) for packed in saved}
    others = [t for t in tensors if t is not None and id(t) not in there]
    if not others:
        return True
    storages = {packed.tensor.untyped_storage()._cdata for packed in saved}
    return all(t.untyped_storage()._cdata in storages for t in others)


def outlasting(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of a sharded norm's weight, which may be gone when the recipe runs.

    A sharded weight is gathered when the backward pass of its module begins; readers of the module's output, which run
    the recipe, come before.
    """
    if tensor.dim() != 1 or not (tensor.requires_grad or isinstance(tensor, nn.Parameter)):
        return tensor
    is_sharded = torch.distributed.is_available() and torch.distributed.is_initialized()
    return tensor.detach().clone() if is_sharded else tensor
