"""The state of a layer's modules that a repeated call must find as the first call did: classes, parameters and whether
they require gradients, buffers, children, hooks, and attributes that are numbers, strings or tensors without a graph.

A state holds the values and no copies, so a tensor that the forward pass replaces, such as the hidden state of a
recurrent layer, is kept until the backward pass. Tensors with a graph are not held: in a graph that no backward pass
frees, each call would hold the graph of the call before. Lists and other objects may hold such tensors.
"""

import collections
import contextlib
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from ..thin import direct

Values = dict[str, Any]

# The dicts of a module that torch changes in place.
_CONTAINERS = (
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
_NOT_HELD = object()
_PLAIN = frozenset({type(None), bool, int, float, complex, str, bytes})
_OF_TORCH = frozenset(vars(nn.Module()))
_requires_grad = operator.attrgetter("requires_grad")


class ModuleStates:
    """The state of several modules at one time, without the modules below them.

    Args:
        modules: the modules.
        parameters: the parameters of these modules.
        copy_of: copies a dict of attributes or buffers.
    """

    __slots__ = ("_attributes", "_containers", "_kinds", "_modules", "_parameters", "_require_gradients")

    def __init__(
        self,
        modules: Sequence[nn.Module],
        parameters: Sequence[Tensor],
        copy_of: Callable[[Values], Values] | None = None,
    ) -> None:
        copy_of = _lasting_copy if copy_of is None else copy_of
        self._modules, self._kinds = modules, list(map(type, modules))
        self._parameters, self._require_gradients = parameters, list(map(_requires_grad, parameters))
        # Each dict with a copy.
        self._attributes: list[tuple[Values, Values]] = []
        self._containers: list[tuple[Values, Values]] = []
        for module in modules:
            own = vars(module)
            self._attributes.append((own, copy_of(own)))
            for name in _CONTAINERS:
                # Scripted modules, for one, have objects of another type here, which are not restored.
                container: Any = own.get(name)
                if type(container) in _DICTS:
                    copy = _EMPTY if not container else copy_of(container) if name == "_buffers" else container.copy()
                    self._containers.append((container, copy))

    def are_current(self) -> bool:
        """Whether the modules still have this state, whatever the values that are not held."""
        return (
            _are_same_dicts(self._attributes)
            and _are_same_dicts(self._containers)
            and list(map(type, self._modules)) == self._kinds
            and list(map(_requires_grad, self._parameters)) == self._require_gradients
        )

    def restore(self) -> None:
        """Give the modules this state."""
        for now, before in self._attributes:
            _restore(now, before)
        for now, before in self._containers:
            _restore(now, before)
            # Another thread may read the dict, which therefore is emptied only to restore the order.
            values = {name: now[name] for name in before if name in now}
            if list(now) != list(values):
                now.clear()
                now.update(values)
        for module, kind in zip(self._modules, self._kinds, strict=True):
            if type(module) is not kind:
                object.__setattr__(module, "__class__", kind)
        for parameter, requires_grad in zip(self._parameters, self._require_gradients, strict=True):
            if parameter.requires_grad is not requires_grad:
                parameter.requires_grad_(requires_grad)

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """A context in which the modules have this state; afterwards the present one returns, whatever runs within."""
        if self.are_current():
            # The present values that this state does not hold.
            others = [
                (now, now.copy()) for now, before in self._attributes + self._containers if _holds_not_all(before)
            ]
            try:
                yield
            finally:
                if not (self.are_current() and _are_same_dicts(others)):
                    self.restore()
                    for now, before in others:
                        _restore(now, before)
            return
        present = ModuleStates(self._modules, self._parameters, dict.copy)
        try:
            self.restore()
            yield
        finally:
            present.restore()


def _lasting_copy(values: Values) -> Values:
    """A copy of a dict of attributes, with `_NOT_HELD` for values that may hold a graph."""
    copy = values.copy()
    for name, value in values.items():
        if type(value) not in _PLAIN and name not in _OF_TORCH and (not isinstance(value, Tensor) or value.grad_fn):
            copy[name] = _NOT_HELD
    return copy


def _holds_not_all(before: Values) -> bool:
    return any(value is _NOT_HELD for value in before.values())


def _restore(now: Values, before: Values) -> None:
    if _are_same_dicts([(now, before)]):
        return
    for name in now.keys() - before.keys():
        del now[name]
    now.update((name, value) for name, value in before.items() if value is not _NOT_HELD)


def _are_same_dicts(pairs: list[tuple[Values, Values]]) -> bool:
    """Whether each dict has the names of its copy, in the same order, and the values that the copy holds."""
    if direct.thin_module is not None:
        return direct.thin_module.are_same_dicts(pairs, _NOT_HELD)
    return all(_has_items_of(now, before) for now, before in pairs)


def _has_items_of(now: Values, before: Values) -> bool:
    if len(now) != len(before):
        return False
    items = zip(now.items(), before.items(), strict=True)
    return all(a == c and (b is d or d is _NOT_HELD) for (a, b), (c, d) in items)
