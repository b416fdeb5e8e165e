"""Exempts from Python's cyclic garbage collector the small objects that are made for each saved tensor.

The collector runs after so many new objects, and visits each. A step of a model makes hundreds of these.
"""

import importlib
from typing import Any, TypeVar

_Class = TypeVar("_Class", bound=type)


def untracked(kind: _Class) -> _Class:
    """A decorator of classes with `__slots__`, no base, no subclasses and at most 6 attributes.

    With the library it returns an equal class whose objects the collector does not visit; without it, the class itself.
    An object that is part of a cycle would never be freed. Objects can be referenced weakly.
    """
    given: Any = kind
    fields = [name for name in given.__slots__ if name != "__weakref__"]
    try:
        thin: Any = importlib.import_module("ckpt_kernels._thin")
        new = thin.untracked(f"{kind.__module__}.{kind.__qualname__}", *fields)
    except (ImportError, OSError, AttributeError):
        return kind
    for name, value in vars(kind).items():
        if name not in fields and name != "__weakref__":
            setattr(new, name, value)
    return new
