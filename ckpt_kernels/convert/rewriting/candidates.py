"""Which methods are worth reading: those that name a child of the module, or a function that has a role.

The source of other methods is not parsed, which would take most of the time of a conversion.
"""

import dis
import types
from collections.abc import Collection
from typing import Any

from torch import nn

from ...activations import FUNCTIONS as ACTIVATIONS
from ..code.call_graph import belongs_to_torch, reachable_functions
from ..code.code_objects import cell_value, has_type
from ..rotations.recognition import is_rotation
from ..rules.activation_trials import activation_function
from ..rules.gates import may_be_gate
from .replacements import FUNCTION_TYPES, REPLACEMENTS
from .super_norms import CLASSES

# The names of functions and methods that a formula, a replacement or a note starts from.
_NAMES = {"erf", "square", "chunk", "clamp"}.union(
    function.__name__ for function in (*ACTIVATIONS, *REPLACEMENTS) if hasattr(function, "__name__")
)
_IMPORTS = dis.opmap["IMPORT_NAME"]


def is_candidate(function: types.FunctionType, module: nn.Module, children: Collection[str]) -> bool:
    """Whether a method names one of the children, or a function that has a role.

    Functions are tried only in methods that the forward may call, because trials take time.
    """
    if not _NAMES.union(children).isdisjoint(function.__code__.co_names):
        return True
    if "super" in function.__code__.co_names and isinstance(module, CLASSES):
        return True
    named = _named(function, module)
    if any(f in ACTIVATIONS or f in REPLACEMENTS or may_be_gate(f, 0) for f in _functions(named)):
        return True
    if function not in reachable_functions(type(module)):
        return False
    owners = [value for value in named if has_type(value, types.ModuleType) and not belongs_to_torch(value)]
    named += [vars(owner).get(name) for owner in owners for name in function.__code__.co_names]
    return _has_functions(function) or any(map(_has_role, _functions(named)))


def _named(function: types.FunctionType, module: nn.Module) -> list[Any]:
    """The globals and the module's own attributes that a function names, and its variables of enclosing functions."""
    names = set(function.__code__.co_names)
    owners = (function.__globals__, module.__dict__)
    return [owner.get(name) for owner in owners for name in names] + list(map(cell_value, function.__closure__ or ()))


def _functions(values: list[Any]) -> list[Any]:
    return [value for value in values if has_type(value, FUNCTION_TYPES)]


def _has_role(function: Any) -> bool:
    return may_be_gate(function, 0) or activation_function(function) is not None or is_rotation(function)


def _has_functions(function: types.FunctionType) -> bool:
    """Whether a function defines functions by a `def`, or imports anything: these may be rotations."""
    code = function.__code__
    defines = any(isinstance(c, types.CodeType) and c.co_name in code.co_varnames for c in code.co_consts)
    return defines or _IMPORTS in code.co_code[::2]
