"""Makes the state of a model beside the parameters comparable: attributes, outputs, generators."""

import dataclasses
import enum
import hashlib
import inspect
import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy
import torch
from torch import Tensor, nn

# torch's own entries in every module's __dict__: compared as parameters, buffers and names, not as attributes.
_TORCHS = ("_parameters", "_buffers", "_modules")
# The one key that conversion may add.
_MARKER = "_ckpt"
# The greatest depth of a comparison. A model's configuration has depth four.
_DEPTH = 8


class Leaf:
    """A value that is compared and shown by a description."""

    def __init__(self, value: Any) -> None:
        self.value = value


def seed(number: int) -> None:
    """Seeds all generators that a model may draw from."""
    random.seed(number)
    numpy.random.seed(number)
    torch.manual_seed(number)


def generators() -> dict[str, Any]:
    """The states of the generators, as leaves whose differences are not shown, because the states are long."""
    kind, keys, *rest = numpy.random.get_state()
    states = {
        "random": random.getstate(),
        "numpy": (kind, keys.tobytes(), *rest),
        "torch": torch.get_rng_state().tolist(),
    }
    return {name: Leaf(hashlib.sha1(repr(state).encode()).hexdigest()[:8]) for name, state in states.items()}


class Freezer:
    """Makes copies that later changes do not affect: dicts of mappings, sequences and objects; tensors; and leaves.

    With `identity`, objects are compared by identity; without, by value, to compare two builds of a model. An object
    that many modules share, such as a configuration, is copied once.
    """

    def __init__(self, identity: bool) -> None:
        self.identity = identity
        # Holds the values too, so that no id is used again.
        self._known: dict[int, tuple[Any, Any]] = {}

    def __call__(self, value: Any, depth: int = 0) -> Any:
        if isinstance(value, Tensor):
            return value.detach().clone()
        if value is None or isinstance(value, bool | int | float | complex | str | bytes | enum.Enum | torch.dtype):
            return Leaf(value)
        mark = id(value) if self.identity else None
        if isinstance(value, nn.Module):
            return Leaf((type(value).__qualname__, mark))
        if isinstance(value, type) or inspect.isroutine(value):
            return Leaf(getattr(value, "__qualname__", type(value).__qualname__))
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        if isinstance(value, set | frozenset):
            return Leaf((kind, len(value) if self.identity else sorted(map(str, value))))
        if isinstance(value, numpy.ndarray):
            return Leaf((kind, value.shape, value.tobytes()))
        items = _held(value)
        if items is None or depth > _DEPTH:
            return Leaf((kind, mark))
        if id(value) not in self._known:
            # A value that contains itself is a leaf within itself.
            self._known[id(value)] = value, Leaf((kind, mark))
            found = {"type": Leaf(kind)} | {key: self(item, depth + 1) for key, item in items}
            self._known[id(value)] = value, found
        return self._known[id(value)][1]


def _held(value: Any) -> list[tuple[str, Any]] | None:
    """The members of a value by name; None for a value without members."""
    if isinstance(value, Mapping):
        return [(str(key), item) for key, item in value.items()]
    if isinstance(value, list | tuple):
        return [(str(index), item) for index, item in enumerate(value)]
    return list(vars(value).items()) if hasattr(value, "__dict__") else None


def attributes(model: nn.Module, identity: bool) -> dict[str, Any]:
    """For every module, `vars` without the entries that conversion may add, with the names and order of the members."""
    found = {}
    freeze = Freezer(identity)
    for name, module in model.named_modules():
        kept = {key: value for key, value in vars(module).items() if key not in _TORCHS and not key.startswith(_MARKER)}
        entry = {key: freeze(_unnumbered(key, value, identity)) for key, value in kept.items()}
        entry["its keys"] = Leaf(tuple(kept))
        for key in _TORCHS:
            held = vars(module).get(key, {})
            entry[key] = Leaf(tuple((k, id(v) if identity else None) for k, v in held.items()))
        found[name or "the model"] = entry
    return found


