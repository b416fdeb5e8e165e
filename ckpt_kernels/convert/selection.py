"""Selects the modules that a conversion may change: by `include`, by `exclude`, and by the code around them."""

from collections.abc import Iterable

from torch import nn

from .code.child_classes import classes_told_inside
from .module_tree import children_of, modules_of, named_modules, names_fitting
from .swap import original_of

Choice = tuple[str | type[nn.Module], ...] | None


class Selection:
    """Modules that are included and not excluded, by name (with * and ?) or by class, each with all modules below.

    A module whose class the forward of a module around tells from subclasses (`type(layer) is nn.LayerNorm`) is not
    selected.
    """

    def __init__(self, model: nn.Module, include: Choice, exclude: Choice) -> None:
        self._included = None if include is None else _chosen(model, include)
        self._excluded = _chosen(model, exclude or ())
        self.inspected = inspected_modules(model)

    def covers(self, module: nn.Module) -> bool:
        """Whether the conversion may change that module."""
        return not self.why_not(module)

    def why_not(self, module: nn.Module) -> str:
        """Why the conversion must not change that module; "" if it may."""
        if module in self._excluded or not (self._included is None or module in self._included):
            return "not selected"
        return "a module around it compares the classes of modules inside" if module in self.inspected else ""


def inspected_modules(model: nn.Module) -> set[nn.Module]:
    """All modules whose class the forward of a module around tells from subclasses, as `type(layer) is nn.LayerNorm`
    does."""
    found: set[nn.Module] = set()
    for module in modules_of(model):
        if (told := classes_told_inside(original_of(module))) != frozenset():
            below = (other for child in children_of(module) for other in modules_of(child))
            found.update(other for other in below if original_of(other) in told)
    return found


def choice_of(model: nn.Module, given: Iterable[str | type[nn.Module]] | None, argument: str) -> Choice:
    """The value of `include` or `exclude` as a tuple of names and classes, or None.

    Raises ValueError for a name that fits no module of the model, TypeError for anything but names and classes.
    """
    if given is None:
        return None
    if not isinstance(given, Iterable) and not isinstance(given, type):
        raise TypeError(f"{argument} is {type(given).__name__}; expected names or classes of modules, or None")
    choice = (given,) if isinstance(given, str | type) else tuple(given)
    for wanted in choice:
        if isinstance(wanted, str):
            if not names_fitting(dict(named_modules(model, duplicates=True)), wanted):
                raise ValueError(f"{argument} names {wanted!r}; expected a name, with * and ?, that fits a module")
        elif not (isinstance(wanted, type) and issubclass(wanted, nn.Module)):
            raise TypeError(f"{argument} has {wanted!r}; expected names or classes of modules")
    return choice


def _chosen(model: nn.Module, choice: tuple[str | type[nn.Module], ...]) -> set[nn.Module]:
    named = dict(named_modules(model, duplicates=True))
    chosen: set[nn.Module] = set()
    for wanted in choice:
        if isinstance(wanted, str):
            fitting = [named[name] for name in names_fitting(named, wanted)]
        else:
            fitting = [module for module in named.values() if isinstance(module, wanted)]
        for module in fitting:
            chosen.update(modules_of(module))
    return chosen
