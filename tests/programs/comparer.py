"""Snapshots of values after a call, and the differences of two snapshots."""

import dataclasses
import math
import types
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

# The words of a difference in values alone.
OFF_BY = "are off by"


@dataclasses.dataclass(frozen=True)
class TensorSnapshot:
    """A snapshot of a tensor."""

    kind: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    requires_grad: bool
    value: Tensor


@dataclasses.dataclass(frozen=True)
class ContainerSnapshot:
    """A snapshot of an object or a container: the class, and the items by name or index."""

    kind: str
    items: tuple[tuple[Any, Any], ...]


def snapshot(value: Any) -> Any:
    """A snapshot of a value, which later writes do not change."""
    if isinstance(value, TensorSnapshot | ContainerSnapshot):
        return value
    if isinstance(value, Tensor):
        plain = value.detach().as_subclass(Tensor).clone()
        return TensorSnapshot(_kind(value), value.dtype, tuple(value.shape), value.requires_grad, plain)
    if isinstance(value, nn.Module):
        return f"a module, {_kind(value)}"
    if isinstance(value, Mapping):
        return ContainerSnapshot(_kind(value), tuple((key, snapshot(item)) for key, item in value.items()))
    if isinstance(value, list | tuple):
        return ContainerSnapshot(_kind(value), tuple((index, snapshot(item)) for index, item in enumerate(value)))
    if isinstance(value, types.SimpleNamespace) or (dataclasses.is_dataclass(value) and not isinstance(value, type)):
        return ContainerSnapshot(_kind(value), tuple((key, snapshot(item)) for key, item in vars(value).items()))
    if isinstance(value, bool | int | float | str | type(None) | torch.dtype):
        return value
    return getattr(value, "__qualname__", None) or _kind(value)


def _kind(value: Any) -> str:
    return type(value).__qualname__


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """The allowed difference of values, relative to the largest in their tensor.

    `scale` is the magnitude of the terms where values cancel, which determines the rounding errors. `coarse`: some
    values were computed in 16 bits. `cancels`: some of these values may cancel.
    """

    coarse: bool
    scale: float = 1.0
    gradients: bool = False
    cancels: bool = False

    def of(self, dtype: torch.dtype) -> float:
        if self.coarse or dtype in (torch.bfloat16, torch.float16):
            return (1e-1 if self.gradients else 3e-2) * (5 if self.cancels else 1)
        # A float64 value may be a cast of a value that was computed in float32.
        return 1e-5 if dtype == torch.float64 else 1e-4


def differences(eager: Any, other: Any, tolerance: Tolerance, at: str) -> Iterator[str]:
    """The differences of `other` from the eager twin's snapshot, each with its place."""
    if type(eager) is not type(other):
        yield f"{at}: {_short(eager)} became {_short(other)}"
    elif isinstance(eager, TensorSnapshot):
        yield from _of_tensors(eager, other, tolerance, at)
    elif isinstance(eager, ContainerSnapshot):
        names, others = [key for key, _ in eager.items], [key for key, _ in other.items]
        if eager.kind != other.kind:
            yield f"{at}: {eager.kind} became {other.kind}"
        elif names != others:
            yield f"{at}: holds {_short(names)} and became {_short(others)}"
        else:
            for (key, one), (_, two) in zip(eager.items, other.items, strict=True):
                yield from differences(one, two, tolerance, f"{at}[{key!r}]")
    elif isinstance(eager, float):
        allowed = tolerance.of(torch.float32) * max(abs(eager), 0.1)
        if not (abs(eager - other) <= allowed or eager == other or (math.isnan(eager) and math.isnan(other))):
            yield f"{at}: {eager} became {other}"
    elif eager != other:
        yield f"{at}: {_short(eager)} became {_short(other)}"


def _of_tensors(eager: TensorSnapshot, other: TensorSnapshot, tolerance: Tolerance, at: str) -> Iterator[str]:
    for name in ("kind", "dtype", "shape", "requires_grad"):
        if getattr(eager, name) != getattr(other, name):
            yield f"{at}: {name} {getattr(eager, name)} became {getattr(other, name)}"
            return
    if not eager.dtype.is_floating_point:
        if not torch.equal(eager.value, other.value):
            yield f"{at}: {_short(eager.value.tolist())} became {_short(other.value.tolist())}"
        return
    one, two = eager.value.double(), other.value.double()
    if torch.equal(one, two) or not one.numel():
        return
    if not torch.equal(one.isfinite(), two.isfinite()):
        yield f"{at}: not finite in other places"
        return
    one, two = one.nan_to_num(), two.nan_to_num()
    largest = max(one.abs().max().item(), 0.1 * tolerance.scale)
    off = (one - two).abs().max().item()
    if off > tolerance.of(eager.dtype) * largest:
        yield f"{at}: values of up to {largest:.3g} {OFF_BY} {off:.3g}"


def _short(value: Any) -> str:
    text = value.kind if isinstance(value, TensorSnapshot | ContainerSnapshot) else str(value)
    return text if len(text) < 200 else f"{text[:200]} ..."
