"""Call graph of a module's forward: the Python functions that the forward may call, by the names in their code."""

import ast
import dis
import functools
import inspect
import os
import sys
import types
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from .code_objects import cell_value, has_type, names_in
from .memoization import memoized
from .source import NoSource, decorator_chain, definition_of

# The directory of torch's files.
_TORCH_DIRECTORY = os.path.join(os.path.dirname(torch.__file__), "")


# How deep containers of functions may nest.
_DEPTH = 3


@memoized
def reachable_functions(kind: type[nn.Module]) -> tuple[types.FunctionType, ...]:
    """The forward of a class and all Python functions outside torch that the forward may call.

    Candidates are methods of every kind in all classes of the method resolution order, properties, functions of the
    class's file and of the modules which that file imports, functions in partial objects, lists and dicts, and the
    wrappers of decorators in the function's own file. A function whose decorators cannot be unwrapped stands for
    itself.
    """
    return functions_reachable_from(getattr(kind, "forward", None), kind)


def functions_reachable_from(value: Any, kind: type) -> tuple[types.FunctionType, ...]:
    """All Python functions that a call of the value may call; attribute names are looked up on `kind`."""
    seen: set[types.FunctionType] = set()
    reached: list[types.FunctionType] = []
    waiting = list(functions_held_by(value))
    while waiting:
        function = waiting.pop()
        if function in seen or belongs_to_torch(function):
            continue
        seen.add(function)
        try:
            *wrappers, undecorated = decorator_chain(function)
        except NoSource:
            wrappers, undecorated = [], function
        # Decorators of other files are trusted to do nothing with tensors and classes.
        file = undecorated.__code__.co_filename
        for part in (undecorated, *(wrapper for wrapper in wrappers if wrapper.__code__.co_filename == file)):
            reached.append(part)
            waiting += _named_in(part, kind)
    return tuple(reached)


def _named_in(function: types.FunctionType, kind: type) -> Iterator[types.FunctionType]:
    """The functions behind the names in a function's code, and those in its closure."""
    namespace = function.__globals__
    modules = [m for m in namespace.values() if has_type(m, types.ModuleType) and not belongs_to_torch(m)]
    values: list[Any] = list(map(cell_value, function.__closure__ or ()))
    for name in names_in(function.__code__):
        values += _defined(kind, name)
        values.append(namespace.get(name))
        imported = (vars(module).get(name) for module in modules)
        values += [value for value in imported if has_type(value, types.FunctionType)]
    for value in values:
        yield from functions_held_by(value)


def _defined(kind: type, name: str) -> list[Any]:
    """The values of a name in all classes of a class's method resolution order, because `super()` may call any."""
    return [vars(owner)[name] for owner in kind.__mro__ if name in vars(owner) and not belongs_to_torch(owner)]


# By the built-in type, because a method of a subclass could load what a lazy container holds.
_ITEMS: dict[type, Callable[[Any], Iterable[Any]]] = {
    dict: dict.values,
    **{kind: kind.__iter__ for kind in (list, tuple, set, frozenset)},
}
# The types of values that are or hold functions. Most values are of other types, and are not looked into.
_HOLDERS = (
    *(types.FunctionType, types.MethodType, classmethod, staticmethod, property, functools.cached_property),
    *(functools.partial, functools.partialmethod, *_ITEMS),
)


def items_of(value: Any) -> list[Any]:
    """The items of a list, tuple or set, and the values of a dict; none for any other object."""
    return next((list(items(value)) for kind, items in _ITEMS.items() if has_type(value, kind)), [])


def functions_held_by(value: Any, depth: int = _DEPTH) -> Iterator[types.FunctionType]:
    """The functions that run when a value is called, or read as an attribute; of containers, those of the items."""
    if has_type(value, types.FunctionType):
        yield value
        return
    if not has_type(value, _HOLDERS) or not depth:
        return
    parts: list[Any] = []
    if has_type(value, property):
        parts = [value.fget, value.fset, value.fdel]
    elif has_type(value, functools.cached_property):
        parts = [value.func]
    elif has_type(value, (classmethod, staticmethod, types.MethodType)):
        parts = [value.__func__]
    elif has_type(value, (functools.partial, functools.partialmethod)):
        parts = [value.func, *value.args, *value.keywords.values()]
    else:
        parts = items_of(value)
    for part in parts:
        yield from functions_held_by(part, depth - 1)


@memoized
def stores_attributes(kind: type[nn.Module]) -> bool:
    """Whether methods that the forward may call set attributes of any object."""
    owners = {owner.__qualname__ for owner in kind.__mro__}
    methods = (f for f in reachable_functions(kind) if f.__qualname__.rpartition(".")[0] in owners)
    return any(_stores_attributes(method.__code__) for method in methods)


def _stores_attributes(code: types.CodeType) -> bool:
    inner = (constant for constant in code.co_consts if isinstance(constant, types.CodeType))
    stores = any(step.opname in ("STORE_ATTR", "DELETE_ATTR") for step in dis.get_instructions(code))
    return stores or "setattr" in code.co_names or any(map(_stores_attributes, inner))


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
            # `str(type(self))` is the same for the converted class.
            is_called = isinstance(parent, ast.Call) and (
                parent.func is child or _is_name(parent.func, ("str", "repr"))
            )
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
    """Whether a module, a class or a function is torch's own, or built into Python.

    A wrapper around a torch function has that function's name and `__module__`, but lies in another file.
    """
    if has_type(value, types.FunctionType) and not value.__code__.co_filename.startswith(_TORCH_DIRECTORY):
        return False
    name = value.__name__ if has_type(value, types.ModuleType) else value.__module__ or ""
    return name.partition(".")[0] in ("torch", "builtins")
