"""Converts a module in place: exchanges the module's class for a subclass with other methods.

The module object stays the same, and so do parameters, buffers, hooks, names, training mode and attributes. The
subclass has the original's name and repr, and `isinstance` holds for the original class. The pickle of a converted
module holds the original class, the rule and the contexts, and loading it converts the module again. Calling the
subclass constructs an unconverted module of the original class.
"""

import contextlib
import copyreg
import functools
import inspect
import operator
import types
import uuid
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple, SupportsIndex

import torch
from torch import nn

from .class_members import has_members_as_made, remember_members, undo_subclass_hooks
from .code.memoization import shared_results
from .code.own_class import reader_of_own_class
from .forward_contexts import ForwardContext
from .late_modules import late_conversion_of
from .module_tree import is_parametrized
from .native_guards import ACTIVATION, are_same
from .operands import is_called_plainly
from .rules.rule import ContextOnly, Rule
from .wrappers import in_context, method_bindings, unless_patched, with_tiles

# Attributes of a converted class: the `Conversion`, and the bindings of the forward and of all methods of the original
# class that the rule replaces.
_CONVERSION = "_ckpt_conversion"
_BINDINGS = "_ckpt_bindings"
# The key of the `LateConversion` in the pickled state of a converted model.
_LATE_CONVERSION = "_ckpt_late_conversion"


class NotSwapped(Exception):
    """A module's class cannot be exchanged. The message is the reason, as the report states it."""


class Conversion(NamedTuple):
    """The class before the conversion, the rule that computes the replaced methods, and the contexts that the forward
    runs in, the innermost first."""

    original: type[nn.Module]
    rule: Rule
    contexts: tuple[ForwardContext, ...]


def _reduce_ex(self: Any, protocol: SupportsIndex) -> Any:
    """The `__reduce_ex__` of converted classes."""
    kind = type(self)
    original, rule, contexts = getattr(kind, _CONVERSION)
    if original in copyreg.dispatch_table:
        return copyreg.dispatch_table[original](self)
    reduced = original.__reduce_ex__(self, protocol)
    # The original may have been given another `__reduce__` after the conversion.
    if not _has_default_reduce(original):
        return reduced
    construct, arguments, *rest = reduced
    arguments = tuple(original if argument is kind else argument for argument in arguments)
    late = late_conversion_of(self)
    if late is not None and late.belongs_to(self) and rest and type(rest[0]) is dict:
        rest[0] = {**rest[0], _LATE_CONVERSION: late}
    return _rebuild, (original, rule, contexts, (_PROCESS, id(kind)), construct, arguments), *rest


def _setstate(self: Any, state: Any) -> None:
    """The `__setstate__` of converted classes."""
    late = None
    if type(state) is dict and _LATE_CONVERSION in state:
        state = dict(state)
        late = state.pop(_LATE_CONVERSION)
    getattr(type(self), _CONVERSION).original.__setstate__(self, state)
    if late is not None:
        late.begin(self)


def _has_default_reduce(kind: type[nn.Module]) -> bool:
    return kind.__reduce_ex__ is object.__reduce_ex__ and kind.__reduce__ is object.__reduce__


def swap(module: nn.Module, rule: Rule, contexts: tuple[ForwardContext, ...] = ()) -> None:
    """Converts one module by `rule`, and runs its forward, whether the rule replaces it or not, in the `contexts`.

    Raises NotSwapped where the module's class cannot be subclassed; the module is then unchanged.
    """
    kind = type(module)
    if not _has_default_reduce(kind):
        raise NotSwapped("is pickled in a way of its own")
    try:
        with shared_results():
            converted = _converted_class(Conversion(kind, rule, contexts))
        object.__setattr__(module, "__class__", converted)
    except Exception as error:  # a user's __init_subclass__ or metaclass may raise anything
        raise NotSwapped("its class cannot be subclassed") from error


def add_forward_context(module: nn.Module, context: ForwardContext) -> None:
    """Puts one more context around the forward of a module, converted or not, as the outermost."""
    conversion = _conversion_of(type(module))
    if conversion is None:
        swap(module, ContextOnly(), (context,))
    else:
        swap_back(module)
        swap(module, conversion.rule, (*conversion.contexts, context))


def swap_back(module: nn.Module) -> None:
    """Gives a module the original class back."""
    object.__setattr__(module, "__class__", original_of(module))


def _conversion_of(kind: type[nn.Module]) -> Conversion | None:
    """The conversion of a class, which may be inherited. A metaclass with a `__getattr__` is not asked."""
    for base in kind.__mro__:  # of a converted class the first base has the conversion
        conversion = vars(base).get(_CONVERSION)
        if conversion is not None:
            return conversion
    return None


def original_of(module: nn.Module) -> type[nn.Module]:
    """The module's class; for a converted module, the class before the conversion."""
    conversion = _conversion_of(type(module))
    return type(module) if conversion is None else conversion.original


def may_be_swapped(module: nn.Module) -> bool:
    """Whether the forward is a plain method of the class, no code tells the class from a subclass, and no parameter of
    the module is parametrized."""
    kind = original_of(module)
    if isinstance(module, torch.jit.ScriptModule) or "forward" in module.__dict__:
        return False
    # Torch removes a parametrization from the module's very class.
    if is_parametrized(module):
        return False
    return is_plain_method(inspect.getattr_static(kind, "forward", None)) and not reader_of_class(module)


def reader_of_class(module: nn.Module) -> str:
    """The name of code of the module that tells the module's class from a subclass, or ""."""
    return reader_of_own_class(module, original_of)


