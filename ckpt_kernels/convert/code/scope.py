"""What the expressions of a method name: modules, functions and numbers, and the part that each can have in a pattern.

Only loads that run no code are followed: children and plain attributes of modules, globals, closures, attributes of
imported Python modules. Everything else is unknown.
"""

import ast
import builtins
import functools
import importlib.util
import sys
import types
from typing import Any

from torch import nn

from ..loads import MISSING, load
from .memoization import memoized

UNKNOWN = object()


class Scope:
    """The names of one function, of which the first argument is `module`, or unknown where that is None."""

    def __init__(self, function: types.FunctionType, tree: ast.FunctionDef, module: nn.Module | None = None) -> None:
        code = function.__code__
        self.locals = frozenset(code.co_varnames) | frozenset(code.co_cellvars)
        # What nested functions share with this one may change at any time.
        self.fast = frozenset(code.co_varnames) - frozenset(code.co_cellvars)
        self._closure = dict(zip(code.co_freevars, function.__closure__ or (), strict=True))
        self._globals = function.__globals__
        self._module = module
        arguments = [*tree.args.posonlyargs, *tree.args.args]
        first = arguments[0].arg if arguments else ""
        self.self = first if first in self.fast and first not in _stored(tree) else ""
        self._function = function
        self._tree = tree

    def value(self, tree: ast.AST) -> Any:
        """What an expression stands for, if a load that runs nobody's code tells."""
        if isinstance(tree, ast.Name):
            return self._name(tree.id)
        if isinstance(tree, ast.Attribute):
            return _attribute(self.value(tree.value), tree.attr)
        if isinstance(tree, ast.Subscript) and isinstance(tree.slice, ast.Constant):
            return _item(self.value(tree.value), tree.slice.value)
        return UNKNOWN

    def local_function(self, tree: ast.AST) -> Any:
        """What a local name stands for that is bound once, by an import of what is loaded or by a `def`: another object
        at each call, if it is such, and always the same code."""
        if not isinstance(tree, ast.Name) or tree.id not in self.fast:
            return UNKNOWN
        bound = [node for node in ast.walk(self._tree) if _binds(node, tree.id)]
        if len(bound) != 1:
            return UNKNOWN
        (statement,) = bound
        if isinstance(statement, ast.ImportFrom):
            return self._imported(statement, tree.id)
        return nested_function(self._function, tree.id) if isinstance(statement, ast.FunctionDef) else UNKNOWN

    def _imported(self, statement: ast.ImportFrom, name: str) -> Any:
        within = "." * statement.level + (statement.module or "")
        try:
            found = sys.modules.get(importlib.util.resolve_name(within, self._globals.get("__package__")))
        except ImportError:
            return UNKNOWN
        (imported,) = [alias.name for alias in statement.names if name == (alias.asname or alias.name)]
        return vars(found).get(imported, UNKNOWN) if isinstance(found, types.ModuleType) else UNKNOWN

    def _name(self, name: str) -> Any:
        if name == self.self and self._module is not None:
            return self._module
        if name in self.locals:
            return UNKNOWN
        if name in self._closure:
            try:
                return self._closure[name].cell_contents
            except ValueError:
                return UNKNOWN
        return self._globals.get(name, vars(builtins).get(name, UNKNOWN))


@functools.lru_cache(maxsize=1024)
def _stored(tree: ast.FunctionDef) -> frozenset[str]:
    """The names that are bound or deleted in a function."""
    names = (node for node in ast.walk(tree) if isinstance(node, ast.Name))
    return frozenset(name.id for name in names if not isinstance(name.ctx, ast.Load))


@memoized
def nested_function(function: types.FunctionType, name: str) -> Any:
    """What a plain `def` within a function makes, which reads no variables of that function; UNKNOWN for others."""
    codes = [c for c in function.__code__.co_consts if isinstance(c, types.CodeType) and c.co_name == name]
    if len(codes) != 1 or codes[0].co_freevars:
        return UNKNOWN
    made = types.FunctionType(codes[0], function.__globals__, name)
    # For `memoized`: it lasts as long as the function around it.
    made.__module__, made.__qualname__ = function.__module__, f"{function.__qualname__}.{name}"
    return made


def _binds(node: ast.AST, name: str) -> bool:
    if isinstance(node, ast.Import | ast.ImportFrom):
        return any(name == (alias.asname or alias.name.partition(".")[0]) for alias in node.names)
    if isinstance(node, ast.Name):
        return node.id == name and not isinstance(node.ctx, ast.Load)
    if isinstance(node, ast.ExceptHandler | ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return node.name == name
    return isinstance(node, ast.arg) and node.arg == name


def _attribute(owner: Any, name: str) -> Any:
    if isinstance(owner, types.ModuleType):
        return vars(owner).get(name, UNKNOWN)
    found = load(owner, name) if isinstance(owner, nn.Module) else MISSING
    return UNKNOWN if found is MISSING else found


def _item(owner: Any, index: Any) -> Any:
    lists = (nn.ModuleList, nn.Sequential)
    if type(index) is not int or not isinstance(owner, lists):
        return UNKNOWN
    if type(owner).__getitem__ not in [kind.__getitem__ for kind in lists]:
        return UNKNOWN
    held = list(owner._modules.values())
    return held[index] if -len(held) <= index < len(held) else UNKNOWN
