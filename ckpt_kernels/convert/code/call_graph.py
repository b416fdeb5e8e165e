"""Call graph of a module's forward: the Python functions that the forward may call, by the names in their code."""

import dis
import functools
import itertools
import os
import sys
import types
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from .code_objects import cell_value, has_type, imports_in, names_in
from .memoization import memoized
from .source import NoSource, decorator_chain

# Methods that make an instance.
MAKERS = ("__init__", "__new__", "__init_subclass__")
# The directory of torch's files.
_TORCH_DIRECTORY = os.path.join(os.path.dirname(torch.__file__), "")
# The directory of the standard library's files, which may hold installed packages too.
_STANDARD_DIRECTORY = os.path.join(os.path.dirname(os.__file__), "")

# Libraries of functions of tensors and arrays. Some choose an implementation by the class of an argument.
_OF_TENSORS = frozenset({"einops", "einx", "numpy"})
# How deep containers of functions may nest.
_DEPTH = 3


@memoized
def reachable_functions(kind: type[nn.Module]) -> tuple[types.FunctionType, ...]:
    """The forward of a class and all Python functions outside torch that the forward may call.

    Candidates are methods of every kind in all classes of the method resolution order, properties, functions of the
    class's file and of the modules which the code names, functions in partial objects, lists and dicts, and the
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
        for part in _parts(function):
            reached.append(part)
            # What such a function calls is the library's own.
            waiting += () if takes_no_modules(part) else _named_in(part, kind)
    return tuple(reached)


def takes_no_modules(function: types.FunctionType) -> bool:
    """Whether a function belongs to Python's standard library, or to a library of functions of tensors and arrays.

    These may look at the class of an argument, but the code of a model passes no modules to them.
    """
    return is_standard(function) or (function.__module__ or "").partition(".")[0] in _OF_TENSORS


def is_standard(function: types.FunctionType) -> bool:
    """Whether a function was defined in a file of Python's standard library, which may be frozen into Python."""
    file = function.__code__.co_filename
    if file.startswith(_STANDARD_DIRECTORY):
        return not file.removeprefix(_STANDARD_DIRECTORY).startswith(("site-packages", "dist-packages"))
    return file.startswith("<frozen ")


def _parts(function: types.FunctionType) -> list[types.FunctionType]:
    """The undecorated function, and the wrappers of decorators in the function's file.

    Decorators of other files are trusted to do nothing with tensors and classes.
    """
    try:
        *wrappers, undecorated = decorator_chain(function)
    except NoSource:
        return [function]
    file = undecorated.__code__.co_filename
    return [undecorated, *(wrapper for wrapper in wrappers if wrapper.__code__.co_filename == file)]


@memoized
def methods_of(kind: type) -> dict[types.FunctionType, str]:
    """All functions that are attributes of the class and its bases, wherever they were defined, with their names.

    Without the functions of torch.
    """
    methods: dict[types.FunctionType, str] = {}
    for owner in kind.__mro__:
        for name, value in () if belongs_to_torch(owner) else vars(owner).items():
            functions = (f for f in functions_held_by(value) if not belongs_to_torch(f))
            methods.update((part, name) for function in functions for part in _parts(function))
    return methods


def _named_in(function: types.FunctionType, kind: type) -> Iterator[types.FunctionType]:
    """The functions behind the names in a function's code, and those in its closure."""
    namespace = function.__globals__
    names = names_in(function.__code__)
    modules = _modules_named(function, names)
    owners = [owner for owner in kind.__mro__ if not belongs_to_torch(owner)]
    values: list[Any] = list(map(cell_value, function.__closure__ or ()))
    for name in names:
        # In all classes of the method resolution order, because `super()` may call any. In a function that is no method
        # of the class, the name of a maker is that of another class's method.
        if name not in MAKERS or function in methods_of(kind):
            values += [vars(owner)[name] for owner in owners if name in vars(owner)]
        values.append(namespace.get(name))
        imported = (vars(module).get(name) for module in modules)
        values += [value for value in imported if has_type(value, types.FunctionType)]
    for value in values:
        yield from functions_held_by(value)


def _modules_named(function: types.FunctionType, names: Collection[str]) -> list[types.ModuleType]:
    """The Python modules that a function imports, or that are globals among these names, and the submodules among the
    names; without torch's."""
    package = function.__globals__.get("__package__")
    imported = (sys.modules.get(name) for name in imports_in(function.__code__, package))
    found: list[Any] = [module for module in imported if module is not None and not belongs_to_torch(module)]
    for owner in itertools.chain((function.__globals__,), map(vars, found)):  # grows meanwhile
        values = dict.fromkeys(value for name in names if has_type(value := owner.get(name), types.ModuleType))
        found += [module for module in values if module not in found and not belongs_to_torch(module)]
    return found


# By the built-in type, because a method of a subclass could load what a lazy container holds.
_ITEMS: dict[type, Callable[[Any], Iterable[Any]]] = {
    dict: dict.values,
    **{kind: kind.__iter__ for kind in (list, tuple, set, frozenset)},
}
# What `functools.lru_cache` makes of a function.
_CACHED: type = type(functools.lru_cache(len))
# The types of values that are or hold functions. Most values are of other types, and are not looked into.
_HOLDERS = (
    *(types.FunctionType, types.MethodType, classmethod, staticmethod, property, functools.cached_property),
    *(functools.partial, functools.partialmethod, _CACHED, *_ITEMS),
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
    elif has_type(value, _CACHED):
        parts = [value.__wrapped__]
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
    methods = (function for function in reachable_functions(kind) if function in methods_of(kind))
    return any(_stores_attributes(method.__code__) for method in methods)


def _stores_attributes(code: types.CodeType) -> bool:
    inner = (constant for constant in code.co_consts if isinstance(constant, types.CodeType))
    stores = any(step.opname in ("STORE_ATTR", "DELETE_ATTR") for step in dis.get_instructions(code))
    return stores or "setattr" in code.co_names or any(map(_stores_attributes, inner))


def is_unpatched(method: Any) -> bool:
    """Whether a method of a torch class still is the one that torch's file defines, rather than a monkey patch."""
    code, module = getattr(method, "__code__", None), method.__module__ or ""
    file = getattr(sys.modules.get(module), "__file__", None)
    return code is not None and module.startswith("torch.") and code.co_filename == file


def belongs_to_torch(value: Any) -> bool:
    """Whether a module, a class or a function is torch's own, or built into Python.

    A wrapper around a torch function has that function's name and `__module__`, but lies in another file.
    """
    if has_type(value, types.FunctionType) and not value.__code__.co_filename.startswith(_TORCH_DIRECTORY):
        return False
    name = value.__name__ if has_type(value, types.ModuleType) else value.__module__ or ""
    return name.partition(".")[0] in ("torch", "builtins")
