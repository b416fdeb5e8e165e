"""The names of the tensors that a function may write to in place, by the function's syntax tree.

Item assignments, augmented assignments, in-place methods, and arguments such as `out=` and `inplace=True` count as
writes. Items of a list or dict that the function has made are no tensors.
"""

import ast
import inspect
import types
from collections.abc import Iterator
from typing import Any

from .call_graph import belongs_to_torch
from .code_objects import has_type
from .scope import Scope
from .syntax_trees import is_name, root_name

_ON_FLOATS = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.Pow, ast.MatMult)
_DISPLAYS = (ast.List, ast.Dict, ast.Tuple, ast.ListComp, ast.DictComp)

# Python's in-place operators, as functions and as methods.
_IN_PLACE = frozenset("iadd ifloordiv imatmul imod imul ipow isub itruediv setitem".split())
# Functions that take the name of an attribute as an argument.
_BY_NAME = frozenset(("getattr", "attrgetter", "methodcaller"))
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType)


def written_names(function: ast.FunctionDef, scope: Scope) -> Iterator[str]:
    """The names of the tensors that a function may write to; "" for a tensor without a name."""
    containers = _containers(function)
    for node in ast.walk(function):
        if isinstance(node, ast.AugAssign):
            # `+=` may extend a list or a string.
            grows = isinstance(node.value, ast.Tuple | ast.List | ast.JoinedStr) or is_name(node.target, containers)
            if isinstance(node.op, _ON_FLOATS) and not grows:
                yield root_name(node.target)
        elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store):
            # String keys are those of dicts. Targets of augmented assignments are reported above as well.
            is_key = isinstance(node.slice, ast.Constant) and isinstance(node.slice.value, str)
            if not is_key and not is_name(node.value, containers):
                yield root_name(node)
        elif isinstance(node, ast.Attribute) and _is_in_place(node.attr):
            yield root_name(node)
        elif isinstance(node, ast.Call):
            yield from _written_by_call(node, scope)


def _written_by_call(call: ast.Call, scope: Scope) -> Iterator[str]:
    called = getattr(call.func, "attr", getattr(call.func, "id", ""))
    first = root_name(call.args[0]) if call.args else ""
    if called in _BY_NAME:
        names = call.args[called == "getattr" :]
        # A module may compute the names of its own attributes.
        is_allowed = all(isinstance(n, ast.Constant) for n in names[:1]) or first == "self"
        if not is_allowed or any(isinstance(n, ast.Constant) and _is_in_place(str(n.value)) for n in names):
            yield first if called == "getattr" else ""
        return
    value = scope.value(call.func)
    # An import may rename the function.
    if any(map(_is_in_place, (called, getattr(value, "__name__", "") if has_type(value, _FUNCTIONS) else ""))):
        yield first
    # The flag `inplace` by position, such as F.relu(x, True), is never the first argument.
    if any(isinstance(a, ast.Constant) and a.value is True for a in call.args[1:]) or _may_write(call, value):
        yield first
    for keyword in call.keywords:
        if keyword.arg == "out":
            yield root_name(keyword.value)
        elif keyword.arg == "inplace" and getattr(keyword.value, "value", True):
            yield first


def _may_write(call: ast.Call, function: Any) -> bool:
    """Whether positional arguments, or those in a `**dict`, may be `inplace` or `out` of a torch function."""
    has_dict = any(keyword.arg is None for keyword in call.keywords)
    if has_type(function, types.BuiltinFunctionType):
        return has_dict
    if not has_type(function, types.FunctionType) or not belongs_to_torch(function):
        return False
    parameters = list(inspect.signature(function).parameters)
    if "inplace" not in parameters:
        return False
    position = parameters.index("inplace")
    flags = [a for a in call.args[position : position + 1] if not (isinstance(a, ast.Constant) and a.value is False)]
    return has_dict or bool(flags) or any(isinstance(a, ast.Starred) for a in call.args)


def _is_in_place(name: str) -> bool:
    """Whether a method or function of this name writes in place, by torch's and Python's conventions."""
    plain = name.removeprefix("__").removesuffix("__")
    return (name.endswith("_") and not name.endswith("__")) or plain in _IN_PLACE


def _containers(function: ast.FunctionDef) -> set[str]:
    """Names that are only ever bound to lists, tuples and dicts that the function makes.

    The items may be anything, but setting an item writes to no tensor.
    """
    nodes = list(ast.walk(function))
    made: set[int] = set()
    unbound: set[int] = set()
    for node in nodes:
        if isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
            targets = map(id, node.targets if isinstance(node, ast.Assign) else [node.target])
            # An annotation without a value binds nothing.
            unbound.update(targets if node.value is None else ())
            made.update(targets if isinstance(node.value, _DISPLAYS) else ())
    stored = [n for n in nodes if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load) and id(n) not in unbound]
    others = {n.id for n in stored if id(n) not in made} | {n.arg for n in nodes if isinstance(n, ast.arg)}
    return {n.id for n in stored} - others
