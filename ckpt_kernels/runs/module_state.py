"""The state of a layer's modules that a repeated call must find as the first call did: classes, attributes, parameters
and whether they require gradients, buffers, children and hooks.

A state holds the attributes themselves and no copies. So a tensor that the forward pass replaces, such as the hidden
state of a recurrent layer, is kept until the state goes, with the backward pass.
"""

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
            self._dicts.append((own, own.copy()))
            for name in _CONTAINERS:
                if (container := own.get(name)) is not None:
                    self._dicts.append((container, container.copy() if container else _EMPTY))

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
            if not _have_same_items(now, before):
                # Another thread may read the dict, which therefore is emptied only to restore the names' order.
                if list(now) != list(before):
                    now.clear()
                now.update(before)
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


_EMPTY: dict[str, Any] = {}


def _are_same_dicts(pairs: list[tuple[dict[str, Any], dict[str, Any]]]) -> bool:
    if direct.thin_module is not None:
        return direct.thin_module.are_same_dicts(pairs)
    return all(_have_same_items(now, before) for now, before in pairs)


def _have_same_items(now: dict[str, Any], before: dict[str, Any]) -> bool:
    """Whether two dicts hold the same objects under the same names, in the same order."""
    if len(now) != len(before):
        return False
    return all(a is c and b is d for (a, b), (c, d) in zip(now.items(), before.items(), strict=True))
