"""Objects that are no modules and that a module calls, such as attention processors: `self.processor(self, x)`.

The object stays as it is, and so does its class. Where the module's method is rewritten, the call is one of what the
object's `__call__` is rewritten to, as long as the class has the `__call__` that was read.
"""

import functools
import types
from collections.abc import Callable
from typing import Any

from torch import nn

from ..code.call_graph import belongs_to_torch
from ..swap import is_plain_method
from ..wrappers import MethodSnapshot

_NO_OBJECTS = (nn.Module, type, types.FunctionType, types.BuiltinFunctionType, types.MethodType)


def method_called(value: Any) -> types.FunctionType | None:
    """What runs where an object is called; None where that is a module, a function, or torch's own."""
    if issubclass(type(value), _NO_OBJECTS):
        return None
    owners = (vars(owner) for owner in type(value).__mro__)
    method = next((own["__call__"] for own in owners if "__call__" in own), None)
    return method if is_plain_method(method) and not belongs_to_torch(method) else None


def exchanged_object(method: types.FunctionType, instead: Callable[..., Any]) -> Callable[[Any], Any]:
    """Of what is about to be called: `instead` of an object whose class has this method, and anything else as it is."""
    found = MethodSnapshot.of(method)

    def exchange(called: Any) -> Any:
        return functools.partial(instead, called) if found.is_at(type(called), "__call__") else called

    return exchange
