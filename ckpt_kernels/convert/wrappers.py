"""What takes the place of a method in a converted class, and what the method was."""

import contextlib
import functools
import inspect
import operator
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from .forward_contexts import ForwardContext
from .native_guards import Binding, are_same, native_same_check
from .rules.rule import Forward


class MethodSnapshot(NamedTuple):
    """A method of the original class, and what may be changed of it in place."""

    method: Forward
    code: Any
    defaults: Any
    kwdefaults: Any

    @classmethod
    def of(cls, method: Forward) -> "MethodSnapshot":
        return cls(method, *(getattr(method, name, None) for name in ("__code__", "__defaults__", "__kwdefaults__")))

    def is_at(self, kind: type[nn.Module], name: str) -> bool:
        """Whether the class still has it."""
        return are_same(self.bindings(kind, name))

    def bindings(self, kind: type[nn.Module], name: str) -> tuple[Binding, ...]:
        """That, as it is asked."""
        own = (("__code__", self.code), ("__defaults__", self.defaults), ("__kwdefaults__", self.kwdefaults))
        of_function = own if type(self.method) is types.FunctionType else ()
        return (kind, name, self.method), *((self.method, each, value) for each, value in of_function)

    # Defaults may be lists.
    def __eq__(self, other: object) -> bool:
        return isinstance(other, MethodSnapshot) and all(map(operator.is_, self, other))

    def __hash__(self) -> int:
        return hash(tuple(map(id, self)))


def unless_patched(original: type[nn.Module], name: str, found: MethodSnapshot, method: Forward) -> Forward:
    """The method, or whatever the original class's has become since."""

    _ckpt_name, _ckpt_method, _ckpt_original, _ckpt_load = name, method, original, getattr
    _ckpt_is_same, _ckpt_asked = are_same, found.bindings(original, name)
    _ckpt_is_compiling, _ckpt_are_surely = torch.compiler.is_compiling, native_same_check(_ckpt_asked)

    @_in_the_place_of(found.method)
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # A compiler is to see what is asked.
        is_same = _ckpt_is_same(_ckpt_asked) if _ckpt_is_compiling() else _ckpt_are_surely()
        now = _ckpt_method if is_same else _ckpt_load(_ckpt_original, _ckpt_name)
        return now(self, *args, **kwargs)

    return call


def surrounded(original: type[nn.Module], outer: ForwardContext, forward: Forward | None) -> Forward:
    _ckpt_outer, _ckpt_forward, _ckpt_original = outer, forward, original

    @_in_the_place_of(original.forward)
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return _ckpt_outer(_ckpt_forward or _ckpt_original.forward, self, args, kwargs)

    return call


def _in_the_place_of(method: Forward) -> Callable[[Forward], Forward]:
    """With the method's name, documentation and signature, for whoever looks, and with its globals: torch.jit.script
    reads the method's source, and looks there for what that names. So what the call itself names is in its closure,
    by names that nobody's source has."""

    def made(call: Forward) -> Forward:
        names = getattr(method, "__globals__", call.__globals__)
        # Dynamo counts by code object how often a function was compiled, and gives up beyond a number.
        code = call.__code__.replace()
        call = types.FunctionType(code, names, call.__name__, None, call.__closure__)
        functools.update_wrapper(call, method)
        with contextlib.suppress(TypeError, ValueError):  # of what has none that can be told
            vars(call)["__signature__"] = inspect.signature(method)
        return call

    return made
