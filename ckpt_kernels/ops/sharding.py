"""DTensors: an op of sharded tensors is the same op of each process's own shards.

A block that is computed row by row, or element by element, needs nothing of what other processes have. So each op says
along which dimensions of its first operand its tensors may be split (`Sharding`). Called with DTensors it goes to the
local tensors, after what is split in another way has been redistributed, and its results are DTensors again. A gradient
that each process has a part of, that of a weight beside split rows, is partial, as those of torch's own layers are.

All this is seen by autograd, so that gradients, gradients of gradients and torch.compile need no rules of their own.
"""

import sys
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .operands import memory_order

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
    """One of as many dimensions, or (the seed of a dropout) of none that are split."""
    return range(arguments[0].dim())


def last_of_input(tensor: Tensor, arguments: Sequence[Any]) -> Sequence[int | None]:
    dim = arguments[0].dim()
    return range(dim - tensor.dim(), dim)


def channels_of_input(tensor: Tensor, arguments: Sequence[Any]) -> Sequence[int | None]:
    return (1,)


def seed(tensor: Tensor, arguments: Sequence[Any]) -> Sequence[int | None]:
    """A dropout's, which each shard counts on from, so that shards drop different elements, and replicas the same."""
    return (None,)


def every_dim(arguments: Sequence[Any]) -> Collection[int]:
    return range(arguments[0].dim())


def dims_of_rows(shape: Sequence[int], columns: int) -> int:
    """How many dimensions come before those that are normalised, which have `columns` elements."""
    dims, count = len(shape), 1
    while dims and (count < columns or dims == len(shape)):
        dims -= 1
        count *= shape[dims]
    return dims


# Calls


def is_sharded(tensors: Sequence[Tensor | None]) -> bool:
    """Whether any of them is a DTensor. None can be where torch.distributed.tensor, slow to import, is not."""
    if sys.modules.get("torch.distributed.tensor") is None:
        return False
    from torch.distributed.tensor import DTensor

    return any(isinstance(t, DTensor) for t in tensors)


def call(op: Callable[..., Any], sharding: Sharding, arguments: Sequence[Any]) -> Any:
    """`op(*arguments)`, of which the tensors come first and are DTensors of one mesh; one or several results."""
    from torch.distributed.tensor import DTensor

    count = len(sharding.operands)
    operands = [_as_sharded(t, arguments) for t in arguments[:count]]
    mesh, shape = operands[0].device_mesh, operands[0].shape
    axes = [None if t is None else tuple(of(t, arguments)) for t, of in zip(operands, sharding.operands, strict=True)]
    split = _split(operands, axes, sharding.splits(arguments))
    shards = [t if t is None else _shard(t, a, split) for t, a in zip(operands, axes, strict=True)]
    for place, of in enumerate(sharding.operands):
        if of is seed and shards[place] is not None:
            shards[place] = shards[place] + _index(mesh, split)
    outputs = op(*shards, *arguments[count:])
    results = []
    for output, of in zip((outputs,) if isinstance(outputs, Tensor) else outputs, sharding.results, strict=True):
        dims = tuple(of(output, arguments))
        sizes = [size if d is None or d not in split else shape[d] for d, size in zip(dims, output.shape, strict=True)]
        results.append(
            DTensor.from_local(
                output,
                mesh,
                _placements(dims, split),
                run_check=False,
                shape=torch.Size(sizes),
                stride=_dense_strides(sizes, output),
            )
        )
    return results[0] if isinstance(outputs, Tensor) else tuple(results)


def replicated_seed(input: Tensor, low: int, high: int) -> Tensor:
    """A dropout's seed for a DTensor, drawn as torch draws what all processes are to have alike."""
    from torch.distributed.tensor import DTensor, Replicate

    mesh = input.device_mesh
    room = torch.zeros(1, dtype=torch.int64, device=input.device)
    return torch.randint_like(DTensor.from_local(room, mesh, [Replicate()] * mesh.ndim, run_check=False), low, high)


def _as_sharded(tensor: Tensor | None, arguments: Sequence[Any]) -> Any:
    """Itself. What is no DTensor is an error, as in torch, but where torch is told to take it for replicated."""
    from torch.distributed.tensor import DTensor, Replicate

    if tensor is None or isinstance(tensor, DTensor):
        return tensor
    mesh = next(t for t in arguments if isinstance(t, DTensor)).device_mesh
    if tensor.numel() != 1 and not getattr(DTensor._op_dispatcher, "_allow_implicit_replication", False):
        raise RuntimeError(
            f"got mixed torch.Tensor and DTensor: a tensor of shape {tuple(tensor.shape)} beside one on {mesh}; "
            "expected all to be DTensors"
        )
    return DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)


def _split(operands: Sequence[Any], axes: Sequence[Any], allowed: Collection[int]) -> tuple[int | None, ...]:
    """For each dimension of the mesh, that of the first operand which is split over it, in the way that the first
    operand is split in which it may be."""
    from torch.distributed.tensor import Shard

    mesh = operands[0].device_mesh
    split: list[int | None] = [None] * mesh.ndim
    for tensor, dims in zip(operands, axes, strict=True):
        if tensor is None:
            continue
        if tensor.device_mesh != mesh:
            raise RuntimeError(f"tensors are on {mesh} and on {tensor.device_mesh}; expected one mesh")
        for place, placement in enumerate(tensor.placements):
            # By its very class: others that are shards too have another order.
            dim = dims[placement.dim] if type(placement) is Shard else None
            if split[place] is None and dim is not None and dim in allowed:
                split[place] = dim
    return tuple(split)


def _shard(tensor: Any, dims: Sequence[int | None], split: Sequence[int | None]) -> Tensor:
    """The local tensor of this split, whose gradient is partial where the tensor has no part in it."""
    from torch.distributed.tensor import Partial

    placements = _placements(dims, split)
    gradients = [Partial() if d is not None and d not in dims else p for d, p in zip(split, placements, strict=True)]
    if tensor.placements != placements:
        tensor = tensor.redistribute(placements=placements)
    return tensor.to_local(grad_placements=gradients)


def _placements(dims: Sequence[int | None], split: Sequence[int | None]) -> tuple[Any, ...]:
    from torch.distributed.tensor import Replicate, Shard

    return tuple(Shard(dims.index(d)) if d is not None and d in dims else Replicate() for d in split)


def _index(mesh: Any, split: Sequence[int | None]) -> int:
    """Which of all shards this process has."""
    index = 0
    for place, dim in enumerate(split):
        if dim is not None:
            index = index * mesh.size(place) + mesh.get_local_rank(place)
    return index


def _dense_strides(shape: Sequence[int], local: Tensor) -> tuple[int, ...]:
    """Those of a dense tensor of this shape whose dimensions lie in the order of a local part's."""
    strides, step = [0] * len(shape), 1
    for dim in reversed(memory_order(local.stride())):
        strides[dim] = step
        step *= max(shape[dim], 1)
    return tuple(strides)
