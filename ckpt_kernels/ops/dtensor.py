"""Calls of ops with DTensors: see `sharding`.

They go to the local tensors, after what is split in another way has been redistributed, and results are DTensors again.
A gradient of which each process has a part, that of a weight beside split rows, is partial, as those of torch's own
layers are. Autograd sees all this, so that gradients, gradients of gradients and torch.compile need no rules of their
own, and what is kept for backward are the local tensors that any other call keeps.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from .operands import memory_order
from .sharding import Sharding, seed

Placements = tuple[Placement, ...]
# Of a tensor's dimensions, or of those of a mesh: dimensions of the first operand.
Dims = tuple[int | None, ...]


class Plan(NamedTuple):
    """How a call is split: over each dimension of the mesh a dimension of the first operand, or none. And how operands
    are placed for that, and their gradients."""

    split: Dims
    operands: tuple[Placements, ...]
    gradients: tuple[Placements, ...]


def call(op: Callable[..., Any], sharding: Sharding, arguments: Sequence[Any]) -> Any:
    """`op(*arguments)`, of which the tensors come first and are DTensors of one mesh; one or several results."""
    count = len(sharding.operands)
    mesh = _mesh(arguments[:count])
    operands = [t if t is None else _as_sharded(t, mesh) for t in arguments[:count]]
    axes = tuple(
        () if t is None else tuple(of(t, arguments)) for t, of in zip(operands, sharding.operands, strict=True)
    )
    placements = tuple(() if t is None else t.placements for t in operands)
    plan = _plan if torch.compiler.is_compiling() else _known_plan
    plan = plan(placements, axes, tuple(sharding.splits(arguments)), mesh.ndim)
    shards = [
        t if t is None else _shard(t, where, gradients)
        for t, where, gradients in zip(operands, plan.operands, plan.gradients, strict=True)
    ]
    for place, of in enumerate(sharding.operands):
        if of is seed and shards[place] is not None:
            shards[place] = shards[place] + _index(mesh, plan.split)
    outputs = op(*shards, *arguments[count:])
    if isinstance(outputs, Tensor):
        return _whole(outputs, tuple(sharding.results[0](outputs, arguments)), plan.split, operands[0])
    return tuple(
        None if output is None else _whole(output, tuple(of(output, arguments)), plan.split, operands[0])
        for output, of in zip(outputs, sharding.results, strict=True)
    )


def replicated_seed(input: DTensor, low: int, high: int) -> Tensor:
    """A dropout's seed, drawn as torch draws what all processes are to have alike."""
    mesh = input.device_mesh
    empty = torch.zeros(1, dtype=torch.int64, device=input.device)
    return torch.randint_like(_replicated(empty, mesh), low, high)


def _mesh(tensors: Sequence[Tensor | None]) -> DeviceMesh:
    meshes = [t.device_mesh for t in tensors if isinstance(t, DTensor)]
    for mesh in meshes:
        if mesh != meshes[0]:
            raise RuntimeError(f"tensors are on {meshes[0]} and on {mesh}; expected one mesh")
    return meshes[0]


def _as_sharded(tensor: Tensor, mesh: DeviceMesh) -> DTensor:
    """Itself. What is no DTensor is an error, as in torch, but where torch is told to take it for replicated."""
    if isinstance(tensor, DTensor):
        return tensor
    if tensor.numel() != 1 and not getattr(DTensor._op_dispatcher, "_allow_implicit_replication", False):
        raise RuntimeError(
            f"got mixed torch.Tensor and DTensor: a tensor of shape {tuple(tensor.shape)} beside one on {mesh}; "
            "expected all to be DTensors"
        )
    return _replicated(tensor, mesh)


def _replicated(tensor: Tensor, mesh: DeviceMesh) -> DTensor:
    return DTensor.from_local(tensor, mesh, (Replicate(),) * mesh.ndim, run_check=False)


def _plan(placements: tuple[Placements, ...], axes: tuple[Dims, ...], allowed: tuple[int, ...], ndim: int) -> Plan:
    """Split as the first operand is which is split in a way that may be."""
    split: list[int | None] = [None] * ndim
    for where, dims in zip(placements, axes, strict=True):
        for place, placement in enumerate(where):
            # By its very class: others that are shards too have another order.
            dim = dims[placement.dim] if type(placement) is Shard else None
            if split[place] is None and dim is not None and dim in allowed:
                split[place] = dim
    operands = tuple(_placements(dims, split, Replicate()) for dims in axes)
    return Plan(tuple(split), operands, tuple(_placements(dims, split, Partial()) for dims in axes))


# Placements are few, and calls are many.
_known_plan = functools.lru_cache(maxsize=4096)(_plan)


def _placements(dims: Dims, split: Sequence[int | None], elsewhere: Placement) -> Placements:
    """Of a tensor of these dimensions; `elsewhere` over what splits others."""
    return tuple(Replicate() if dim is None else Shard(dims.index(dim)) if dim in dims else elsewhere for dim in split)


def _shard(tensor: DTensor, placements: Placements, gradients: Placements) -> Tensor:
    if tensor.placements != placements:
        tensor = tensor.redistribute(placements=placements)
    return tensor.to_local(grad_placements=gradients)


def _index(mesh: DeviceMesh, split: Dims) -> int:
    """Which of all shards this process has."""
    index = 0
    for place, dim in enumerate(split):
        if dim is not None:
            index = index * mesh.size(place) + mesh.get_local_rank(place)
    return index


def _whole(output: Tensor, dims: Dims, split: Dims, input: DTensor) -> DTensor:
    """What this is the shard of: dense, its dimensions in memory in the shard's order."""
    shape = [
        input.shape[dim] if dim in split and dim is not None else n for dim, n in zip(dims, output.shape, strict=True)
    ]
    strides, step = [0] * len(shape), 1
    for dim in reversed(memory_order(output.stride())):
        strides[dim] = step
        step *= max(shape[dim], 1)
    placements = _placements(dims, split, Replicate())
    return DTensor.from_local(
        output, input.device_mesh, placements, run_check=False, shape=torch.Size(shape), stride=tuple(strides)
    )
