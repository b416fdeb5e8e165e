"""The state of a layer's modules that a repeated call must find as the first call did: classes, parameters and whether
they require gradients, buffers, children, hooks, and attributes that are numbers, strings or tensors without a graph.

A state holds the values and no copies, so a tensor that the forward pass replaces, such as the hidden state of a
recurrent layer, is kept until the backward pass. Tensors with a graph are not held: in a graph that no backward pass
frees, each call would hold the graph of the call before. Lists and other objects may hold such tensors.
"""

import collections
import contextlib
import operator
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from ..thin import direct

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
_requires_grad = operator.attrgetter("requires_grad")


class ModuleStates:
    """The state of several modules at one time, without the modules below them.

    Args:
        modules: the modules.
        parameters: the parameters of these modules.
    """

    __slots__ = ("_dicts", "_kinds", "_modules", "_parameters", "_require_gradients")

    def __init__(self, modules: Sequence[nn.Module], parameters: Sequence[Tensor]) -> None:
        self._modules, self._kinds = modules, list(map(type, modules))
        self._parameters, self._require_gradients = parameters, list(map(_requires_grad, parameters))
        # Each dict with a copy.
        self._dicts: list[tuple[dict[str, Any], dict[str, Any]]] = []
        for module in modules:
            own = vars(module)
            self._dicts.append((own, _held(own)))
            for name in _CONTAINERS:
                # Scripted modules, for one, have objects of another type here, which are not restored.
                container: Any = own.get(name)
                if type(container) in _DICTS:
                    copy = _EMPTY if not container else _held(container) if name == "_buffers" else container.copy()
                    self._dicts.append((container, copy))

    def are_current(self) -> bool:
        """Whether the modules still have this state."""
        return (
            _are_same_dicts(self._dicts)
            and list(map(type, self._modules)) == self._kinds
            and list(map(_requires_grad, self._parameters)) == self._require_gradients
        )

    def restore(self) -> None:
        """Give the modules this state."""
        for now, before in self._dicts:
            if _has_items_of(now, before):
                continue
            values = {name: now.get(name) if value is _ANY else value for name, value in before.items()}
            # Another thread may read the dict, which therefore is emptied only to restore the names' order.
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
        now = self if self.are_current() else ModuleStates(self._modules, self._parameters)
        if now is not self:
            self.restore()
        try:
            yield
        finally:
            if not now.are_current():
                now.restore()


_DICTS = (dict, collections.OrderedDict)
_EMPTY: dict[str, Any] = {}
# Stands for a value that is not held.
_ANY = object()
_PLAIN = frozenset({type(None), bool, int, float, complex, str, bytes})
_OF_TORCH = frozenset(vars(nn.Module()))


def _held(values: dict[str, Any]) -> dict[str, Any]:
    """A copy of a dict of attributes, without the values that a state does not hold."""
    copy = values.copy()
    for name, value in values.items():
        if type(value) not in _PLAIN and name not in _OF_TORCH and (not isinstance(value, Tensor) or value.grad_fn):
            copy[name] = _ANY
    return copy


def _are_same_dicts(pairs: list[tuple[dict[str, Any], dict[str, Any]]]) -> bool:
    if direct.thin_module is not None:
        return direct.thin_module.are_same_dicts(pairs, _ANY)
    return all(_has_items_of(now, before) for now, before in pairs)


def _has_items_of(now: dict[str, Any], before: dict[str, Any]) -> bool:
    """Whether a dict has the names of a copy, in the same order, and the values that the copy holds."""
    if len(now) != len(before):
        return False
    return all(a == c and (b is d or d is _ANY) for (a, b), (c, d) in zip(now.items(), before.items(), strict=True))
