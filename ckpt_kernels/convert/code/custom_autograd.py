"""A user's `autograd.Function` that consists of a forward and a backward, both of which can be read."""

from collections.abc import Iterable

from torch.autograd import Function

from ..native_guards import Binding
from .code_objects import has_type

METHODS = ("forward", "backward")
# The attributes of such a class: `_backward_cls` is torch's, all others but the methods are Python's.
_ATTRIBUTES = frozenset(
    (*METHODS, "_backward_cls", "__module__", "__doc__", "__qualname__", "__firstlineno__", "__static_attributes__")
)
# The names that its methods and callers may use: the forward passes nothing to the backward but saved tensors.
NAMES = frozenset(("apply", "save_for_backward", "saved_tensors"))


def is_plain_autograd_function(kind: type) -> bool:
    """Whether a class is a direct subclass of `autograd.Function` with only a static forward and backward."""
    own = vars(kind)
    is_plain = kind.__bases__ == (Function,) and own.keys() <= _ATTRIBUTES
    return is_plain and all(isinstance(own.get(name), staticmethod) for name in METHODS)


def has_custom_gradient(dependencies: Iterable[Binding]) -> bool:
    """Whether the dependencies of code include an `autograd.Function`."""
    return any(has_type(holder, type) and issubclass(holder, Function) for holder, _, _ in dependencies)
