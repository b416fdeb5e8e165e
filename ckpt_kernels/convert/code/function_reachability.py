"""Reachability analysis of a plain function: whether the function may be tried out on small tensors."""

import dis
import types
from collections.abc import Sequence
from typing import Any

from torch import nn

from .reachability import WRITING_OPCODES, CodeReader, is_torch_callable
from .size_independence import is_size_independent
from .snapshots import CodeSnapshot, NotTriable

# The only numbers that code may name, so that a trial reaches all cases.
_SMALL_NUMBERS = tuple(range(-4, 5))
_ERRORS = ("NotImplementedError", "RuntimeError", "TypeError", "ValueError")


def read_function(function: types.FunctionType, allowed: frozenset[str]) -> CodeSnapshot:
    """A snapshot of the code that a function reaches, which may name only the `allowed` attributes.

    Raises `NotTriable`.
    """
    reader = _FunctionReader(allowed)
    reader.read_function(function)
    reader.read_modules()
    return CodeSnapshot((nn.Module, (), ()), reader.dependencies)


class _FunctionReader(CodeReader):
    """Reads the code of a plain function.

    The function may slice tensors by their shapes and name only small numbers, so that the function treats a large
    tensor like a small one. Item assignments are allowed: the trial checks them.
    """

    forbidden_opcodes = tuple(name for name in WRITING_OPCODES if name != "STORE_SUBSCR")

    def __init__(self, allowed: frozenset[str]) -> None:
        super().__init__(nn.Module())
        self._allowed = allowed

    def read_function(self, function: Any, own: bool = False) -> None:
        super().read_function(function, own)
        if isinstance(function, types.FunctionType) and not is_torch_callable(function):
            if not is_size_independent(function):
                raise NotTriable("decides by what it is given, or takes parts of it that are not bounded by its shape")

    def check_constant(self, value: Any) -> None:
        numbers = (value.start, value.stop, value.step) if isinstance(value, slice) else (value,)
        if any(isinstance(number, float | int) and number not in _SMALL_NUMBERS for number in numbers):
            raise NotTriable("names a number that a trial may not reach")

    def check_bounds(self, loads: Sequence[dis.Instruction]) -> None:
        pass  # `is_size_independent` checks them

    def read_global(self, name: str, names: dict[str, Any]) -> None:
        if name not in names and name not in _ERRORS:
            raise NotTriable(f"names {name}, which is not on the list of what is known")
        super().read_global(name, names)

    def read_value(self, value: Any) -> None:
        if isinstance(value, float | int):
            raise NotTriable("reads a number that may change")
        super().read_value(value)

    def read_attribute(self, name: str) -> None:
        self.names.add(name)
        if name not in self._allowed:
            raise NotTriable(f"names {name}, which is not on the list of what is known")
