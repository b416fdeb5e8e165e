"""Calls ops with DTensors: see `sharding`.

A call runs on the local tensors, after operands with other placements have been redistributed. The results are DTensors
again. If each process has a part of a gradient, such as that of a weight beside split rows, the gradient is partial, as
in torch's own layers. Autograd sees all these steps, so gradients, second derivatives and torch.compile need no rules
of their own. Only the local tensors of an ordinary call are kept for backward.
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
# For each dimension of a tensor or of a mesh, a dimension of the first operand.
Dims = tuple[int | None, ...]


class Plan(NamedTuple):
    """How a call is split: for each mesh dimension a dimension of the first operand or None; and the placements of the
    operands and their gradients."""

    split: Dims
    operands: tuple[Placements, ...]
    gradients: tuple[Placements, ...]


def call(op: Callable[..., Any], sharding: Sharding, arguments: Sequence[Any]) -> Any:
    """Runs `op(*arguments)`, where the tensors come first and are DTensors of one mesh. Returns one or several
    results."""
    count = len(sharding.operands)
    mesh = _mesh(arguments[:count])
    operands = [t if t is None else _as_sharded(t, mesh) for t in arguments[:count]]
    axes = tuple(
        () if t is None else tuple(of(t, arguments)) for t, of in zip(operands, sharding.operands, strict=True)
    )
    placements = tuple(() if t is None else t.placements for t in operands)
    plan = _plan if torch.compiler.is_compiling() else _cached_plan
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
    """A dropout seed, drawn so that all processes get the same, as torch does."""
    mesh = input.device_mesh
    empty = torch.zeros(1, dtype=torch.int64, device=input.device)
    return torch.randint_like(_replicated(empty, mesh), low, high)


def _mesh(tensors: Sequence[Tensor | None]) -> DeviceMesh:
    """The mesh of all DTensors. Raises RuntimeError if there are several."""
    meshes = [t.device_mesh for t in tensors if isinstance(t, DTensor)]
    for mesh in meshes:
        if mesh != meshes[0]:
            raise RuntimeError(f"tensors are on {meshes[0]} and on {mesh}; expected one mesh")
    return meshes[0]


def _as_sharded(tensor: Tensor, mesh: DeviceMesh) -> DTensor:
    """The tensor as a DTensor. A plain tensor is an error as in torch, unless torch treats plain tensors as
    replicated."""
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
    """The plan that splits like the first operand that is split in an allowed way."""
    split: list[int | None] = [None] * ndim
    for where, dims in zip(placements, axes, strict=True):
        for place, placement in enumerate(where):
            # Compare the exact class: subclasses of Shard order elements differently.
            dim = dims[placement.dim] if type(placement) is Shard else None
            if split[place] is None and dim is not None and dim in allowed:
                split[place] = dim
    operands = tuple(_placements(dims, split, Replicate()) for dims in axes)
    return Plan(tuple(split), operands, tuple(_placements(dims, split, Partial()) for dims in axes))


# There are few placements, and many calls.
_cached_plan = functools.lru_cache(maxsize=4096)(_plan)


def _placements(dims: Dims, split: Sequence[int | None], elsewhere: Placement) -> Placements:
    """The placements of a tensor of these dimensions, with `elsewhere` over mesh dimensions that split others."""
    return tuple(Replicate() if dim is None else Shard(dims.index(dim)) if dim in dims else elsewhere for dim in split)


def _shard(tensor: DTensor, placements: Placements, gradients: Placements) -> Tensor:
    """The local shard, after redistribution if needed."""
    if tensor.placements != placements:
        tensor = tensor.redistribute(placements=placements)
    return tensor.to_local(grad_placements=gradients)


def _index(mesh: DeviceMesh, split: Dims) -> int:
    """The index of this process's shard among all shards."""
    index = 0
    for place, dim in enumerate(split):
        if dim is not None:
            index = index * mesh.size(place) + mesh.get_local_rank(place)
    return index


def _whole(output: Tensor, dims: Dims, split: Dims, input: DTensor) -> DTensor:
    """The DTensor that has this output as a shard: dense, with the shard's order of dimensions in memory."""
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
