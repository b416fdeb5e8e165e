"""Methods of converted classes: wrappers that check for patches and run contexts, and snapshots of the originals."""

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
    """A method, and the attributes that can be changed in place: code, defaults and keyword defaults."""

    method: Forward
    code: Any
    defaults: Any
    kwdefaults: Any

    @classmethod
    def of(cls, method: Forward) -> "MethodSnapshot":
        return cls(method, *(getattr(method, name, None) for name in ("__code__", "__defaults__", "__kwdefaults__")))

    def is_at(self, kind: type[nn.Module], name: str) -> bool:
        """Whether the class still has this method, unchanged, under that name."""
        return are_same(self.bindings(kind, name))

    def bindings(self, kind: type[nn.Module], name: str) -> tuple[Binding, ...]:
        """The bindings that hold as long as the class has this method, unchanged, under that name."""
        attributes = (("__code__", self.code), ("__defaults__", self.defaults), ("__kwdefaults__", self.kwdefaults))
        of_function = attributes if type(self.method) is types.FunctionType else ()
        return (kind, name, self.method), *((self.method, attribute, value) for attribute, value in of_function)

    # By identity, because defaults may be lists, which have no hash.
    def __eq__(self, other: object) -> bool:
        return isinstance(other, MethodSnapshot) and all(map(operator.is_, self, other))

    def __hash__(self) -> int:
        return hash(tuple(map(id, self)))


def unless_patched(original: type[nn.Module], name: str, snapshot: MethodSnapshot, method: Forward) -> Forward:
    """A method that calls `method`, or the original class's method where that has been patched since `snapshot`."""

    _ckpt_name, _ckpt_method, _ckpt_original, _ckpt_load = name, method, original, getattr
    _ckpt_are_same, _ckpt_bindings = are_same, snapshot.bindings(original, name)
    _ckpt_is_compiling, _ckpt_native_check = torch.compiler.is_compiling, native_same_check(_ckpt_bindings)

    @_in_place_of(snapshot.method)
    def call(self: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
        # A compiler must trace the Python check, to guard on the bindings.
        is_same = _ckpt_are_same(_ckpt_bindings) if _ckpt_is_compiling() else _ckpt_native_check()
        called = _ckpt_method if is_same else _ckpt_load(_ckpt_original, _ckpt_name)
        return called(self, *args, **kwargs)

    return call


def in_context(original: type[nn.Module], context: ForwardContext, forward: Forward | None) -> Forward:
    """A forward that runs `forward` in the context; None runs the original class's present forward."""
    _ckpt_context, _ckpt_forward, _ckpt_original = context, forward, original

    @_in_place_of(original.forward)
    def call(self: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
        return _ckpt_context(_ckpt_forward or _ckpt_original.forward, self, args, kwargs)

    return call


def _in_place_of(method: Forward) -> Callable[[Forward], Forward]:
    """A decorator that gives a wrapper the name, documentation, signature and globals of the method that it replaces.

    torch.jit.script reads the method's source and resolves names in the wrapper's globals. The wrapper's own names are
    therefore in its closure, with a prefix that no user's source contains.
    """

    def decorate(wrapper: Forward) -> Forward:
        names = getattr(method, "__globals__", wrapper.__globals__)
        # Dynamo counts recompilations by code object and gives up at a limit, so each wrapper has its own.
        code = wrapper.__code__.replace()
        wrapper = types.FunctionType(code, names, wrapper.__name__, None, wrapper.__closure__)
        functools.update_wrapper(wrapper, method)
        with contextlib.suppress(TypeError, ValueError):  # some callables have no signature
            vars(wrapper)["__signature__"] = inspect.signature(method)
        return wrapper

    return decorate