def _unnumbered(key: str, value: Any, identity: bool) -> Any:
    """The value without the numbers of hooks, which differ between builds."""
    return list(value.values()) if key.endswith("_hooks") and isinstance(value, dict) and not identity else value


def classes(model: nn.Module) -> dict[str, Any]:
    return {name or "the model": Leaf(type(module)) for name, module in model.named_modules()}


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters and buffers."""
    return {name: t.detach().clone() for name, t in (*model.named_parameters(), *model.named_buffers())}


def buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in model.named_buffers()}


def restore(model: nn.Module, saved: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name in saved and saved[name].shape == buffer.shape:
                buffer.copy_(saved[name])


def _items(value: Any) -> Iterator[tuple[str, Any]] | None:
    """The members of an output by name; None for an output without members."""
    if isinstance(value, Mapping):
        return ((str(key), item) for key, item in value.items())
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return zip(value._fields, value, strict=True)
    if isinstance(value, list | tuple):
        return ((str(index), item) for index, item in enumerate(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))
    # For example, a cache.
    if hasattr(value, "__dict__") and not isinstance(value, type | nn.Module | torch.distributions.Distribution):
        return iter(vars(value).items())
    return None


def structure(value: Any, depth: int = 0) -> Any:
    """An output without the numbers: exact types, names, shapes, dtypes, and which tensors need a gradient."""
    if isinstance(value, Tensor):
        return Leaf((type(value), tuple(value.shape), value.dtype, value.requires_grad))
    if value is None or isinstance(value, bool | int | str):
        return Leaf(value)
    items = _items(value) if depth < _DEPTH else None
    if items is None:
        return Leaf(type(value))
    return {"type": Leaf(type(value))} | {key: structure(item, depth + 1) for key, item in items}


def leaves(value: Any, path: str = "", depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    """All tensors of an output by name."""
    if isinstance(value, Tensor):
        yield path or "output", value
        return
    items = None if value is None or depth > _DEPTH else _items(value)
    for key, item in items or ():
        yield from leaves(item, f"{path}.{key}" if path else key, depth + 1)


def difference(left: Any, right: Any, tolerance: float = 0.0, path: str = "") -> str | None:
    """The first difference between two frozen values; None without one. Tensors may differ by a part of their norm."""
    where = path or "the value"
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return _tensor_difference(left, right, tolerance, where)
    if isinstance(left, dict) and isinstance(right, dict):
        # Common keys first: their differences say more than a difference of keys.
        for key in (key for key in left if key in right):
            found = difference(left[key], right[key], tolerance, f"{path}.{key}" if path else str(key))
            if found:
                return found
        if left.keys() != right.keys():
            gone, new = sorted(left.keys() - right.keys()), sorted(right.keys() - left.keys())
            return f"{where}: " + "; ".join(filter(None, (gone and f"lacks {gone[:3]}", new and f"has {new[:3]} too")))
        return None
    if isinstance(left, Leaf) and isinstance(right, Leaf):
        if _same(left.value, right.value, tolerance):
            return None
        return f"{where}: {str(left.value)[:80]} became {str(right.value)[:80]}"
    return f"{where}: {type(left).__name__} became {type(right).__name__}"


def _same(left: Any, right: Any, tolerance: float) -> bool:
    if isinstance(left, float) and isinstance(right, float):
        return left == right or (left != left and right != right) or abs(left - right) <= tolerance * abs(left)
    return bool(left == right)


def _tensor_difference(left: Tensor, right: Tensor, tolerance: float, where: str) -> str | None:
    if (left.shape, left.dtype) != (right.shape, right.dtype):
        return f"{where}: {tuple(left.shape)} {left.dtype} became {tuple(right.shape)} {right.dtype}"
    if torch.equal(left, right) or (left.is_floating_point() and torch.equal(left.nan_to_num(), right.nan_to_num())):
        return None
    if left.is_floating_point() and tolerance:
        error = float((left.double() - right.double()).norm()) / (float(left.double().norm()) + 1e-12)
        return None if error <= tolerance else f"{where}: differs by {error:.1e} of its norm"
    return f"{where}: {int((left != right).sum())} of {left.numel()} numbers differ"
