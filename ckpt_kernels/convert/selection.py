"""Which modules of a model a conversion may touch."""

import fnmatch
from collections.abc import Iterable

from torch import nn

Choice = Iterable[str | type[nn.Module]] | None


class Selection:
    """Modules by name (with * and ?) or by class, each with all that is below it.

    Raises ValueError for a name that fits no module of the model, TypeError for what is neither name nor class.
    """

    def __init__(self, model: nn.Module, include: Choice, exclude: Choice) -> None:
        self._included = None if include is None else _matches(model, include, "include")
        self._excluded = _matches(model, exclude or (), "exclude")

    def covers(self, name: str) -> bool:
        """Whether the module of that name may be touched."""
        if _is_within(name, self._excluded):
            return False
        return self._included is None or _is_within(name, self._included)

    def left_alone_below(self, name: str, module: nn.Module) -> list[str]:
        """Names, from there, of the modules below that may not be touched."""
        prefix = f"{name}." if name else ""
        return [below for below, _ in module.named_modules() if below and not self.covers(prefix + below)]


def _matches(model: nn.Module, choice: Iterable[str | type[nn.Module]], argument: str) -> set[str]:
    if isinstance(choice, str | type):
        choice = [choice]
    names = dict(model.named_modules(remove_duplicate=False))
    found: set[str] = set()
    for wanted in choice:
        if isinstance(wanted, str):
            fitting = set(fnmatch.filter(names, wanted))
            if not fitting:
                raise ValueError(f"{argument} names {wanted!r}; expected a name, with * and ?, that fits a module")
        elif isinstance(wanted, type) and issubclass(wanted, nn.Module):
            fitting = {name for name, module in names.items() if isinstance(module, wanted)}
        else:
            raise TypeError(f"{argument} has {wanted!r}; expected names or classes of modules")
        found |= fitting
    return found


def _is_within(name: str, roots: set[str]) -> bool:
    if "" in roots:
        return True
    parts = name.split(".")
    return any(".".join(parts[: i + 1]) in roots for i in range(len(parts)))
