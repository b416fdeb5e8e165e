"""Tensors with a graph among the attributes of a layer's modules, such as a conditioning that the caller sets.

A repeated call needs the values of the first call, and the graph of neither.
"""

import dis
import functools
import types
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from .arguments import traced, version_checked

# Where methods read no attributes of subclasses by name.
_WITHOUT_OTHER_NAMES = ("torch.nn.modules.", f"{__name__.partition('.')[0]}.")


class GraphTensor(NamedTuple):
    """A tensor in the dict of a module's attributes or buffers.

    Attributes:
        values: the dict.
        name: the name in the dict.
        tensor: the tensor, which may be gone.
        get: returns the tensor without its graph, or raises if the tensor has been written to.
    """

    values: dict[str, Any]
    name: str
    tensor: "weakref.ref[Tensor]"
    get: Callable[[], Tensor]

    def is_current(self) -> bool:
        """Whether the dict still has this tensor."""
        tensor = self.tensor()
        return tensor is not None and self.values.get(self.name) is tensor

    def restore(self) -> None:
        """Put a tensor of the same values, which requires gradients too, into the dict."""
        if not self.is_current():
            self.values[self.name] = traced(self.get())


def graph_tensors_in(dicts: Sequence[dict[str, Any]]) -> list[GraphTensor]:
    """The tensors with a graph among the values of these dicts."""
    return [
        GraphTensor(values, name, weakref.ref(value), version_checked(value, f"{name} of a checkpointed layer"))
        for values in dicts
        for name, value in values.items()
        if isinstance(value, Tensor) and value.grad_fn is not None
    ]


def reads(kinds: Collection[type[nn.Module]], name: str) -> bool:
    """Whether code of one of the classes may read an attribute of that name."""
    owners = {owner for kind in kinds for owner in kind.__mro__}
    functions = (f for owner in owners for value in vars(owner).values() for f in _functions_of(value))
    codes = [f.__code__ for f in functions if not (f.__module__ or "").startswith(_WITHOUT_OTHER_NAMES)]
    return any(name in _loaded(code) or "getattr" in code.co_names for code in codes)


def _functions_of(value: Any) -> Iterator[types.FunctionType]:
    """The function that an attribute of a class is, or stands for, and those that decorators wrap."""
    if isinstance(value, property):
        yield from _functions_of(value.fget)
    elif isinstance(value, functools.cached_property):
        yield from _functions_of(value.func)
    elif isinstance(value, classmethod | staticmethod):
        yield from _functions_of(value.__func__)
    elif isinstance(value, types.FunctionType):
        yield value
        yield from _functions_of(vars(value).get("__wrapped__"))


def _loaded(code: types.CodeType) -> Iterator[str]:
    """The names of the attributes that code loads, nested functions included."""
    yield from (step.argval for step in dis.get_instructions(code) if step.opname in ("LOAD_ATTR", "LOAD_METHOD"))
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _loaded(constant)
