"""The functions that a module's forward may call, as far as the names in their code tell."""

import ast
import functools
import inspect
import os
import sys
import types
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import nn

from .memoization import memoized
from .source import NoSource, decorator_chain, definition_of

# Where torch's files are.
_HOME = os.path.join(os.path.dirname(torch.__file__), "")


@memoized
def reachable_functions(kind: type[nn.Module]) -> tuple[types.FunctionType, ...]:
    """The class's forward, and all of Python's functions but torch's that it may reach, without their decorators:
    methods of every kind, properties, and functions of its file and of the modules that this imports.

    A function whose decorators are not known stands for itself.
    """
    return functions_reachable_from(getattr(kind, "forward", None), kind)


def functions_reachable_from(function: Any, kind: type) -> tuple[types.FunctionType, ...]:
    """The function and all of Python's functions that it may reach, where an object of that class is at hand."""
    reached: dict[types.FunctionType, types.FunctionType] = {}
    waiting: list[Any] = [function]
    while waiting:
        function = waiting.pop()
        if not has_type(function, types.FunctionType) or function in reached or belongs_to_torch(function):
            continue
        try:
            written = decorator_chain(function)[-1]
        except NoSource:
            written = function
        reached[function] = written
        names = names_in(written.__code__)
        modules = [value for value in written.__globals__.values() if has_type(value, types.ModuleType)]
        waiting += _contents(written.__closure__ or ())
        for name in names:
            waiting += [*_behind(inspect.getattr_static(kind, name, None)), written.__globals__.get(name)]
            waiting += [vars(module).get(name) for module in modules if not belongs_to_torch(module)]
    return tuple(reached.values())


def _behind(attribute: Any) -> list[Any]:
    """The functions that run where a class has this attribute."""
    if isinstance(attribute, property):
        return [attribute.fget, attribute.fset, attribute.fdel]
    if isinstance(attribute, functools.cached_property):
        return [attribute.func]
    return (
        [getattr(attribute, "__func__", attribute)] if has_type(attribute, classmethod | staticmethod) else [attribute]
    )


def has_type(value: Any, kind: Any) -> bool:
    """isinstance by the class alone: a lazy object would be loaded by being asked for its `__class__`."""
    return issubclass(type(value), kind)


def names_in(code: types.CodeType) -> set[str]:
    """The globals and attributes that code names, and the functions within it."""
    inner = [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return set(code.co_names).union(*map(names_in, inner))


@memoized
def inspects_own_class(kind: type[nn.Module]) -> bool:
    """Whether something that its forward may reach does more with the module's class than call it, name it, and read
    what is inherited: another class would be seen."""
    owners = {owner.__qualname__ for owner in kind.__mro__}
    methods: list[types.FunctionType] = []
    others: list[types.FunctionType] = []
    for function in reachable_functions(kind):
        own = function.__qualname__.rpartition(".")[0] in owners and function.__code__.co_argcount > 0
        (methods if own else others).append(function)
    # What is no method sees the module if a method hands it on.
    seeing = methods + (others if any(map(_hands_on_itself, methods)) else [])
    return any(_asks(function, kind) for function in seeing)


def _hands_on_itself(method: types.FunctionType) -> bool:
    """Whether it does anything with the module but read and set its attributes."""
    try:
        tree = definition_of(method).tree
    except NoSource:
        return True
    own = method.__code__.co_varnames[0]
    of_attributes = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return any(isinstance(n, ast.Name) and n.id == own and id(n) not in of_attributes for n in ast.walk(tree))


_OWN = frozenset("__annotations__ __base__ __bases__ __dict__ __mro__ __subclasses__ mro".split())


def _asks(function: types.FunctionType, kind: type[nn.Module]) -> bool:
    code = function.__code__
    is_of_class = isinstance(inspect.getattr_static(kind, code.co_name, None), classmethod)
    if not is_of_class and not {"type", "__class__"} & names_in(code):
        return False
    try:
        tree = definition_of(function).tree
    except NoSource:
        return True
    given = set(code.co_varnames[: code.co_argcount + code.co_kwonlyargcount])
    for parent in ast.walk(tree):
        for child in ast.iter_child_nodes(parent):
            if not (_is_class_of(child, given) or (is_of_class and _is_named(child, {code.co_varnames[0]}))):
                continue
            inherited = (
                isinstance(parent, ast.Attribute) and isinstance(parent.ctx, ast.Load) and parent.attr not in _OWN
            )
            made = isinstance(parent, ast.Call) and parent.func is child
            if not (inherited or made or isinstance(parent, ast.FormattedValue)):
                return True
    return False


def _is_class_of(node: ast.AST, names: Collection[str]) -> bool:
    """Whether it is the class of something with one of these names."""
    if isinstance(node, ast.Attribute):
        return node.attr == "__class__" and _is_named(node.value, names)
    if not isinstance(node, ast.Call) or getattr(node.func, "id", "") != "type" or len(node.args) != 1:
        return False
    return _is_named(node.args[0], names)


def _is_named(node: ast.AST, names: Collection[str]) -> bool:
    return isinstance(node, ast.Name) and node.id in names


def is_unpatched(method: Any) -> bool:
    """Whether a method of a class of torch's is what torch's file has there, and not what somebody put in its place."""
    code = getattr(method, "__code__", None)
    return code is not None and _is_file_of_torchs(method.__module__ or "", code.co_filename)


@functools.lru_cache(maxsize=1024)
def _is_file_of_torchs(module: str, file: str) -> bool:
    return module.startswith("torch.") and file == getattr(sys.modules.get(module), "__file__", None)


def belongs_to_torch(value: Any) -> bool:
    """Whether a module or a function is torch's own, or built into Python.

    What wraps a function of torch's bears its name, but does not stand in torch's files.
    """
    if has_type(value, types.FunctionType) and not value.__code__.co_filename.startswith(_HOME):
        return False
    name = value.__name__ if isinstance(value, types.ModuleType) else value.__module__ or ""
    return name.partition(".")[0] in ("torch", "builtins")


def _contents(cells: Iterable[types.CellType]) -> list[Any]:
    found = []
    for cell in cells:
        try:
            found.append(cell.cell_contents)
        except ValueError:  # it has no value yet
            continue
    return found
