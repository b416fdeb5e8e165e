"""Takes from Python's cyclic garbage collector the objects of which there are some for each saved tensor.

The collector runs after so many new objects, and visits each. A step of a model makes hundreds of these.
"""

import importlib
from typing import Any, TypeVar

_Class = TypeVar("_Class", bound=type)


def untracked(kind: _Class) -> _Class:
    """With the library, an equal class whose objects the collector does not know: a decorator of classes with
    `__slots__` and no base.

    The objects must be part of no cycle of references, which nobody would free. They have weak references.
    """
    given: Any = kind
    fields = [name for name in given.__slots__ if name != "__weakref__"]
    try:
        thin: Any = importlib.import_module("ckpt_kernels._thin")
        new = thin.untracked(f"{kind.__module__}.{kind.__qualname__}", *fields)
    except (ImportError, OSError, AttributeError):
        return kind
    for name, value in vars(kind).items():
        if name not in fields and name not in ("__dict__", "__weakref__"):
            setattr(new, name, value)
    return new
