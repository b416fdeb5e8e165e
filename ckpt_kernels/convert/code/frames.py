"""Functions that inspect stack frames, their own or their caller's: these see that a function has been rewritten.

The frame of a rewritten function keeps the file, the line and the name of the original; the locals differ.
"""

import ast
import types
from typing import Any

from .call_graph import belongs_to_torch
from .code_objects import has_type, names_in
from .source import NoSource, definition_of

# Prefix of the names that a rewrite adds to a function.
PREFIX = "_ckpt_kernels_"
# A function that uses one of these names may inspect the function's own frame.
_OWN_FRAME = frozenset(("locals", "vars", "eval", "exec", "dir", "_getframe", "currentframe", "stack"))
# A function that uses one of these names may inspect the caller's frame.
_CALLERS_FRAME = frozenset(("_getframe", "currentframe", "f_back", "f_locals"))
_GENERATOR_OR_COROUTINE = 0x20 | 0x80 | 0x100 | 0x200

# Fields of a frame record that a rewrite keeps, and the expression that lists the records.
_OUTER_FRAMES = "inspect.getouterframes(inspect.currentframe())"
_LOCATION = frozenset(("filename", "lineno", "function"))


def may_be_rewritten(function: types.FunctionType) -> bool:
    """Whether neither the function nor a global that the function calls inspects the function's frame, and no name in
    the function starts with `PREFIX`."""
    code = function.__code__
    names = {*code.co_names, *code.co_varnames, *code.co_cellvars, *code.co_freevars}
    if any(name.startswith(PREFIX) for name in names):
        return False
    called = (function.__globals__.get(name) for name in code.co_names)
    is_resumed = code.co_flags & _GENERATOR_OR_COROUTINE
    return not (_OWN_FRAME & names or is_resumed or any(map(_inspects_caller, called)))


def _inspects_caller(function: Any) -> bool:
    """Whether a function reads more of the caller's frame than the location."""
    if not has_type(function, types.FunctionType) or belongs_to_torch(function):
        return False
    names = names_in(function.__code__)
    if {"inspect", "stack"} <= names:
        return True
    used = _CALLERS_FRAME & names
    return bool(used) and not (used == {"currentframe"} and _reads_locations_only(function))


def _reads_locations_only(function: types.FunctionType) -> bool:
    """Whether a function reads only fields of `_LOCATION` from frames.

    The frames must come from an assignment such as `caller = inspect.getouterframes(inspect.currentframe())[1]`.
    """
    try:
        tree = definition_of(function).tree
    except NoSource:
        return False
    records, assignments = set(), 0
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Subscript):
            (target, *others), subscripted = node.targets, node.value.value
            if isinstance(target, ast.Name) and not others and ast.unparse(subscripted) == _OUTER_FRAMES:
                records.add(target.id)
                assignments += 1
    loads = [n for n in ast.walk(tree) if isinstance(n, ast.Name) and n.id in records and isinstance(n.ctx, ast.Load)]
    fields = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr in _LOCATION]
    frames = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute | ast.Name) and _last_name(n) == "currentframe"]
    owners_of_fields = {id(field.value) for field in fields}
    return len(frames) == assignments and all(id(load) in owners_of_fields for load in loads)


def _last_name(node: ast.Attribute | ast.Name) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id
