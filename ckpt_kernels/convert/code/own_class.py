"""Uses of a module's own class: whether code tells the converted class, which is a subclass, from the original.

The code is all methods of the class, the functions that the forward may call, and the objects that get the module as
an argument. What uses tell which classes is described in class_uses.py.
"""

import ast
import inspect
import re
import types
from collections.abc import Callable, Collection
from typing import Any

from torch import nn

from .call_graph import (
    MAKERS,
    functions_held_by,
    functions_reachable_from,
    items_of,
    methods_of,
    reachable_functions,
    takes_no_modules,
)
from .class_uses import EVERY_CLASS, Classes, aliased, told_classes
from .code_objects import has_type, names_in
from .memoization import memoized
from .source import tree_of
from .syntax_trees import is_name

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
# Functions with these globals take patterns and strings, and no modules.
_OF_STRINGS = vars(re)
# Files of base classes whose methods, beside the forward, read the class without effect: LightningModule asks whether
# an object is the module itself or a data module.
_HARMLESS = frozenset(("lightning.pytorch.core.module", "pytorch_lightning.core.module"))


def reader_of_own_class(module: nn.Module, original_of: Callable[[nn.Module], type[nn.Module]]) -> str:
    """The name of code of the module that uses the module's class in a way that tells a subclass from the class, or "".

    `original_of` returns the class of a module before the conversion.
    """
    kind = original_of(module)
    if reader := _reader_in_code(kind):
        return reader
    for method in _passing_methods(kind):
        for name in sorted(_holders_of_receivers(method)):
            # What the instance holds, or else the original class: a converted class has other methods.
            held = vars(module).get(name, module._modules.get(name))
            held = inspect.getattr_static(kind, name, None) if held is None else held
            if held is not None and _receiver_inspects(held, kind, names_in(method.__code__), original_of):
                return name
    return ""


@memoized
def _reader_in_code(kind: type[nn.Module]) -> str:
    """The name of a method of the class, or of a function that the forward may call, that inspects the class; or ""."""
    methods = methods_of(kind)
    reached = reachable_functions(kind)
    candidates = {f for f, name in methods.items() if name not in MAKERS and f.__module__ not in _HARMLESS}
    # A plain function sees the module only if a method passes the module on.
    candidates.update(reached if _passing_methods(kind) else methods.keys() & set(reached))
    class_methods = {f for f, name in methods.items() if has_type(inspect.getattr_static(kind, name), classmethod)}
    # A classmethod that the forward does not call is called on the original class.
    candidates -= class_methods.difference(reached)
    readers = (f.__name__ for f in candidates if kind in _told_classes(f, f in class_methods, 0))
    return min(readers, default="")


@memoized
def _passing_methods(kind: type[nn.Module]) -> tuple[types.FunctionType, ...]:
    """The methods that the forward may call and that use `self` for anything but reading and setting attributes."""
    return tuple(f for f in reachable_functions(kind) if f in methods_of(kind) and _passes_self_on(f))


def _passes_self_on(method: types.FunctionType) -> bool:
    if not method.__code__.co_argcount:
        return False
    tree = tree_of(method)
    return tree is None or bool(_bare_selves(method, tree))


def _bare_selves(method: types.FunctionType, tree: ast.FunctionDef) -> list[ast.AST]:
    """The uses of `self` in a method other than reading and setting attributes."""
    self_name = method.__code__.co_varnames[0]
    owners = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return [node for node in ast.walk(tree) if is_name(node, (self_name,)) and id(node) not in owners]


@memoized
def _holders_of_receivers(method: types.FunctionType) -> frozenset[str]:
    """The names of the attributes of `self` that hold a function or object which may get `self` from a method.

    Where `self` is passed to anything but a call of an attribute of `self`, these are all names in the method.
    """
    every_name = frozenset(names_in(method.__code__))
    tree = tree_of(method)
    if tree is None:
        return every_name
    callees: dict[int, ast.expr] = {}
    for call in ast.walk(tree):
        if isinstance(call, ast.Call):
            callees |= {id(a): call.func for a in (*call.args, *(keyword.value for keyword in call.keywords))}
    self_name = method.__code__.co_varnames[0]
    names = [_attribute_called(callees.get(id(node)), self_name) for node in _bare_selves(method, tree)]
    return frozenset(names) if all(names) else every_name


def _attribute_called(callee: ast.expr | None, self_name: str) -> str:
    """The name `a` where the callee is `self.a`, or an attribute or item of that; "" for other callees."""
    while isinstance(callee, ast.Attribute | ast.Subscript):
        if isinstance(callee, ast.Attribute) and is_name(callee.value, (self_name,)):
            return callee.attr
        callee = callee.value
    return ""


def _receiver_inspects(
    held: Any,
    kind: type[nn.Module],
    names: Collection[str],
    original_of: Callable[[nn.Module], type[nn.Module]],
    depth: int = 4,
) -> bool:
    """Whether a held function, object or module tells the class `kind` of an argument; of containers, an item.

    `names` are the names in the method that calls, among them that of the method of the object. Containers may nest
    `depth` deep.
    """
    if any(_function_tells(function, kind) for function in functions_held_by(held)):
        return True
    items = items_of(held)
    if has_type(held, nn.Module):
        if _object_tells(original_of(held), ("forward", *sorted(names)), kind):
            return True
        items = list(held._modules.values()) if has_type(held, _CONTAINERS) else []
    elif has_type(held, types.MethodType):
        owner = held.__self__
        owner_kind = original_of(owner) if has_type(owner, nn.Module) else type(owner)
        return _object_tells(owner_kind, (held.__func__.__name__,), kind)
    elif has_type(held, type):
        return _object_tells(held, ("__init__", "__new__"), kind)
    elif not items and _object_tells(type(held), ("__call__", *sorted(names)), kind):
        return True
    return depth > 0 and any(_receiver_inspects(item, kind, names, original_of, depth - 1) for item in items)


@memoized
def _function_tells(function: types.FunctionType, kind: type[nn.Module]) -> bool:
    return any(kind in _told_classes(reached, False, 0) for reached in functions_reachable_from(function, object))


@memoized
def _object_tells(owner: type, names: tuple[str, ...], kind: type[nn.Module]) -> bool:
    """Whether a method of an object, or code that the method reaches, tells the class `kind` of an argument other than
    the object itself.

    Args:
        owner: the class of the object.
        names: the names of the methods.
    """
    methods = methods_of(owner)
    for name in names:
        for function in functions_reachable_from(inspect.getattr_static(owner, name, None), owner):
            if kind in _told_classes(function, False, int(function in methods)):
                return True
    return False


@memoized
def _told_classes(function: types.FunctionType, is_classmethod: bool, first: int) -> Classes:
    """The classes that a function tells from their subclasses, where an argument is an instance.

    The arguments from the place `first` on count; the first of a classmethod is the class itself.
    """
    code = function.__code__
    if (
        takes_no_modules(function)
        or function.__globals__ is _OF_STRINGS
        or not (is_classmethod or {"type", "__class__"} & names_in(code))
    ):
        return frozenset()
    tree = tree_of(function)
    if tree is None:
        return EVERY_CLASS
    arguments = set(code.co_varnames[first : code.co_argcount + code.co_kwonlyargcount])
    return told_classes(function, tree, aliased(tree, arguments), code.co_varnames[: int(is_classmethod)])
