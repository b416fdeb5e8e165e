"""Whether a layer may draw from the global generators of Python or numpy, in any code that a call of the layer reaches.

All values that the code can reach are walked: globals that functions name, closures, defaults, all members of classes,
and all attributes of objects. Torch, this package and some modules of Python's library are known to draw from neither
generator; of torch's modules those members are walked that run in a call or that the code names, since a user may have
replaced them. At any other value that is no plain Python, the answer is yes.
"""

import collections
import functools
import operator
import random
import re
import threading
import types
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..swap import original_of
from ..torch_patches import are_patched
from .code_objects import cell_value, has_type, imports_in, names_in

_KNOWN = frozenset(
    f"""torch {__name__.partition(".")[0]} builtins abc cmath collections contextlib copy dataclasses enum functools
    itertools logging math numbers operator re string threading time types typing typing_extensions warnings weakref
    _abc _collections _collections_abc _functools _operator _weakref _weakrefset""".split()
)
# Code with one of these names may reach any value.
_OF_ANYTHING = frozenset(
    """__builtins__ __closure__ __globals__ __import__ __subclasses__ compile eval exec f_back f_globals gc globals
    import_module inspect modules sys""".split()
)
# The types of values that run no code of a user.
_PLAIN = frozenset(
    (
        *(type(None), type(...), type(NotImplemented), bool, int, float, complex, str, bytes, slice, range, object),
        *(Tensor, nn.Parameter, torch.dtype, torch.device, torch.Size, torch.Generator, torch.layout),
        *(torch.memory_format, types.GetSetDescriptorType, types.MemberDescriptorType, types.CodeType),
        *(types.GenericAlias, types.UnionType, re.Pattern, type(threading.Lock()), type(threading.RLock())),
        *(operator.attrgetter, operator.itemgetter),
    )
)
_ITEMS = (list, tuple, set, frozenset, collections.deque)
_OF_C = (
    *(types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType, types.MethodWrapperType),
    types.ClassMethodDescriptorType,
)
# The attributes that hold what a value of that type calls.
_PARTS: dict[type, tuple[str, ...]] = {
    property: ("fget", "fset", "fdel"),
    functools.cached_property: ("func",),
    classmethod: ("__func__",),
    staticmethod: ("__func__",),
    types.MethodType: ("__func__", "__self__"),
    functools.partial: ("func", "args", "keywords"),
    functools.partialmethod: ("func", "args", "keywords"),
    type(functools.cache(abs)): ("__wrapped__",),
    collections.defaultdict: ("default_factory",),
}
_IS_MADE_BY_PYTHON = 1 << 9  # Py_TPFLAGS_HEAPTYPE, of which extensions have some too
_HOOKS = tuple(value for name, value in vars(nn.modules.module).items() if name.startswith("_global_"))
_OF_CALLS = frozenset(("forward", "_call_impl", "_wrapped_call_impl"))
# The largest number of values that are walked.
_MOST = 20_000
# Layers that may draw, whose values are not walked again.
_drawing: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()


class _MayDraw(Exception):
    """A value that may draw."""


def may_draw_globally(layer: nn.Module) -> bool:
    """Whether a call of the layer may draw from the global generators of Python or numpy; True in doubt."""
    if layer in _drawing or are_patched():
        return True
    try:
        _Walk().run((layer, *_HOOKS))
    except _MayDraw:
        _drawing.add(layer)
        return True
    return False


class _Walk:
    """A walk over all values that code can reach. Raises `_MayDraw` at one that may draw."""

    def __init__(self) -> None:
        self._waiting: list[Any] = []
        # Kept alive, so that no id is used again.
        self._seen: dict[int, Any] = {}
        self._names: set[str] = set(_OF_CALLS)
        self._known_classes: list[type] = []

    def run(self, values: Iterable[Any]) -> None:
        """Walks over these values and all that they reach."""
        self._waiting += values
        count = -1
        while count != len(self._seen):
            count = len(self._seen)
            while self._waiting:
                value = self._waiting.pop()
                if type(value) not in _PLAIN and id(value) not in self._seen:
                    self._seen[id(value)] = value
                    _check(len(self._seen) < _MOST)
                    self._read(value)
            for kind in self._known_classes:
                members = vars(kind).items()
                self._waiting += (member for name, member in members if name[:2] == "__" or name in self._names)

    def _read(self, value: Any) -> None:
        if has_type(value, types.FunctionType):
            self._read_function(value)
        elif has_type(value, type):
            self._read_class(value)
        elif has_type(value, types.ModuleType):
            _check(_is_known(value.__name__))
        elif has_type(value, _OF_C):
            owner = getattr(value, "__self__", None)
            _check(_is_known(getattr(value, "__module__", None) or type(owner).__module__))
            self._waiting.append(owner)
        else:
            self._read_object(value)

    def _read_function(self, function: types.FunctionType) -> None:
        self._waiting += (function.__defaults__, function.__kwdefaults__, *vars(function).values())
        self._waiting += map(cell_value, function.__closure__ or ())
        if _is_known(function.__globals__.get("__name__")):
            return
        names = names_in(function.__code__)
        self._names |= names
        _check(names.isdisjoint(_OF_ANYTHING))
        _check(all(map(_is_known, imports_in(function.__code__, function.__globals__.get("__package__")))))
        self._waiting += (function.__globals__[name] for name in names & function.__globals__.keys())

    def _read_class(self, kind: type) -> None:
        is_known = _is_known(kind.__module__)
        _check(is_known or bool(kind.__flags__ & _IS_MADE_BY_PYTHON))
        self._waiting += () if type(kind) is type else (type(kind),)
        if not is_known:
            self._waiting += (*kind.__bases__, *vars(kind).values())
        elif issubclass(kind, nn.Module):
            self._waiting += kind.__bases__
            self._known_classes.append(kind)

    def _read_object(self, value: Any) -> None:
        kind = original_of(value) if has_type(value, nn.Module) else type(value)
        if kind in _PARTS:
            self._waiting += (getattr(value, name) for name in _PARTS[kind])
        if has_type(value, dict):
            self._waiting += (*dict.keys(value), *dict.values(value))
        elif has_type(value, _ITEMS):
            self._waiting += value
        elif kind is weakref.ref:
            self._waiting.append(value())
        elif kind not in _PARTS:
            # Other types of Python's own, such as generators, hold what no attribute shows.
            _check(bool(kind.__flags__ & _IS_MADE_BY_PYTHON) and not has_type(value, random.Random))
        self._waiting += (kind, *getattr(value, "__dict__", {}).values())
        for owner in kind.__mro__:
            if owner.__flags__ & _IS_MADE_BY_PYTHON:
                slots = (name for name, member in vars(owner).items() if type(member) is types.MemberDescriptorType)
                self._waiting += (getattr(value, name, None) for name in slots)


def _is_known(module: Any) -> bool:
    """Whether a module, by its name, is known to draw from neither generator."""
    return type(module) is str and module.partition(".")[0] in _KNOWN


def _check(is_known: bool) -> None:
    if not is_known:
        raise _MayDraw
