"""DTensors: an op of sharded tensors is the same op of each process's own shards.

A block that is computed row by row, or element by element, needs nothing of what other processes have. So each op says
along which dimensions of its first operand its tensors may be split (`Sharding`). How it is called: see `dtensor`,
which the first call with a DTensor imports, as `torch.distributed.tensor` is slow to import, and not there everywhere.
"""

import sys
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

from torch import Tensor

# Of a tensor and the op's arguments: for each dimension of the tensor, that of the first operand which it is part of;
# None for one that is not split with it.
Axes = Callable[[Tensor, Sequence[Any]], Sequence[int | None]]


class Sharding(NamedTuple):
    """How the tensors of an op may be split: the dimensions of its first operand that may be (of its arguments), and
    what dimensions of operands and results these are."""

    splits: Callable[[Sequence[Any]], Collection[int]]
    operands: Sequence[Axes]
    results: Sequence[Axes]


def like_input(tensor: Tensor, arguments: Sequence[Any]) -> Sequence[int | None]:
    return range(arguments[0].dim())


def last_of_input(tensor: Tensor, arguments: Sequence[Any]) -> Sequence[int | None]:
    dim = arguments[0].dim()
    return range(dim - tensor.dim(), dim)


def channels_of_input(tensor: Tensor, arguments: Sequence[Any]) -> Sequence[int | None]:
    return (1,)


def of_no_dim(tensor: Tensor, arguments: Sequence[Any]) -> Sequence[int | None]:
    """Of a number that every process has."""
    return (None,) * tensor.dim()


def seed(tensor: Tensor, arguments: Sequence[Any]) -> Sequence[int | None]:
    """A dropout's, from which shards count on, so that they drop different elements, and replicas the same."""
    return (None,)


def every_dim(arguments: Sequence[Any]) -> Collection[int]:
    return range(arguments[0].dim())


def dims_of_rows(shape: Sequence[int], columns: int) -> int:
    """How many dimensions come before those that are normalised, which have `columns` elements."""
    dims, count = len(shape) - 1, shape[-1]
    while count != columns:
        dims -= 1
        count *= shape[dims]
    return dims


def is_sharded(tensors: Sequence[Tensor | None]) -> bool:
    """Whether any of them is a DTensor. None can be where torch.distributed.tensor has not been imported."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and any(isinstance(t, module.DTensor) for t in tensors)
