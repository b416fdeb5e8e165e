"""The functions that a module's forward may call, as far as the names in their code tell."""

import functools
import types
from collections.abc import Iterable
from typing import Any

from torch import nn

from .source import NoSource, layers_of


@functools.lru_cache(maxsize=4096)
def functions_of(kind: type[nn.Module]) -> tuple[types.FunctionType, ...]:
    """The class's forward, and all of Python's functions but torch's that it may reach, without their decorators.

    A function whose decorators are not known stands for itself.
    """
    reached: dict[types.FunctionType, types.FunctionType] = {}
    waiting = [getattr(kind, "forward", None)]
    while waiting:
        function = waiting.pop()
        if not isinstance(function, types.FunctionType) or function in reached or is_torchs(function):
            continue
        try:
            written = layers_of(function)[-1]
        except NoSource:
            written = function
        reached[function] = written
        names = names_in(written.__code__)
        modules = [value for value in written.__globals__.values() if isinstance(value, types.ModuleType)]
        waiting += _contents(written.__closure__ or ())
        for name in names:
            waiting += [getattr(kind, name, None), written.__globals__.get(name)]
            waiting += [vars(module).get(name) for module in modules if not is_torchs(module)]
    return tuple(reached.values())


def names_in(code: types.CodeType) -> set[str]:
    """The globals and attributes that code names, and the functions within it."""
    inner = [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return set(code.co_names).union(*map(names_in, inner))


@functools.cache
def uses_transforms(kind: type[nn.Module]) -> bool:
    """Whether its forward may reach torch.func's transforms, which do not allow saved-tensor hooks around them."""
    for function in functions_of(kind):
        names = names_in(function.__code__)
        if names & {"functorch", "disable_saved_tensors_hooks"} or {"torch", "func"} <= names:
            return True
        values = [function.__globals__.get(name) for name in names] + _contents(function.__closure__ or ())
        if any(_is_of_functorch(value) for value in values):
            return True
    return False


def is_torchs(value: Any) -> bool:
    """Whether a module or a function is Python's or torch's own."""
    name = value.__name__ if isinstance(value, types.ModuleType) else value.__module__ or ""
    return name.partition(".")[0] in ("torch", "builtins")


def _is_of_functorch(value: Any) -> bool:
    name = value.__name__ if isinstance(value, types.ModuleType) else getattr(value, "__module__", None)
    return isinstance(name, str) and name.startswith(("torch.func", "torch._functorch", "functorch"))


def _contents(cells: Iterable[types.CellType]) -> list[Any]:
    found = []
    for cell in cells:
        try:
            found.append(cell.cell_contents)
        except ValueError:  # it has no value yet
            continue
    return found
