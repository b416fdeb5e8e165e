"""How a module is converted and stays the module it was: its class is exchanged for a subclass with other methods.

So whoever holds the module keeps holding it, and its parameters, buffers, hooks, names, training mode and attributes
are not touched. The subclass bears the original's name, prints like it, is an instance of it, is pickled as what makes
it again, and makes an ordinary module of the original's class when it is called.
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

from .around import Around
from .asked import ACTIVATION, are_same
from .code.call_graph import inspects_own_class
from .noticing import goes_on
from .operands import is_called_plainly
from .rules.rule import Rule, Within
from .wrappers import Found, surrounded, unless_patched

# What the class of a converted module has beside its methods: its `Conversion`, and its forward as it was made.
_ATTRIBUTE = "_ckpt_conversion"
_MADE = "_ckpt_made"
# And what is asked of these, to know whether they are what they were.
_ASKED = "_ckpt_asked"
# And the state of a copy of a converted model: how its conversion goes on.
_LATER = "_ckpt_later"


class NotSwapped(Exception):
    """Why a module's class cannot be exchanged; for people."""


class Conversion(NamedTuple):
    """How a class was converted: from which, by which rule, what its forward runs in, and what its methods were,
    the forward among them."""

    original: type[nn.Module]
    rule: Rule
    around: tuple[Around, ...]
    found: tuple[tuple[str, Found], ...]
    forward: Found


class Converted:
    """The first base of every converted module's class."""

    def __reduce_ex__(self: Any, protocol: SupportsIndex) -> Any:
        kind = type(self)
        original, rule, around, *_ = getattr(kind, _ATTRIBUTE)
        if original in copyreg.dispatch_table:
            return copyreg.dispatch_table[original](self)
        reduced: Any = super().__reduce_ex__(protocol)
        if not _is_pickled_plainly(original):  # since it was converted
            return reduced
        make, given, *rest = reduced
        given = tuple(original if argument is kind else argument for argument in given)
        later = goes_on(self)
        if later is not None and later.is_of(self) and rest and type(rest[0]) is dict:
            rest[0] = {**rest[0], _LATER: later}
        return _made_again, (original, rule, around, (_PROCESS, id(kind)), make, given), *rest

    def __setstate__(self: Any, state: Any) -> None:
        later = None
        if type(state) is dict and _LATER in state:
            state = dict(state)
            later = state.pop(_LATER)
        kind: Any = super()
        kind.__setstate__(state)
        if later is not None:
            later.begin(self)


def _is_pickled_plainly(kind: type[nn.Module]) -> bool:
    return kind.__reduce_ex__ is object.__reduce_ex__ and kind.__reduce__ is object.__reduce__


def swap(module: nn.Module, rule: Rule, around: tuple[Around, ...] = ()) -> None:
    """Converts one module by `rule`; its forward, whichever it then is, runs as the functions `around` it do.

    Raises NotSwapped, and changes nothing, where its class does not let itself be subclassed.
    """
    kind = type(module)
    if not _is_pickled_plainly(kind):
        raise NotSwapped("is pickled in a way of its own")
    found = tuple((name, Found.of(getattr(kind, name))) for name in sorted({*rule.names, "forward"}))
    try:
        made = _converted_class(Conversion(kind, rule, around, found, dict(found)["forward"]))
        object.__setattr__(module, "__class__", made)
    except Exception as error:  # whatever an __init_subclass__ or a metaclass of the user's raises
        raise NotSwapped("its class does not let itself be subclassed") from error


def surround(module: nn.Module, outer: Around) -> None:
    """Has the forward of a module, converted or not, run as one more function does."""
    conversion = getattr(type(module), _ATTRIBUTE, None)
    if conversion is None:
        swap(module, Within(), (outer,))
    else:
        swap_back(module)
        swap(module, conversion.rule, (*conversion.around, outer))


def swap_back(module: nn.Module) -> None:
    object.__setattr__(module, "__class__", original_of(module))


def original_of(module: nn.Module) -> type[nn.Module]:
    """The class of a module that is not converted, and that which a converted one was of."""
    conversion = getattr(type(module), _ATTRIBUTE, None)
    return type(module) if conversion is None else conversion.original


def may_be_swapped(module: nn.Module) -> bool:
    """Whether another class changes nothing but what it is to change: the forward is a plain method, and what it
    reaches does not ask for the module's class."""
    kind = original_of(module)
    if isinstance(module, torch.jit.ScriptModule) or "forward" in module.__dict__:
        return False
    plain = is_plain_method(inspect.getattr_static(kind, "forward", None))
    return plain and not inspects_own_class(kind)


def is_plain_method(method: Any) -> bool:
    """Whether it is a function that has no attributes of its own, to which another would be blind."""
    return isinstance(method, types.FunctionType) and vars(method).keys() <= {"__wrapped__", "__signature__"}


def is_converted(module: nn.Module) -> bool:
    """Whether `convert` has given the module, itself, another way to compute.

    Args:
        module: any module; those within it are not looked at.

    Returns:
        True or False.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.LayerNorm(64), torch.nn.Linear(64, 64))
        >>> _ = ckpt_kernels.convert(model)
        >>> ckpt_kernels.is_converted(model[0]), ckpt_kernels.is_converted(model[1])
        (True, False)
    """
    return isinstance(module, Converted)


