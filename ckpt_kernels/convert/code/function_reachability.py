"""Reachability analysis of functions that take parts of a tensor: whether they may be tried out on small tensors."""

import dis
import types
from collections.abc import Sequence
from typing import Any

from torch import nn

from .code_objects import has_type
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
    reader = _FunctionReader(nn.Module(), allowed)
    reader.read_function(function)
    reader.read_modules()
    return reader.snapshot()


class SizeIndependentReader(CodeReader):
    """Reads code that may name only the `allowed` attributes, and slice tensors by their shapes."""

    def __init__(self, module: nn.Module, allowed: frozenset[str]) -> None:
        super().__init__(module)
        self._allowed_names = allowed

    def read_function(self, function: Any, own: bool = False) -> None:
        super().read_function(function, own)
        if has_type(function, types.FunctionType) and not is_torch_callable(function):
            if not is_size_independent(function):
                raise NotTriable("decides by what it is given, or takes parts of it that are not bounded by its shape")

    def check_bounds(self, loads: Sequence[dis.Instruction]) -> None:
        pass  # `is_size_independent` checks them


class _FunctionReader(SizeIndependentReader):
    """Reads the code of a plain function, which may name only small numbers, so that the function treats a large tensor
    like a small one. Item assignments are allowed: the trial checks them."""

    forbidden_opcodes = tuple(name for name in WRITING_OPCODES if name != "STORE_SUBSCR")

    def check_constant(self, value: Any) -> None:
        numbers = (value.start, value.stop, value.step) if isinstance(value, slice) else (value,)
        if any(isinstance(number, float | int) and number not in _SMALL_NUMBERS for number in numbers):
            raise NotTriable("names a number that a trial may not reach")

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
        if name not in self._allowed_names:
            raise NotTriable(f"names {name}, which is not on the list of what is known")
