"""The tensors in nested arguments and results of calls."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in nested tuples, lists, mappings and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors_in(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from tensors_in(getattr(value, field.name, None))


def tensors_among(value: Any, depth: int = 4) -> Iterator[Tensor]:
    """All tensors in nested tuples, lists and dicts, to a limited depth: a list may contain itself."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list | dict) and depth:
        for part in list(value.values()) if isinstance(value, dict) else value:
            yield from tensors_among(part, depth - 1)