def is_wrapped(module: nn.Module) -> bool:
    """Whether a converted module's class has been exchanged again since, as parametrizations and FSDP do."""
    return is_converted(module) and _ATTRIBUTE not in vars(type(module))


def rule_of(module: nn.Module) -> Rule | None:
    """The rule that a converted module was converted by."""
    conversion = getattr(type(module), _ATTRIBUTE, None)
    return None if conversion is None else conversion.rule


def rule_in_force(module: nn.Module) -> Rule | None:
    """The rule that a call of the module computes by; None where hooks or patches make it another."""
    rule = rule_of(module)
    if rule is None or "parametrizations" in module._modules or not is_called_plainly(module):
        return None
    return None if is_patched(type(module)) else rule


def is_patched(kind: type[nn.Module]) -> bool:
    """Whether the forward of a converted class, or of its original, is another than when the module was converted."""
    # A class that was made of a converted one since has both, and its own forward.
    return not are_same(((kind, "forward", getattr(kind, _MADE).method), *getattr(kind, _ASKED)))


def _converted_class(conversion: Conversion) -> type[nn.Module]:
    """One for all modules that are converted alike. It lives as long as they do: a class knows its subclasses by weak
    references."""
    original = conversion.original
    for known in type.__subclasses__(original):
        if vars(known).get(_ATTRIBUTE) == conversion and getattr(known, _MADE).is_at(known, "forward"):
            return known
    members: dict[str, Any] = {
        _ATTRIBUTE: conversion,
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
    }
    if "__annotations__" in vars(original):
        members["__annotations__"] = vars(original)["__annotations__"]
    for name, method in conversion.rule.methods(original).items():
        members[name] = unless_patched(original, name, dict(conversion.found)[name], method)
    for outer in conversion.around:
        members["forward"] = surrounded(original, outer, members.get("forward"))
    with contextlib.suppress(TypeError, ValueError):  # of what has none that can be told
        members["__signature__"] = inspect.signature(original)
    meta: Any = type(original)
    made = _class_of_classes(meta)(original.__name__, (Converted, original), dict(members))
    # What an __init_subclass__ or a metaclass has made of the subclass is the original's own.
    for name, value in list(vars(made).items()):
        with contextlib.suppress(AttributeError, TypeError):
            if name in members:
                if value is not members[name] and not _asks_to_be_outermost(name, value):
                    type.__setattr__(made, name, members[name])
            elif name not in _OF_CLASSES and (name in vars(original) or not name.startswith("__")):
                type.__delattr__(made, name)
    forward = Found.of(vars(made).get("forward", original.forward))
    type.__setattr__(made, _MADE, forward)
    asked = forward.asked(made, "forward") + conversion.forward.asked(original, "forward")
    type.__setattr__(made, _ASKED, asked)
    type.__setattr__(made, ACTIVATION, conversion.rule.as_activation(asked))
    _classes[_PROCESS, id(made)] = made
    return made


def _asks_to_be_outermost(name: str, wrapper: Any) -> bool:
    """Whether a wrapper that an __init_subclass__ has put around a method compares itself with the class's method, as
    that of transformers' checkpointed layers does: then it expects to be put around each subclass's."""
    names = wrapper.__code__.co_names if isinstance(wrapper, types.FunctionType) else ()
    return name in names and ("type" in names or "__class__" in names)


# What Python itself keeps in a class: where it answers isinstance from memory.
_OF_CLASSES = ("_abc_impl",)


@functools.cache
def _class_of_classes(meta: type[type]) -> type[type]:
    """The class of converted classes: called, they make an ordinary module."""

    def call(cls: type, *args: Any, **kwargs: Any) -> Any:
        conversion = vars(cls).get(_ATTRIBUTE)
        made = functools.partial(meta.__call__, cls) if conversion is None else conversion.original
        return made(*args, **kwargs)

    made = type(meta.__name__, (meta,), {"__call__": call, "__module__": meta.__module__})
    copyreg.pickle(made, _as_its_original)
    return made


def _as_its_original(kind: type[nn.Module]) -> tuple | str:
    """How the class of a converted module is pickled, whose reading needs nothing of ours; others go by their name."""
    conversion = vars(kind).get(_ATTRIBUTE)
    return kind.__qualname__ if conversion is None else (operator.itemgetter(0), ((conversion.original,),))


# By these a copy within the process gets the very class, and what is unpickled elsewhere one that is made there.
_PROCESS = uuid.uuid4().hex
_NEW: Callable[..., nn.Module] = vars(copyreg)["__newobj__"]
_classes: "weakref.WeakValueDictionary[tuple[str, int], type[nn.Module]]" = weakref.WeakValueDictionary()


def _made_again(
    original: type[nn.Module],
    rule: Rule,
    around: tuple[Around, ...],
    known: tuple[str, int],
    make: Callable[..., nn.Module] = _NEW,
    given: tuple = (),
) -> nn.Module:
    """What `make` makes of what was given, converted: as Python would make an instance of the original class."""
    module = make(*(given or (original,)))
    if type(module) is not original:
        return module
    kind = _classes.get(known)
    # Another class may be where the one was that is gone.
    if kind is not None and getattr(kind, _ATTRIBUTE)[:3] == (original, rule, around):
        object.__setattr__(module, "__class__", kind)
    else:
        swap(module, rule, around)
    return module
