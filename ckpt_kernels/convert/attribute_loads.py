"""Attributes of a module as Python and torch look them up, without running any code of the module's class.

The functions here call no method of the module and never take the truth value of an attribute.
"""

import inspect
from typing import Any

from torch import nn

from .code.called import is_as_torch_wrote_it
from .native_guards import MISSING

_GETATTRIBUTE = object.__getattribute__
# None, which no method is, where somebody has put another in its place.
_GETATTR = nn.Module.__getattr__ if is_as_torch_wrote_it(nn.Module.__getattr__) else None


LOADS_PLAINLY = (("__getattribute__", _GETATTRIBUTE), ("__getattr__", _GETATTR))


def is_set(module: nn.Module, name: str) -> bool:
    """Whether the module itself has that attribute, and it is neither None nor False."""
    value = module.__dict__.get(name)
    return value is not None and value is not False


def loads_plainly(kind: type[nn.Module], *names: str) -> bool:
    """Whether `module.name` of that class is what the module holds under the name, and no code of the class."""
    own = kind.__getattribute__ is object.__getattribute__ and kind.__getattr__ is _GETATTR
    return own and not any(hasattr(type(inspect.getattr_static(kind, name, None)), "__get__") for name in names)


def only_instances_define(kind: type[nn.Module], *names: str) -> bool:
    """Whether a class has nothing under these names itself, nor a way of its own to load them. For each call."""
    if kind.__getattribute__ is not _GETATTRIBUTE or kind.__getattr__ is not _GETATTR:
        return False
    # To be told by hasattr that there is none costs several times as much. (Python's object, the last, has none.)
    for each in kind.__mro__[:-1]:
        held = each.__dict__
        for name in names:
            if name in held:
                return False
    return True


def load_attribute(module: nn.Module, name: str) -> Any:
    """What `module.name` is, in the order in which Python and torch look; MISSING where code would run."""
    kind = type(module)
    if not loads_plainly(kind, name):
        return MISSING
    if name in module.__dict__:
        return module.__dict__[name]
    of_class = inspect.getattr_static(kind, name, MISSING)
    if of_class is not MISSING:
        return of_class
    for kept in (module._parameters, module._buffers, module._modules):
        if name in kept:
            return kept[name]
    return MISSING
