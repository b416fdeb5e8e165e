"""Functions that are named like rotations but not recognized as such: the reason is a line of the report."""

import ast
import re
import types
from collections.abc import Iterator

from torch import nn

from ..code.code_objects import has_type
from ..code.scope import Scope
from ..code.source import NoSource, definition_of
from ..rewriting.methods import functions_in
from .recognition import is_rotation, why_not_rotation

_NAMED = re.compile(r"^_*apply_(\w+_)?(rotary|rope)|^_*rotate_")


def why_unrecognized(module: nn.Module) -> str:
    """The reason for the first such function that a method of the module or of its objects calls, or ""."""
    for function in functions_in(module):
        if not any(map(_NAMED.search, (*function.__code__.co_names, *function.__code__.co_varnames))):
            continue
        for called in _called(function):
            if not is_rotation(called):
                return f"calls {called.__name__}, which {why_not_rotation(called)}"
    return ""


def _called(function: types.FunctionType) -> Iterator[types.FunctionType]:
    """The functions with such names that a function calls."""
    try:
        tree = definition_of(function).tree
    except NoSource:
        return
    scope = Scope(function, tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and _NAMED.search(node.func.id):
            for value in (scope.value(node.func), scope.local_function(node.func)):
                if has_type(value, types.FunctionType):
                    yield value
