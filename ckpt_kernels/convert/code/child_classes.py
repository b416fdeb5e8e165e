"""Uses of children's classes: whether a forward tells the converted class of a module inside from the original."""

import ast
import types
from collections.abc import Callable
from typing import Any

from torch import nn

from .call_graph import is_standard, methods_of, reachable_functions
from .class_uses import aliased, tells_subclasses
from .code_objects import names_in
from .memoization import memoized
from .source import tree_of
from .syntax_trees import is_name, stored_names

# Libraries that choose an implementation by the class of a tensor, and whose functions take no modules.
_OF_TENSORS = frozenset({"einops", "einx"})


@memoized
def inspects_classes_inside(kind: type[nn.Module]) -> bool:
    """Whether the forward of a class, or a function that the forward may call, uses the class of an object that may be
    a module inside, in a way that tells a subclass from the class (see `class_uses`).

    That is any object but the module itself and the arguments of the forward. Functions of the standard library, which
    are reached by names alone, do not count, nor do libraries of functions that take tensors alone.
    """
    methods = methods_of(kind)
    reached = (f for f in reachable_functions(kind) if not (is_standard(f) or _library_of(f) in _OF_TENSORS))
    return any(_inspects(function, methods.get(function)) for function in reached)


def _library_of(function: types.FunctionType) -> str:
    return (function.__module__ or "").partition(".")[0]


def _inspects(function: types.FunctionType, method: str | None) -> bool:
    """Whether a function uses the class of an object; `method` is the function's name in the class, None if in none."""
    if "__class__" in function.__code__.co_consts:  # getattr(layer, "__class__")
        return True
    if not {"type", "__class__"} & names_in(function.__code__):
        return False
    tree = tree_of(function)
    if tree is None or _passes_type_on(tree):
        return True
    return tells_subclasses(function, tree, _may_be_inside(function, tree, method))


def _passes_type_on(tree: ast.FunctionDef) -> bool:
    """Whether a function uses `type` other than by calling it, as in `map(type, self.layers)`.

    A class to compare with, `isinstance(x, type)`, and annotations are no such uses.
    """
    no_uses: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            no_uses.add(id(node.func))
            no_uses.update(map(id, node.args[1:] if is_name(node.func, ("isinstance", "issubclass")) else ()))
        elif isinstance(node, ast.arg | ast.AnnAssign) and node.annotation is not None:
            no_uses.update(map(id, ast.walk(node.annotation)))
        elif isinstance(node, ast.FunctionDef) and node.returns is not None:
            no_uses.update(map(id, ast.walk(node.returns)))
    return any(is_name(node, ("type",)) and id(node) not in no_uses for node in ast.walk(tree))


def _may_be_inside(
    function: types.FunctionType, tree: ast.FunctionDef, method: str | None
) -> Callable[[ast.AST], bool]:
    code = function.__code__
    arguments = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    # `self`, or the class: see `own_class`. An argument of the forward is no module inside, unless rebound.
    known: Any = arguments if method == "forward" else arguments[:1] if method else ()
    known = set(known) - stored_names(tree)
    is_known = aliased(tree, known)
    plain = (ast.Constant, ast.JoinedStr, ast.Tuple, ast.List, ast.Dict, ast.Set)
    return lambda node: not isinstance(node, plain) and not is_known(node)
