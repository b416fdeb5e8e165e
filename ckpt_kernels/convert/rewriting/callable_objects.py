"""Callable objects that are no modules, such as attention processors: `self.processor(self, x)`.

The object and its class stay unchanged. A rewritten method of the module calls a rewritten copy of the object's
`__call__`, as long as the class still has the original one.
"""

import functools
import types
from collections.abc import Callable
from typing import Any

from torch import nn

from ..code.call_graph import belongs_to_torch
from ..native_guards import are_same
from ..swap import is_plain_method
from ..wrappers import method_bindings

_NOT_OBJECTS = (nn.Module, type, types.FunctionType, types.BuiltinFunctionType, types.MethodType)


def method_called(value: Any) -> types.FunctionType | None:
    """The `__call__` of an object's class; None for modules, functions, and classes of torch."""
    if issubclass(type(value), _NOT_OBJECTS):
        return None
    namespaces = (vars(owner) for owner in type(value).__mro__)
    method = next((members["__call__"] for members in namespaces if "__call__" in members), None)
    return method if is_plain_method(method) and not belongs_to_torch(method) else None


def replacing_call(method: types.FunctionType, replacement: Callable[..., Any]) -> Callable[[Any], Any]:
    """A function that maps an object whose class has the method to `replacement`, and any other callee to itself."""
    _, *of_method = method_bindings(object, "__call__", method)

    def replace(called: Any) -> Any:
        is_original = are_same(((type(called), "__call__", method), *of_method))
        return functools.partial(replacement, called) if is_original else called

    return replace
