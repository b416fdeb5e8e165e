"""Modules that come into a model after it was converted: adapters with their dropouts, another norm.

They are seen when the forward of the model begins, so that it makes no difference which came first. Torch's own classes
are looked for, of which it is known what they compute, and what has been seen once is not asked about again; adapters,
of anybody's classes, where there are more modules or fewer than before.
"""

import abc
import weakref
from collections.abc import Iterable

import torch
from torch import nn

from .rules.likeness import ACTIVATIONS, NORMS

# By their very class. What is none of ours to compute is looked at once.
LATE_CLASSES = frozenset(kind for kind in vars(nn).values() if isinstance(kind, type) and issubclass(kind, NORMS)) | {
    *ACTIVATIONS,
    nn.Dropout,
    nn.GLU,
}


class LateConversion(abc.ABC):
    """How a conversion goes on, for the modules that come later. `known` are those that it has seen, of torch's
    classes and adapters; `sizes`, for each module whose forward looks for them, how many modules were in it when
    adapters were last looked for."""

    known: "set[weakref.ref[nn.Module]]"
    sizes: "weakref.WeakKeyDictionary[nn.Module, int]"

    @abc.abstractmethod
    def is_of(self, module: nn.Module) -> bool:
        """Whether it is that of this model, and not of one that this is part of."""

    @abc.abstractmethod
    def begin(self, model: nn.Module) -> None:
        """From now on the forward of that model, a copy of the one that was converted, looks for what came later."""

    @abc.abstractmethod
    def convert(self, modules: list[nn.Module]) -> None:
        """Converts them as it would have when it began."""

    @abc.abstractmethod
    def convert_adapters(self) -> None:
        """Converts the adapters in the model as it would have when it began."""


_by_module: "weakref.WeakKeyDictionary[nn.Module, LateConversion]" = weakref.WeakKeyDictionary()


def set_late_conversion(modules: Iterable[nn.Module], later: LateConversion) -> None:
    """From now on the forwards of these modules look for what came later."""
    _by_module.update(dict.fromkeys(modules, later))


def late_conversion_of(module: nn.Module) -> LateConversion | None:
    """How the conversion of a module goes on, if it does."""
    return _by_module.get(module)


def remove_late_conversion(module: nn.Module) -> None:
    """Its conversion does not go on."""
    _by_module.pop(module, None)


def module_entries(model: nn.Module) -> list[nn.Module | None]:
    """The model and all that is in it, some of it more than once, and None where nothing is."""
    found: list[nn.Module | None] = [model]
    seen: set[nn.Module] = set()
    for module in found:
        # A module may be below itself.
        if module is not None and (children := module.__dict__["_modules"]) and module not in seen:
            seen.add(module)
            found += children.values()
    return found


def convert_late_modules(model: nn.Module) -> None:
    """Has what came later converted. For each call, so that it is to be fast."""
    # What runs again in a backward pass, as checkpoints do, is to be what ran.
    if (later := late_conversion_of(model)) is None or torch._C._current_graph_task_id() != -1:
        return
    modules = module_entries(model)
    # The usual case ends here, with one operation over all modules.
    if not LATE_CLASSES.isdisjoint(map(type, modules)):
        found = [module for module in modules if module is not None and type(module) in LATE_CLASSES]
        if not later.known.issuperset(map(weakref.ref, found)):
            later.convert([module for module in found if weakref.ref(module) not in later.known])
    if later.sizes.get(model) != len(modules):
        later.sizes[model] = len(modules)
        later.convert_adapters()