def is_plain_method(method: Any) -> bool:
    """Whether a method is a function without attributes of its own, which a replacement would not have."""
    return isinstance(method, types.FunctionType) and vars(method).keys() <= {"__wrapped__", "__signature__"}


def is_converted(module: nn.Module) -> bool:
    """Whether `convert` has replaced the forward of this very module.

    Args:
        module: any module. The modules inside it do not count.

    Returns:
        True or False.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.LayerNorm(64), torch.nn.Linear(64, 64))
        >>> _ = ckpt_kernels.convert(model)
        >>> ckpt_kernels.is_converted(model[0]), ckpt_kernels.is_converted(model[1])
        (True, False)
    """
    return _conversion_of(type(module)) is not None


def is_wrapped(module: nn.Module) -> bool:
    """Whether a converted module's class has been exchanged once more since, as parametrizations and FSDP do."""
    return is_converted(module) and _CONVERSION not in vars(type(module))


def rule_of(module: nn.Module) -> Rule | None:
    """The rule of a converted module, or None."""
    conversion = _conversion_of(type(module))
    return None if conversion is None else conversion.rule


def rule_in_force(module: nn.Module) -> Rule | None:
    """The rule that a call of the module follows now; None where hooks, parametrizations or patches interfere."""
    rule = rule_of(module)
    if rule is None or "parametrizations" in module._modules or not is_called_plainly(module):
        return None
    return None if is_patched(type(module)) else rule


def is_patched(kind: type[nn.Module]) -> bool:
    """Whether the forward of a converted class, or of the original class, was replaced after the conversion."""
    # `kind` may be a subclass of a converted class, which inherits the bindings and may define another forward.
    (_, _, forward), *_ = bindings = getattr(kind, _BINDINGS)
    return not are_same(((kind, "forward", forward), *bindings))


def _converted_class(conversion: Conversion) -> type[nn.Module]:
    """The converted class, shared by all modules with an equal conversion.

    The class lives as long as these modules: classes hold their subclasses by weak references.
    """
    original, rule, contexts = conversion
    for subclass in type.__subclasses__(original):
        if (
            vars(subclass).get(_CONVERSION) == conversion
            and has_members_as_made(subclass)
            and are_same(vars(subclass)[_BINDINGS])
        ):
            return subclass
    methods = {name: method_bindings(original, name, getattr(original, name)) for name in ("forward", *rule.names)}
    members: dict[str, Any] = {
        _CONVERSION: conversion,
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "__reduce_ex__": _reduce_ex,
        "__setstate__": _setstate,
    }
    if "__annotations__" in vars(original):
        members["__annotations__"] = vars(original)["__annotations__"]
    for name, method in rule.methods(original).items():
        members[name] = unless_patched(methods[name], with_tiles(contexts, method))
    for context in contexts:
        members["forward"] = in_context(original, context, members.get("forward"))
    with contextlib.suppress(TypeError, ValueError):  # some classes have no signature
        members["__signature__"] = inspect.signature(original)
    metaclass: Any = type(original)
    # No other base: with two, Python compares the layouts of the classes by the first bases alone.
    converted = _converting_metaclass(metaclass)(original.__name__, (original,), dict(members))
    undo_subclass_hooks(converted, original, members)
    forward = method_bindings(converted, "forward", vars(converted).get("forward", original.forward))
    bindings = sum(methods.values(), forward)
    type.__setattr__(converted, _BINDINGS, bindings)
    type.__setattr__(converted, ACTIVATION, rule.activation_guard(bindings))
    remember_members(converted)
    _classes[_PROCESS, id(converted)] = converted
    return converted


@functools.cache
def _converting_metaclass(metaclass: type[type]) -> type[type]:
    """The metaclass of converted classes: calling such a class constructs a module of the original class."""

    def call(cls: type, /, *args: Any, **kwargs: Any) -> Any:
        conversion = vars(cls).get(_CONVERSION)
        construct = functools.partial(metaclass.__call__, cls) if conversion is None else conversion.original
        return construct(*args, **kwargs)

    made = type(metaclass.__name__, (metaclass,), {"__call__": call, "__module__": metaclass.__module__})
    copyreg.pickle(made, _reduce_class)
    return made


def _reduce_class(kind: type[nn.Module]) -> tuple | str:
    """The pickle of a converted class: the original, which loads without this package. Others are pickled by name."""
    conversion = vars(kind).get(_CONVERSION)
    return kind.__qualname__ if conversion is None else (operator.itemgetter(0), ((conversion.original,),))


# A pickle holds this process's id and the class's id: a copy within the process gets the very class, any other process
# makes the class anew.
_PROCESS = uuid.uuid4().hex
_classes: "weakref.WeakValueDictionary[tuple[str, int], type[nn.Module]]" = weakref.WeakValueDictionary()


def _rebuild(
    original: type[nn.Module],
    rule: Rule,
    contexts: tuple[ForwardContext, ...],
    key: tuple[str, int],
    construct: Callable[..., nn.Module],
    arguments: tuple,
) -> nn.Module:
    """Unpickles a converted module: constructs a module of the original class as Python would, and converts it."""
    module = construct(*arguments)
    if type(module) is not original:
        return module
    kind = _classes.get(key)
    # The id of a class that is gone may have become that of another class.
    if kind is not None and getattr(kind, _CONVERSION) == (original, rule, contexts):
        object.__setattr__(module, "__class__", kind)
    else:
        swap(module, rule, contexts)
    return module
