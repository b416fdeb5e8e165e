"""Compares a model's parameters, buffers and attributes before and after a change."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def state_of(model: nn.Module) -> dict[str, Any]:
    """Parameters, buffers and attributes of all modules, by name."""
    state: dict[str, Any] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        state[name] = tensor.detach().clone()
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if not key.startswith("_"):
                state[f"{name}.{key}"] = described(value)
    return state


def described(value: Any, depth: int = 3) -> Any:
    """A copy of the comparable parts of an attribute."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping) and depth:
        return type(value).__name__, [(str(key), described(item, depth - 1)) for key, item in value.items()]
    if isinstance(value, list | tuple | set) and depth:
        return type(value).__name__, [described(item, depth - 1) for item in value]
    if isinstance(value, bool | int | float | str | type(None)):
        return value
    attributes = vars(value) if depth and hasattr(value, "__dict__") and not isinstance(value, type | nn.Module) else {}
    return type(value).__name__, {str(key): described(item, depth - 1) for key, item in attributes.items()}


def different(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """The names that only one state has, or whose values differ by more than rounding."""
    names = sorted(before.keys() ^ after.keys())
    return names + [name for name in before.keys() & after.keys() if not _same(before[name], after[name])]


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        close = a.shape == b.shape and a.dtype == b.dtype
        return close and (
            torch.allclose(a, b, rtol=1e-2, atol=1e-4, equal_nan=True) if a.is_floating_point() else torch.equal(a, b)
        )
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-3) or (a != a and b != b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return type(a) is type(b) and a == b


def types_in(value: Any) -> Any:
    """The types of a nested value."""
    if isinstance(value, Mapping):
        return type(value).__name__, [(key, types_in(item)) for key, item in value.items()]
    if isinstance(value, tuple | list):
        return type(value).__name__, [types_in(item) for item in value]
    return type(value).__name__
