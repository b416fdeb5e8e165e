"""Scopes: resolves the expressions of a method to the objects that they stand for, such as modules and functions.

Only loads that run no user code are resolved: children and plain attributes of modules, globals, closure variables, and
attributes of imported Python modules. All other expressions are unknown.
"""

import ast
import builtins
import importlib.util
import sys
import types
from typing import Any

from torch import nn

from ..attribute_loads import MISSING, load_attribute
from .code_objects import cell_value, has_type
from .memoization import memoized
from .syntax_trees import is_name, stored_names

UNKNOWN = object()


class Scope:
    """The names of one function, whose first argument is `module`, or unknown if that is None.

    `locals` are all local names, `private_locals` those that no nested function shares, and `self_name` is the name of
    the first argument unless the function rebinds the name.
    """

    def __init__(self, function: types.FunctionType, tree: ast.FunctionDef, module: nn.Module | None = None) -> None:
        code = function.__code__
        self.locals = frozenset(code.co_varnames) | frozenset(code.co_cellvars)
        # A nested function may rebind a shared name at any time.
        self.private_locals = frozenset(code.co_varnames) - frozenset(code.co_cellvars)
        self._closure = dict(zip(code.co_freevars, function.__closure__ or (), strict=True))
        self._globals = function.__globals__
        self._module = module
        arguments = [*tree.args.posonlyargs, *tree.args.args]
        first = arguments[0].arg if arguments else ""
        self.self_name = first if first in self.private_locals and first not in stored_names(tree) else ""
        self._function = function
        self._tree = tree

    def value(self, tree: ast.AST) -> Any:
        """The object that an expression stands for, or UNKNOWN if finding out could run user code."""
        if isinstance(tree, ast.Name):
            return self._name(tree.id)
        if isinstance(tree, ast.Attribute):
            if isinstance(tree.value, ast.Call):
                return self._of_super(tree.value, tree.attr)
            return _attribute(self.value(tree.value), tree.attr)
        if isinstance(tree, ast.Subscript) and isinstance(tree.slice, ast.Constant):
            return _item(self.value(tree.value), tree.slice.value)
        return UNKNOWN

    def _of_super(self, call: ast.Call, name: str) -> Any:
        """The class attribute that `super().name` or `super(Class, self).name` finds, read from the classes' dicts so
        that no code runs; UNKNOWN if the call is no such `super`."""
        if self.value(call.func) is not super or not self.self_name:
            return UNKNOWN
        if call.args and [ast.unparse(argument) for argument in call.args[1:]] != [self.self_name]:
            return UNKNOWN
        owner = self.value(call.args[0] if call.args else ast.Name("__class__", ast.Load()))
        bases = type(self._module).__mro__
        if owner not in bases:
            return UNKNOWN
        later = (vars(base) for base in bases[bases.index(owner) + 1 :])
        return next((names[name] for names in later if name in names), UNKNOWN)

    def local_function(self, tree: ast.AST) -> Any:
        """The function behind a local name that is bound once, by a `def` or by an import from a loaded module.

        A `def` makes another object at each call, always with the same code.
        """
        if not is_name(tree, self.private_locals):
            return UNKNOWN
        bound = [node for node in ast.walk(self._tree) if _binds(node, tree.id)]
        if len(bound) != 1:
            return UNKNOWN
        (statement,) = bound
        if isinstance(statement, ast.ImportFrom):
            return self._imported(statement, tree.id)
        return nested_function(self._function, tree.id) if isinstance(statement, ast.FunctionDef) else UNKNOWN

    def _imported(self, statement: ast.ImportFrom, name: str) -> Any:
        relative = "." * statement.level + (statement.module or "")
        try:
            module = sys.modules.get(importlib.util.resolve_name(relative, self._globals.get("__package__")))
        except ImportError:
            return UNKNOWN
        (imported,) = [alias.name for alias in statement.names if name == (alias.asname or alias.name)]
        return vars(module).get(imported, UNKNOWN) if isinstance(module, types.ModuleType) else UNKNOWN

    def _name(self, name: str) -> Any:
        if name == self.self_name and self._module is not None:
            return self._module
        if name in self.locals:
            return UNKNOWN
        if name in self._closure:
            return cell_value(self._closure[name], UNKNOWN)
        return self._globals.get(name, vars(builtins).get(name, UNKNOWN))


@memoized
def nested_function(function: types.FunctionType, name: str) -> Any:
    """The function that a nested `def` makes, before decorators; UNKNOWN if the `def` is a closure."""
    codes = [c for c in function.__code__.co_consts if isinstance(c, types.CodeType) and c.co_name == name]
    if len(codes) != 1 or codes[0].co_freevars:
        return UNKNOWN
    return types.FunctionType(codes[0], function.__globals__, name)


def _binds(node: ast.AST, name: str) -> bool:
    """Whether a node binds a local name."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        return any(name == (alias.asname or alias.name.partition(".")[0]) for alias in node.names)
    if isinstance(node, ast.Name):
        return node.id == name and not isinstance(node.ctx, ast.Load)
    if isinstance(node, ast.ExceptHandler | ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return node.name == name
    return isinstance(node, ast.arg) and node.arg == name


def _attribute(owner: Any, name: str) -> Any:
    if has_type(owner, types.ModuleType):
        return vars(owner).get(name, UNKNOWN)
    value = load_attribute(owner, name) if has_type(owner, nn.Module) else MISSING
    return UNKNOWN if value is MISSING else value


def _item(owner: Any, index: Any) -> Any:
    lists = (nn.ModuleList, nn.Sequential)
    if type(index) is not int or not has_type(owner, lists):
        return UNKNOWN
    if type(owner).__getitem__ not in [kind.__getitem__ for kind in lists]:
        return UNKNOWN
    children = list(owner._modules.values())
    return children[index] if -len(children) <= index < len(children) else UNKNOWN
