"""The state of a layer's modules that a repeated call must find as the first call did: classes, parameters and whether
they require gradients, buffers, children, hooks, and attributes that are numbers, strings or tensors.

A state holds the values and no copies, so a tensor that the forward pass replaces, such as the hidden state of a
recurrent layer, is kept until the backward pass. Of tensors with a graph the values are held (see `graph_tensors`), and
not the graph: in a graph that no backward pass frees, each call would hold the graph of the call before. Lists and
other objects may hold such tensors, and are not held.
"""

import collections
import contextlib
import operator
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..thin import direct
from .containers import Contents
from .graph_tensors import graph_tensors_in, reads

Values = dict[str, Any]

# The dicts of a module that torch changes in place.
CONTAINERS = (
    "_parameters",
    "_buffers",
    "_modules",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)
_DICTS = (dict, collections.OrderedDict)
_EMPTY: Values = {}
# Stands for a value that a lasting state does not hold.
NOT_HELD = object()
_PLAIN = frozenset({type(None), bool, int, float, complex, str, bytes})
OF_TORCH = frozenset(vars(nn.Module()))
_requires_grad = operator.attrgetter("requires_grad")


class Copies(NamedTuple):
    """Dicts of modules, each followed by its copy.

    Attributes:
        attributes: the attributes of each module.
        containers: the dicts of a module that torch changes in place.
        partial: the dicts, without copies, of which a copy does not hold all values.
    """

    attributes: list[Values]
    containers: list[Values]
    partial: list[Values]


def copies_of(modules: Sequence[nn.Module], holds_all: bool = False) -> Copies:
    """The copies of the modules' dicts, without values that may hold a graph unless `holds_all`."""
    attributes: list[Values] = []
    containers: list[Values] = []
    partial: list[Values] = []
    for module in modules:
        own = vars(module)
        attributes += own, own.copy() if holds_all else _lasting_copy(own, partial)
        for name in CONTAINERS:
            # Scripted modules, for one, have objects of another type here, which are not restored.
            container: Any = own.get(name)
            if type(container) in _DICTS:
                is_lasting = name == "_buffers" and not holds_all
                copy = _lasting_copy(container, partial) if is_lasting else container.copy()
                containers += container, copy if copy else _EMPTY
    return Copies(attributes, containers, partial)


class ModuleStates:
    """The state of several modules at one time, without the modules below them.

    Args:
        modules: the modules.
        parameters: the parameters of these modules.
        copies: the copies of the modules' dicts.
    """

    __slots__ = (
        *("_arguments", "_attributes", "_containers", "_graph_tensors", "_kinds", "_modules", "_parameters"),
        *("_partial", "_require_gradients"),
    )

    def __init__(self, modules: Sequence[nn.Module], parameters: Sequence[Tensor], copies: Copies) -> None:
        self._modules, self._kinds = modules, list(map(type, modules))
        self._parameters, self._require_gradients = parameters, list(map(_requires_grad, parameters))
        self._attributes, self._containers, self._partial = copies
        self._graph_tensors = graph_tensors_in(self._partial)
        self._arguments: list[int] = []

    def note_arguments(self, tensors: Sequence[Tensor]) -> None:
        """Note the tensors in the arguments of the call, before the call: an attribute may be one of them."""
        self._arguments = list(map(id, tensors)) if self._graph_tensors else []

    def forget_unread(self) -> None:
        """Forget the tensors with a graph that the call has replaced, and that no method of the modules reads."""
        kinds = set(self._kinds)
        self._graph_tensors = [t for t in self._graph_tensors if t.is_current() or reads(kinds, t.name)]

    def are_current(self) -> bool:
        """Whether the modules still have this state, whatever the values that are not held."""
        return (
            _are_same_dicts(self._attributes)
            and _are_same_dicts(self._containers)
            and all(tensor.is_current() and tensor.key not in self._arguments for tensor in self._graph_tensors)
            and list(map(type, self._modules)) == self._kinds
            and list(map(_requires_grad, self._parameters)) == self._require_gradients
        )

    def restore(self, arguments: Sequence[Tensor] = ()) -> None:
        """Give the modules this state. `arguments` are the tensors in the arguments of a repeated call."""
        for now, before in _pairs(self._attributes):
            _restore(now, before)
        for now, before in _pairs(self._containers):
            _restore(now, before)
            # Another thread may read the dict, which therefore is emptied only to restore the order.
            values = {name: now[name] for name in before if name in now}
            if list(now) != list(values):
                now.clear()
                now.update(values)
        restored = dict(zip(self._arguments, arguments, strict=False))
        for tensor in self._graph_tensors:
            if not tensor.is_current() or tensor.key in restored:
                tensor.restore(restored)
        for module, kind in zip(self._modules, self._kinds, strict=True):
            if type(module) is not kind:
                object.__setattr__(module, "__class__", kind)
        for parameter, requires_grad in zip(self._parameters, self._require_gradients, strict=True):
            if parameter.requires_grad is not requires_grad:
                parameter.requires_grad_(requires_grad)

    @contextlib.contextmanager
    def restored(self, arguments: Sequence[Tensor] = ()) -> Iterator[None]:
        """A context in which the modules have this state; afterwards the present one returns, whatever runs within.

        `arguments` are the tensors in the arguments of a repeated call.
        """
        contents = Contents(self._partial)
        try:
            with self._restored_values(arguments):
                yield
        finally:
            contents.restore()

    @contextlib.contextmanager
    def _restored_values(self, arguments: Sequence[Tensor]) -> Iterator[None]:
        if self.are_current():
            # The present values that this state does not hold.
            others = [each for now in self._partial for each in (now, now.copy())]
            try:
                yield
            finally:
                if not (self.are_current() and _are_same_dicts(others)):
                    self.restore()
                    for now, before in _pairs(others):
                        _restore(now, before)
            return
        present = ModuleStates(self._modules, self._parameters, copies_of(self._modules, holds_all=True))
        try:
            self.restore(arguments)
            yield
        finally:
            present.restore()


def _lasting_copy(values: Values, partial: list[Values]) -> Values:
    """A copy of a dict, with `NOT_HELD` for values that may hold a graph. `partial` gets a dict with such values."""
    copy = values.copy()
    for name, value in values.items():
        if type(value) not in _PLAIN and name not in OF_TORCH and (not isinstance(value, Tensor) or value.grad_fn):
            copy[name] = NOT_HELD
            if not (partial and partial[-1] is values):
                partial.append(values)
    return copy


def _pairs(dicts: list[Values]) -> Iterator[tuple[Values, Values]]:
    return zip(dicts[::2], dicts[1::2], strict=True)


def _restore(now: Values, before: Values) -> None:
    if _are_same_dicts([now, before]):
        return
    for name in now.keys() - before.keys():
        del now[name]
    now.update((name, value) for name, value in before.items() if value is not NOT_HELD)


def _are_same_dicts(dicts: list[Values]) -> bool:
    """Whether each dict has the names of the copy after it, in the same order, and the values that the copy holds."""
    if direct.thin_module is not None:
        return direct.thin_module.are_same_dicts(dicts, NOT_HELD)
    return all(_has_items_of(now, before) for now, before in _pairs(dicts))


def _has_items_of(now: Values, before: Values) -> bool:
    if len(now) != len(before):
        return False
    items = zip(now.items(), before.items(), strict=True)
    return all(a == c and (b is d or d is NOT_HELD) for (a, b), (c, d) in items)
