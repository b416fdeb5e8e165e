"""Call graph of a module's forward: the Python functions that the forward may call, by the names in their code."""

import ast
import functools
import inspect
import os
import sys
import types
from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from .code_objects import cell_value, names_in
from .memoization import memoized
from .source import NoSource, decorator_chain, definition_of

# The directory of torch's files.
_TORCH_DIRECTORY = os.path.join(os.path.dirname(torch.__file__), "")


@memoized
def reachable_functions(kind: type[nn.Module]) -> tuple[types.FunctionType, ...]:
    """The forward of a class and all Python functions outside torch that the forward may call, without decorators.

    Candidates are methods of every kind, properties, and functions of the class's file and of the modules which that
    file imports. A function whose decorators cannot be unwrapped stands for itself.
    """
    return functions_reachable_from(getattr(kind, "forward", None), kind)


def functions_reachable_from(function: Any, kind: type) -> tuple[types.FunctionType, ...]:
    """The function and all Python functions that it may call; attribute names are looked up on `kind`."""
    reached: dict[types.FunctionType, types.FunctionType] = {}
    waiting: list[Any] = [function]
    while waiting:
        function = waiting.pop()
        if not has_type(function, types.FunctionType) or function in reached or belongs_to_torch(function):
            continue
        try:
            undecorated = decorator_chain(function)[-1]
        except NoSource:
            undecorated = function
        reached[function] = undecorated
        modules = [value for value in undecorated.__globals__.values() if has_type(value, types.ModuleType)]
        waiting += map(cell_value, undecorated.__closure__ or ())
        for name in names_in(undecorated.__code__):
            waiting += [*_accessors(inspect.getattr_static(kind, name, None)), undecorated.__globals__.get(name)]
            waiting += [vars(module).get(name) for module in modules if not belongs_to_torch(module)]
    return tuple(reached.values())


def _accessors(attribute: Any) -> list[Any]:
    """The functions that run when a class attribute is read, set, deleted or called."""
    if isinstance(attribute, property):
        return [attribute.fget, attribute.fset, attribute.fdel]
    if isinstance(attribute, functools.cached_property):
        return [attribute.func]
    return [getattr(attribute, "__func__", attribute) if has_type(attribute, classmethod | staticmethod) else attribute]


def has_type(value: Any, kind: Any) -> bool:
    """`isinstance` by the type alone: reading `__class__` of a lazy object would load the object."""
    return issubclass(type(value), kind)


@memoized
def inspects_own_class(kind: type[nn.Module]) -> bool:
    """Whether code that the forward may call uses the module's class in a way that tells a subclass from the class.

    Calling the class, formatting it and reading inherited attributes do not.
    """
    owners = {owner.__qualname__ for owner in kind.__mro__}
    methods: list[types.FunctionType] = []
    others: list[types.FunctionType] = []
    for function in reachable_functions(kind):
        is_method = function.__qualname__.rpartition(".")[0] in owners and function.__code__.co_argcount > 0
        (methods if is_method else others).append(function)
    # A plain function sees the module only if a method passes the module on.
    candidates = methods + (others if any(map(_passes_self_on, methods)) else [])
    return any(_inspects_class(function, kind) for function in candidates)


def _passes_self_on(method: types.FunctionType) -> bool:
    """Whether a method uses `self` for anything but reading and setting attributes."""
    try:
        tree = definition_of(method).tree
    except NoSource:
        return True
    self_name = method.__code__.co_varnames[0]
    owners_of_attributes = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    selves = (node for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id == self_name)
    return any(id(node) not in owners_of_attributes for node in selves)


# Attributes of a class that a subclass does not inherit unchanged.
_NOT_INHERITED = frozenset("__annotations__ __base__ __bases__ __dict__ __mro__ __subclasses__ mro".split())


def _inspects_class(function: types.FunctionType, kind: type[nn.Module]) -> bool:
    code = function.__code__
    is_classmethod = isinstance(inspect.getattr_static(kind, code.co_name, None), classmethod)
    if not is_classmethod and not {"type", "__class__"} & names_in(code):
        return False
    try:
        tree = definition_of(function).tree
    except NoSource:
        return True
    arguments = set(code.co_varnames[: code.co_argcount + code.co_kwonlyargcount])
    for parent in ast.walk(tree):
        for child in ast.iter_child_nodes(parent):
            if not (_is_class_of(child, arguments) or (is_classmethod and _is_name(child, {code.co_varnames[0]}))):
                continue
            reads_inherited = (
                isinstance(parent, ast.Attribute)
                and isinstance(parent.ctx, ast.Load)
                and parent.attr not in _NOT_INHERITED
            )
            is_called = isinstance(parent, ast.Call) and parent.func is child
            if not (reads_inherited or is_called or isinstance(parent, ast.FormattedValue)):
                return True
    return False


def _is_class_of(node: ast.AST, names: Collection[str]) -> bool:
    """Whether a node is `type(name)` or `name.__class__` for one of these names."""
    if isinstance(node, ast.Attribute):
        return node.attr == "__class__" and _is_name(node.value, names)
    if not isinstance(node, ast.Call) or getattr(node.func, "id", "") != "type" or len(node.args) != 1:
        return False
    return _is_name(node.args[0], names)


def _is_name(node: ast.AST, names: Collection[str]) -> bool:
    return isinstance(node, ast.Name) and node.id in names


def is_unpatched(method: Any) -> bool:
    """Whether a method of a torch class still is the one that torch's file defines, rather than a monkey patch."""
    code = getattr(method, "__code__", None)
    return code is not None and _is_file_of_torch_module(method.__module__ or "", code.co_filename)


@functools.lru_cache(maxsize=1024)
def _is_file_of_torch_module(module: str, file: str) -> bool:
    return module.startswith("torch.") and file == getattr(sys.modules.get(module), "__file__", None)


def belongs_to_torch(value: Any) -> bool:
    """Whether a module or a function is torch's own, or built into Python.

    A wrapper around a torch function has that function's name and `__module__`, but lies in another file.
    """
    if has_type(value, types.FunctionType) and not value.__code__.co_filename.startswith(_TORCH_DIRECTORY):
        return False
    name = value.__name__ if isinstance(value, types.ModuleType) else value.__module__ or ""
    return name.partition(".")[0] in ("torch", "builtins")
