"""Somebody's `autograd.Function` that has nothing but a forward and a backward, both of which can be read."""

from collections.abc import Iterable

from torch.autograd import Function

from ..asked import Found

METHODS = ("forward", "backward")
# What such a class has: `_backward_cls` is torch's, the rest but for the methods is Python's.
_OWN = frozenset(
    (*METHODS, "_backward_cls", "__module__", "__doc__", "__qualname__", "__firstlineno__", "__static_attributes__")
)
# What its methods and its users name: nothing is kept there but tensors, from the one method to the other.
NAMES = frozenset(("apply", "save_for_backward", "saved_tensors"))


def is_plain_autograd_function(kind: type) -> bool:
    """Whether it is such a class, and no class below one."""
    own = vars(kind)
    plain = kind.__bases__ == (Function,) and own.keys() <= _OWN
    return plain and all(isinstance(own.get(name), staticmethod) for name in METHODS)


def has_custom_gradient(found: Iterable[Found]) -> bool:
    """Whether such a class is among what code reaches."""
    return any(isinstance(holder, type) and issubclass(holder, Function) for holder, _, _ in found)
