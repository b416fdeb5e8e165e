"""Looks up attributes of a module as Python and torch do, without running any code of the module's class.

The functions here call no method of the module and never take the truth value of an attribute.
"""

import inspect
from typing import Any

from torch import nn

from .code.call_graph import is_unpatched
from .native_guards import MISSING, Binding

_GETATTRIBUTE = object.__getattribute__
# None, which equals no method, where `nn.Module.__getattr__` is patched.
_GETATTR = nn.Module.__getattr__ if is_unpatched(nn.Module.__getattr__) else None

# Attributes of a class whose instances load attributes as torch's modules do.
LOADS_PLAINLY = (("__getattribute__", _GETATTRIBUTE), ("__getattr__", _GETATTR))


def plain_loads(kind: type[nn.Module]) -> list[Binding]:
    """The bindings under which instances of the class load attributes so."""
    return [(kind, name, value) for name, value in LOADS_PLAINLY]


def is_set(module: nn.Module, name: str) -> bool:
    """Whether the module's `__dict__` has that attribute with a value other than None and False."""
    value = module.__dict__.get(name)
    return value is not None and value is not False


def loads_plainly(kind: type[nn.Module], *names: str) -> bool:
    """Whether loading these attributes from an instance runs no code: no `__getattribute__`, `__getattr__`, property or
    other descriptor of the class."""
    default = kind.__getattribute__ is object.__getattribute__ and kind.__getattr__ is _GETATTR
    return default and not any(hasattr(type(inspect.getattr_static(kind, name, None)), "__get__") for name in names)


def only_instances_define(kind: type[nn.Module], *names: str) -> bool:
    """Whether neither the class nor its bases define these names, or another way to load attributes. Runs at each
    call, and must be fast."""
    if kind.__getattribute__ is not _GETATTRIBUTE or kind.__getattr__ is not _GETATTR:
        return False
    # hasattr costs several times as much where the name is missing. The last class is `object`.
    for base in kind.__mro__[:-1]:
        attributes = base.__dict__
        for name in names:
            if name in attributes:
                return False
    return True


def load_attribute(module: nn.Module, name: str) -> Any:
    """The value of `module.name`, looked up in the order of Python and torch; MISSING where there is none, or where the
    load would run code of the class."""
    kind = type(module)
    if not loads_plainly(kind, name):
        return MISSING
    if name in module.__dict__:
        return module.__dict__[name]
    class_attribute = inspect.getattr_static(kind, name, MISSING)
    if class_attribute is not MISSING:
        return class_attribute
    for registered in (module._parameters, module._buffers, module._modules):
        if name in registered:
            return registered[name]
    return MISSING
