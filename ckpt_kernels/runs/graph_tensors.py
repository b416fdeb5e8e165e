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

# Code with one of these names may read any attribute, by a name that is not in the code.
_OF_ANY_NAME = frozenset("__dict__ _buffers attrgetter buffers eval exec getattr named_buffers state_dict vars".split())
# Where methods read no attributes of subclasses by name.
_WITHOUT_OTHER_NAMES = ("torch.", f"{__name__.partition('.')[0]}.")


class GraphTensor(NamedTuple):
    """A tensor in the dict of a module's attributes or buffers.

    Attributes:
        values: the dict.
        name: the name in the dict.
        tensor: the tensor, which may be gone.
        get: returns the tensor without its graph, or raises if the tensor has been written to.
        key: tells the tensor from the others that the call had.
    """

    values: dict[str, Any]
    name: str
    tensor: "weakref.ref[Tensor]"
    get: Callable[[], Tensor]
    key: int

    def is_current(self) -> bool:
        """Whether the dict still has this tensor."""
        tensor = self.tensor()
        return tensor is not None and self.values.get(self.name) is tensor

    def restore(self, restored: dict[int, Tensor]) -> None:
        """Put a tensor of the same values, which requires gradients too, into the dict.

        `restored` has the tensors by key that were restored before: what was one tensor is one again.
        """
        if self.key not in restored:
            restored[self.key] = traced(self.get())
        self.values[self.name] = restored[self.key]


def graph_tensors_in(dicts: Sequence[dict[str, Any]]) -> list[GraphTensor]:
    """The tensors with a graph among the values of these dicts."""
    return [
        GraphTensor(
            values, name, weakref.ref(value), version_checked(value, f"{name} of a checkpointed layer"), id(value)
        )
        for values in dicts
        for name, value in values.items()
        if isinstance(value, Tensor) and value.grad_fn is not None
    ]


def reads(kinds: Collection[type[nn.Module]], name: str) -> bool:
    """Whether code of one of the classes, or a function among the globals of such code, may read an attribute of that
    name."""
    owners = {owner for kind in kinds for owner in kind.__mro__}
    waiting = [f for owner in owners for value in vars(owner).values() for f in _functions_of(value)]
    seen: set[types.FunctionType] = set()
    while waiting:
        function = waiting.pop()
        if function in seen or (function.__module__ or "").startswith(_WITHOUT_OTHER_NAMES):
            continue
        seen.add(function)
        codes = list(_with_nested(function.__code__))
        names = {named for code in codes for named in code.co_names}
        if names & _OF_ANY_NAME or any(name in _loaded(code) for code in codes):
            return True
        waiting += [f for other in names for f in _functions_of(function.__globals__.get(other))]
    return False


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


def _with_nested(code: types.CodeType) -> Iterator[types.CodeType]:
    """The code, and that of nested functions."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _with_nested(constant)


def _loaded(code: types.CodeType) -> Iterator[str]:
    """The names of the attributes that code loads."""
    return (step.argval for step in dis.get_instructions(code) if step.opname in ("LOAD_ATTR", "LOAD_METHOD"))
