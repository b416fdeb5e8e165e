"""Recognises activations that are functions of a Python file, `def gelu(x): ...`, by trials as for modules."""

import sys
import types
from typing import Any, NamedTuple, TypeGuard

from torch import nn

from ..code.call_graph import belongs_to_torch
from ..code.memoization import memoized
from ..code.reachability import CodeReader, depends_on_dtype, depends_on_shapes
from ..code.snapshots import CodeSnapshot, NotTriable
from .activation_trials import TrialResult, tried_activation
from .trial import takes_one_argument


class TriedFunction(NamedTuple):
    """A function, the result of its trial, and all code and globals that the function reaches."""

    function: types.FunctionType
    result: TrialResult
    code: CodeSnapshot

    def name_of(self, called: Any, wide: bool = False) -> str | None:
        """The activation that a call of `called` computes now.

        None for another function, for a function that has changed since the trial, and for a formula that is not exact
        where operands are `wide`, which is float64.
        """
        holds = called is self.function and (self.result.is_exact or not wide)
        return self.result.name if holds and self.code.is_same() else None


def is_importable(function: Any) -> TypeGuard[types.FunctionType]:
    """Whether a value is a function outside torch that can be imported under its name, so that it can be pickled."""
    if type(function) is not types.FunctionType or belongs_to_torch(function):
        return False
    return getattr(sys.modules.get(function.__module__), function.__name__, None) is function


@memoized
def activation_function(value: Any) -> TriedFunction | None:
    """The trial of a function that computes a known activation; None for any other value."""
    if not is_importable(value) or not takes_one_argument(value, 0):
        return None
    try:
        reader = CodeReader(nn.Module())
        reader.read_function(value)
        if depends_on_shapes(reader) or depends_on_dtype(reader):
            return None
        reader.read_modules()
        result = tried_activation(value)
    except NotTriable:
        return None
    code = CodeSnapshot((nn.Module, (), ()), reader.dependencies)
    return None if result.name is None else TriedFunction(value, result, code)
