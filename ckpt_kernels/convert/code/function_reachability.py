"""What the code of a function reads and reaches that is no method: whether what it does may be tried out."""

import dis
import types
from collections.abc import Sequence
from typing import Any

from torch import nn

from .reachability import WRITING_OPCODES, CodeReader, CodeSnapshot, NotTriable, is_torch_callable
from .size_independence import is_size_independent

_SMALL = tuple(range(-4, 5))
_ERRORS = ("NotImplementedError", "RuntimeError", "TypeError", "ValueError")


def read_function(function: types.FunctionType, allowed: frozenset[str]) -> CodeSnapshot:
    """The code that a function reaches which is no method, and names no attributes but the allowed ones."""
    reading = _FunctionReading(allowed)
    reading.function(function)
    reading.modules()
    return CodeSnapshot((nn.Module, (), ()), reading.found)


class _FunctionReading(CodeReader):
    """What a function reads and does that is no method: it may take parts of tensors by their shapes, and name no
    numbers but the least, so that what it does with a small tensor is what it does with a large one. What it writes to
    a trial sees."""

    writes = tuple(name for name in WRITING_OPCODES if name != "STORE_SUBSCR")

    def __init__(self, allowed: frozenset[str]) -> None:
        super().__init__(nn.Module())
        self._allowed = allowed

    def function(self, function: Any, own: bool = False) -> None:
        super().function(function, own)
        if isinstance(function, types.FunctionType) and not is_torch_callable(function):
            if not is_size_independent(function):
                raise NotTriable("decides by what it is given, or takes parts of it that are not bounded by its shape")

    def constant(self, value: Any) -> None:
        numbers = (value.start, value.stop, value.step) if isinstance(value, slice) else (value,)
        if any(isinstance(number, float | int) and number not in _SMALL for number in numbers):
            raise NotTriable("names a number that a trial may not reach")

    def bounds(self, loads: Sequence[dis.Instruction]) -> None:
        pass

    def named(self, name: str, names: dict[str, Any]) -> None:
        if name not in names and name not in _ERRORS:
            raise NotTriable(f"names {name}, which is not on the list of what is known")
        super().named(name, names)

    def value(self, value: Any) -> None:
        if isinstance(value, float | int):
            raise NotTriable("reads a number that may change")
        super().value(value)

    def attribute(self, name: str) -> None:
        self.names.add(name)
        if name not in self._allowed:
            raise NotTriable(f"names {name}, which is not on the list of what is known")
