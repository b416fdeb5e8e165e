"""The state of modules that a repeated call must find as the first call did: class, plain attributes, parameters and
whether they require gradients, buffers, children and hooks."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

# Attributes of these types are restored: numbers, switches such as `training`, and names. Other values may hold tensors
# that nothing else needs any more, and so are read as they are.
_PLAIN = frozenset({type(None), bool, int, float, complex, str, bytes})
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


class ModuleState:
    """The state of one module at one time, without the modules below.

    Args:
        module: the module.
        types: only attributes of these types; None for all.
    """

    __slots__ = ("_attributes", "_containers", "_kind", "_module", "_names", "_require_gradients")

    def __init__(self, module: nn.Module, types: frozenset[type] | None = _PLAIN) -> None:
        own = vars(module)
        self._module, self._kind = module, type(module)
        self._names = frozenset(own)
        self._attributes = {name: value for name, value in own.items() if types is None or type(value) in types}
        self._containers = {name: own[name].copy() for name in _CONTAINERS if own.get(name)}
        self._require_gradients = [(p, p.requires_grad) for p in own["_parameters"].values() if p is not None]

    def restore(self) -> None:
        """Give the module this state. Nothing is written where the state is the same."""
        own = vars(self._module)
        for name in own.keys() - self._names:
            del own[name]
        for name, value in self._attributes.items():
            if name not in own or own[name] is not value:
                own[name] = value
        for name in _CONTAINERS:
            container, before = own[name], self._containers.get(name, {})
            if not _are_same(container, before):
                container.clear()
                container.update(before)
        for parameter, requires_grad in self._require_gradients:
            if parameter.requires_grad is not requires_grad:
                parameter.requires_grad_(requires_grad)
        if type(self._module) is not self._kind:
            object.__setattr__(self._module, "__class__", self._kind)


def _are_same(some: dict[Any, Any], others: dict[Any, Any]) -> bool:
    """Whether two dicts hold the same objects in the same order."""
    if len(some) != len(others):
        return False
    return all(a is c and b is d for (a, b), (c, d) in zip(some.items(), others.items(), strict=True))


@contextlib.contextmanager
def restored(states: Sequence[ModuleState]) -> Iterator[None]:
    """Within the context modules have an earlier state; afterwards the state they have now, whatever runs within."""
    now = [ModuleState(state._module, types=None) for state in states]
    try:
        for state in states:
            state.restore()
        yield
    finally:
        for state in now:
            state.restore()
