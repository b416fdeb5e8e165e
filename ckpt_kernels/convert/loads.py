"""What a module holds, found as Python and torch find it, without running anybody's code.

A module's attributes may be called anything, `parameters`, `modules` or `named_modules` too, and be anything. So
nothing is called on it here by a name that it might have, and nothing of its own is asked for its truth.
"""

import inspect
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from .asked import MISSING
from .code.call_graph import is_unpatched

_GETATTRIBUTE = object.__getattribute__
# None, which no method is, where somebody has put another in its place.
_GETATTR = nn.Module.__getattr__ if is_unpatched(nn.Module.__getattr__) else None


LOADS_PLAINLY = (("__getattribute__", _GETATTRIBUTE), ("__getattr__", _GETATTR))


def named_modules(model: nn.Module, duplicates: bool = False) -> Iterator[tuple[str, nn.Module]]:
    """The module and all that are below it, each once, or as often as it is there, but not below itself."""
    seen: set[nn.Module] = set()

    def walk(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
        if module in seen:
            return
        seen.add(module)
        yield name, module
        for key, child in module._modules.items():
            if child is not None:
                yield from walk(child, f"{name}.{key}" if name else key)
        if duplicates:
            seen.remove(module)

    return walk(model, "")


def modules_of(model: nn.Module) -> Iterator[nn.Module]:
    """The module and all that are below it."""
    return (module for _, module in named_modules(model))


def has_children(module: nn.Module) -> bool:
    """Whether there is a module in it."""
    return any(child is not None for child in module._modules.values())


def tensors_of(model: nn.Module, buffers: bool = False) -> Iterator[Tensor]:
    """The parameters of the module and of all that are below it, and the buffers if asked for."""
    for module in modules_of(model):
        for held in (module._parameters, module._buffers) if buffers else (module._parameters,):
            yield from (tensor for tensor in held.values() if tensor is not None)


def is_set(module: nn.Module, name: str) -> bool:
    """Whether the module itself has that attribute, and it is neither None nor False."""
    value = module.__dict__.get(name)
    return value is not None and value is not False


def loads_plainly(kind: type[nn.Module], *names: str) -> bool:
    """Whether `module.name` of that class is what the module holds under the name, and no code of the class."""
    own = kind.__getattribute__ is object.__getattribute__ and kind.__getattr__ is _GETATTR
    return own and not any(hasattr(type(inspect.getattr_static(kind, name, None)), "__get__") for name in names)


def is_left_to_modules(kind: type[nn.Module], *names: str) -> bool:
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


def load(module: nn.Module, name: str) -> Any:
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
