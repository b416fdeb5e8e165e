"""Plain settings of modules: attributes whose values can be compared, such as an eps or a name."""

from typing import Any

import torch
from torch import nn

from ..native_guards import MISSING

# Names and values of the settings that a forward reads.
Settings = tuple[tuple[str, Any], ...]

# A subclass of these may have operators of its own.
PLAIN_TYPES = frozenset((bool, int, float, str, type(None), torch.dtype, torch.device, torch.Size))


class FrozenList(tuple):
    """The items of a list, which itself could change. Code can tell a list from a tuple."""


def as_setting(value: Any) -> Any:
    """The value as a setting is kept."""
    return FrozenList(value) if type(value) is list else value


def bare_module(kind: type[nn.Module], settings: Settings = ()) -> nn.Module:
    """A module of that class with these settings, and without parameters; no code of the class runs."""
    module = object.__new__(kind)
    attributes = {name: list(value) if type(value) is FrozenList else value for name, value in settings}
    module.__dict__.update(nn.Module().__dict__ | attributes)
    return module


def is_plain(value: Any) -> bool:
    """Whether the value of an attribute is a plain setting."""
    return is_constant(as_setting(value))


def is_constant(value: Any) -> bool:
    """Whether a value is plain and immutable: of `PLAIN_TYPES`, or a tuple of integers."""
    is_tuple = type(value) is tuple or type(value) is FrozenList
    return type(value) in PLAIN_TYPES or (is_tuple and all(type(v) is int for v in value))


def has_settings(module: nn.Module, settings: Settings) -> bool:
    """Whether a module still has these settings, with values of the same types."""
    attributes = module.__dict__
    for name, value in settings:
        now = as_setting(attributes.get(name, MISSING))
        if type(now) is not type(value) or now != value:
            return False
    return True
