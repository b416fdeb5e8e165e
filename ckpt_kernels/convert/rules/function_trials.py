"""Recognises activations that are functions of a Python file, `def gelu(x): ...`, by trials as for modules."""

import sys
import types
from typing import Any, NamedTuple

import torch
from torch import nn

from ..code.call_graph import belongs_to_torch
from ..code.memoization import memoized
from ..code.reachability import CodeReader, depends_on_dtype, depends_on_shapes
from ..code.snapshots import CodeSnapshot, NotTriable
from .activation_trials import activation_by_trial
from .trial import POINTWISE, in_own_thread, result_of, takes_one_argument


class TriedFunction(NamedTuple):
    """A function, the activation that the trial recognised, and all code and globals that the function reaches.

    Attributes:
        keeps_input: whether torch saves the input for backward.
        is_exact: whether the formula is exact; one with rounded constants differs from the activation in float64.
    """

    function: types.FunctionType
    name: str
    code: CodeSnapshot
    keeps_input: bool
    is_exact: bool

    def name_of(self, called: Any, wide: bool = False) -> str | None:
        """The activation that a call of `called` computes now.

        None for another function, for a function that has changed since the trial, and for a formula that is not exact
        where operands are `wide`, which is float64.
        """
        holds = called is self.function and (self.is_exact or not wide)
        return self.name if holds and self.code.is_same() else None


@memoized
def activation_function(value: Any) -> TriedFunction | None:
    """The trial of a function that computes a known activation; None for any other value.

    The function must be importable under its name, so that the trial can be pickled.
    """
    if type(value) is not types.FunctionType or belongs_to_torch(value) or not takes_one_argument(value, 0):
        return None
    if getattr(sys.modules.get(value.__module__), value.__name__, None) is not value:
        return None
    try:
        return _tried(value)
    except NotTriable:
        return None


@in_own_thread
def _tried(function: types.FunctionType) -> TriedFunction | None:
    reader = CodeReader(nn.Module())
    reader.read_function(function)
    if depends_on_shapes(reader) or depends_on_dtype(reader):
        return None
    reader.read_modules()
    transposed = torch.ones(2, 3, dtype=torch.float64, device="cpu").t()
    if result_of(function, transposed, POINTWISE).stride() != transposed.stride():
        return None
    name, keeps_input, is_exact = activation_by_trial(lambda points: result_of(function, points, POINTWISE))
    code = CodeSnapshot((nn.Module, (), ()), reader.dependencies)
    return None if name is None else TriedFunction(function, name, code, keeps_input, is_exact)
