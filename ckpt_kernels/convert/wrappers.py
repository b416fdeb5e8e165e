"""Methods of converted classes: wrappers that check for patches of the originals, and run contexts."""

import contextlib
import functools
import inspect
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from .code.source import NoSource, decorator_chain
from .forward_contexts import ForwardContext, InTiles
from .native_guards import Binding, are_same, native_same_check
from .rules.rule import Forward

# The attributes of a function that can be changed in place.
_CHANGEABLE = ("__code__", "__defaults__", "__kwdefaults__")


# The attribute of a wrapper with the wrapper and the method that it replaces.
_STANDS_FOR = "_ckpt_stands_for"


def method_bindings(kind: type, name: str, method: Any) -> tuple[Binding, ...]:
    """The bindings that hold as long as the class has this method under that name, as the method is now."""
    functions = _functions_of(method)
    return (kind, name, method), *(
        (f, attribute, getattr(f, attribute)) for f in functions for attribute in _CHANGEABLE
    )


def _functions_of(method: Any) -> Sequence[types.FunctionType]:
    """The functions whose code runs in a call of the method: the method itself, and those that decorators wrap."""
    if type(method) is not types.FunctionType:
        return ()
    try:
        return decorator_chain(method)
    except NoSource:
        return (method,)


def unless_patched(bindings: tuple[Binding, ...], method: Forward) -> Forward:
    """A method that calls `method`, or the original class's method where its `method_bindings` no longer hold."""
    (_ckpt_original, _ckpt_name, original_method), *_ = bindings
    _ckpt_method, _ckpt_load, _ckpt_are_same, _ckpt_bindings = method, getattr, are_same, bindings
    _ckpt_is_compiling, _ckpt_native_check = torch.compiler.is_compiling, native_same_check(bindings)

    @_in_place_of(original_method)
    def call(self: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
        # A compiler must trace the Python check, to guard on the bindings.
        is_same = _ckpt_are_same(_ckpt_bindings) if _ckpt_is_compiling() else _ckpt_native_check()
        called = _ckpt_method if is_same else _ckpt_load(_ckpt_original, _ckpt_name)
        return called(self, *args, **kwargs)

    # With the wrapper itself, because a decorator copies the attributes of what it decorates.
    vars(call)[_STANDS_FOR] = call, original_method
    return call


def original_method(method: Any) -> Any:
    """The method of the original class that a method of a converted class replaces; any other method itself."""
    wrapper, original = getattr(method, _STANDS_FOR, (None, None))
    return original if wrapper is method else method


def in_context(original: type[nn.Module], context: ForwardContext, forward: Forward | None) -> Forward:
    """A forward that runs `forward` in the context; None runs the original class's present forward."""
    _ckpt_context, _ckpt_forward, _ckpt_original = context, forward, original

    @_in_place_of(original.forward)
    def call(self: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
        return _ckpt_context(_ckpt_forward or _ckpt_original.forward, self, args, kwargs)

    return call


def with_tiles(contexts: Sequence[ForwardContext], method: Forward) -> Forward:
    """A replacement that sets the number of tiles itself, if the contexts have a number.

    A model's own checkpoint may call any method again, outside of the contexts around the model's forward.
    """
    for context in contexts:
        if isinstance(context, InTiles):
            return functools.partial(_call_in, context, method)
    return method


def _call_in(context: ForwardContext, method: Forward, module: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
    return context(method, module, args, kwargs)


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
