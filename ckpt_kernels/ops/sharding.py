"""How the ops of DTensors are split: an op on sharded tensors is the same op on each process's shards.

A block that is computed row by row, or elementwise, needs no data of other processes. So each op declares along which
dimensions of its first operand the tensors may be split (`Sharding`). The calls are in `dtensor`, which is imported at
the first call with a DTensor: `torch.distributed.tensor` is slow to import, and not always available.
"""

import sys
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

from torch import Tensor

# A function of a tensor and the op's arguments: for each dimension of the tensor, the dimension of the first operand
# that it belongs to; None if it is not split with the first operand.
Axes = Callable[[Tensor, Sequence[Any]], Sequence[int | None]]


class Sharding(NamedTuple):
    """How the tensors of an op may be split.

    `splits` gives the dimensions of the first operand that may be split. `operands` and `results` relate the dimensions
    of each tensor to those.
    """

    splits: Callable[[Sequence[Any]], Collection[int]]
    operands: Sequence[Axes]
    results: Sequence[Axes]


def like_input(tensor: Tensor, arguments: Sequence[Any]) -> Sequence[int | None]:
    """For a tensor of the input's shape."""
    return range(arguments[0].dim())


def last_of_input(tensor: Tensor, arguments: Sequence[Any]) -> Sequence[int | None]:
    """For a tensor with the last dimensions of the input."""
    dim = arguments[0].dim()
    return range(dim - tensor.dim(), dim)


def channels_of_input(tensor: Tensor, arguments: Sequence[Any]) -> Sequence[int | None]:
    """For a tensor with one element for each channel."""
    return (1,)


def of_no_dim(tensor: Tensor, arguments: Sequence[Any]) -> Sequence[int | None]:
    """For a tensor that every process has whole."""
    return (None,) * tensor.dim()


def seed(tensor: Tensor, arguments: Sequence[Any]) -> Sequence[int | None]:
    """For a dropout seed. Shards add their index, so that they drop different elements, and replicas the same."""
    return (None,)


def every_dim(arguments: Sequence[Any]) -> Collection[int]:
    """All dimensions of the first operand."""
    return range(arguments[0].dim())


def dims_of_rows(shape: Sequence[int], columns: int) -> int:
    """The number of dimensions before the normalized ones, which have `columns` elements."""
    dims, count = len(shape) - 1, shape[-1]
    while count != columns:
        dims -= 1
        count *= shape[dims]
    return dims


def is_sharded(tensors: Sequence[Tensor | None]) -> bool:
    """Whether any tensor is a DTensor. There are none if torch.distributed.tensor has not been imported."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and any(isinstance(t, module.DTensor) for t in tensors)
