"""Uses of children's classes: for which classes a forward tells the converted class of a module inside from the
original."""

import ast
import types
from collections.abc import Callable
from typing import Any

from torch import nn

from .call_graph import methods_of, reachable_functions, takes_no_modules
from .class_uses import EVERY_CLASS, Classes, aliased, told_classes, union
from .code_objects import has_type, names_in
from .memoization import memoized
from .source import tree_of
from .syntax_trees import is_name, stored_names


@memoized
def classes_told_inside(kind: type[nn.Module]) -> Classes:
    """The classes that the forward of a class, or a function that the forward may call, tells from their subclasses
    (see `class_uses`), where an object may be a module inside.

    That is any object but the module itself and the arguments of the forward. Functions that take no modules, and are
    reached by names alone, do not count.
    """
    # The first argument of a static method is any object, as that of a plain function.
    methods = {f: name for f, name in methods_of(kind).items() if not _is_static(kind, name)}
    reached = (function for function in reachable_functions(kind) if not takes_no_modules(function))
    return union(_told(function, methods.get(function)) for function in reached)


def _is_static(kind: type[nn.Module], name: str) -> bool:
    return any(has_type(vars(owner).get(name), staticmethod) for owner in kind.__mro__)


def _told(function: types.FunctionType, method: str | None) -> Classes:
    """The classes that a function tells; `method` is the function's name in the class, None if in none."""
    if "__class__" in function.__code__.co_consts:  # getattr(layer, "__class__")
        return EVERY_CLASS
    names = names_in(function.__code__)
    if any(function.__globals__.get(name) is type for name in names):  # kind_of = type
        return EVERY_CLASS
    if not {"type", "__class__"} & names:
        return frozenset()
    tree = tree_of(function)
    if tree is None or _passes_type_on(tree):
        return EVERY_CLASS
    return told_classes(function, tree, _may_be_inside(function, tree, method))


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
