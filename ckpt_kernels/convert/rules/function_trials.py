"""Activations that are functions of a file, `def gelu(x): ...`: known by trying them out, as modules are."""

import sys
import types
from typing import Any, NamedTuple

import torch
from torch import nn

from ..code.call_graph import belongs_to_torch
from ..code.memoization import memoized
from ..code.reachability import CodeReader, CodeSnapshot, NotTriable, depends_on_shapes
from .pointwise import activation_by_trial
from .trial import POINTWISE, in_a_thread_of_its_own, result_of, takes_one


class TriedFunction(NamedTuple):
    """A function, the activation that it was when it was tried out, and all that its code reaches."""

    function: types.FunctionType
    name: str
    code: CodeSnapshot
    keeps_input: bool
    is_exact: bool

    def name_of(self, called: Any, wide: bool = False) -> str | None:
        """The activation that a call of that computes now; None if it is another function, or no more what it was, or
        another activation to float64 where operands are that `wide`."""
        holds = called is self.function and (self.is_exact or not wide)
        return self.name if holds and self.code.is_same() else None


@memoized
def activation_function(value: Any) -> TriedFunction | None:
    """What a function computes that is an activation of ours; None for any other value.

    It is one that its module has under its name, so that what is known of it can be pickled.
    """
    if type(value) is not types.FunctionType or belongs_to_torch(value) or not takes_one(value, 0):
        return None
    if getattr(sys.modules.get(value.__module__), value.__name__, None) is not value:
        return None
    try:
        return _tried_out(value)
    except NotTriable:
        return None


@in_a_thread_of_its_own
def _tried_out(function: types.FunctionType) -> TriedFunction | None:
    reader = CodeReader(nn.Module())
    reader.read_function(function)
    if depends_on_shapes(reader):
        return None
    reader.read_modules()
    transposed = torch.ones(2, 3, dtype=torch.float64, device="cpu").t()
    if result_of(function, transposed, POINTWISE).stride() != transposed.stride():
        return None
    name, keeps_input, is_exact = activation_by_trial(lambda points: result_of(function, points, POINTWISE))
    code = CodeSnapshot((nn.Module, (), ()), reader.dependencies)
    return None if name is None else TriedFunction(function, name, code, keeps_input, is_exact)
