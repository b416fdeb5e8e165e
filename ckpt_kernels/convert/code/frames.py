"""Functions that look at frames: their own, or that of who calls them.

What is in the frame of a rewritten function is not what was there, but for its place: the file, the line and the name
are those of the function as it was written.
"""

import ast
import types
from typing import Any

from .call_graph import belongs_to_torch, has_type, names_in
from .source import NoSource, definition_of

# Of the names that are new in a function.
PREFIX = "_ckpt_kernels_"
# A function that looks at its own frame sees what it is made of.
_LOOKS = frozenset(("locals", "vars", "eval", "exec", "dir", "_getframe", "currentframe", "stack"))
_LOOKS_OUT = frozenset(("_getframe", "currentframe", "f_back", "f_locals"))
_RESUMED = 0x20 | 0x80 | 0x100 | 0x200  # generators and coroutines

# What of a frame is its place.
_CALLERS = "inspect.getouterframes(inspect.currentframe())"
_PLACE = frozenset(("filename", "lineno", "function"))


def may_be_rewritten(function: types.FunctionType) -> bool:
    """Whether nobody looks at what is in a function's frame, neither itself nor what it calls by a global name, and the
    new names are new."""
    code = function.__code__
    names = {*code.co_names, *code.co_varnames, *code.co_cellvars, *code.co_freevars}
    if any(name.startswith(PREFIX) for name in names):
        return False
    called = (function.__globals__.get(name) for name in code.co_names)
    return not (_LOOKS & names or code.co_flags & _RESUMED or any(map(_looks_out, called)))


def _looks_out(function: Any) -> bool:
    """Whether a function looks at more of the frame that calls it than the place."""
    if not has_type(function, types.FunctionType) or belongs_to_torch(function):
        return False
    names = names_in(function.__code__)
    if {"inspect", "stack"} <= names:
        return True
    looks = _LOOKS_OUT & names
    return bool(looks) and not (looks == {"currentframe"} and _asks_for_places(function))


def _asks_for_places(function: types.FunctionType) -> bool:
    """Whether all that it takes of frames are places: of `inspect.getouterframes(inspect.currentframe())[1]`."""
    try:
        tree = definition_of(function).tree
    except NoSource:
        return False
    names, seen = set(), 0
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Subscript):
            (target, *others), callers = node.targets, node.value.value
            if isinstance(target, ast.Name) and not others and ast.unparse(callers) == _CALLERS:
                names.add(target.id)
                seen += 1
    loads = [n for n in ast.walk(tree) if isinstance(n, ast.Name) and n.id in names and isinstance(n.ctx, ast.Load)]
    places = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr in _PLACE]
    frames = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute | ast.Name) and _name_of(n) == "currentframe"]
    asked = {id(place.value) for place in places}
    return len(frames) == seen and all(id(load) in asked for load in loads)


def _name_of(node: ast.Attribute | ast.Name) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id
