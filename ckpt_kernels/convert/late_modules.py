"""Finds modules that are added to a model after the conversion, such as adapters with their dropouts, or a new norm.

The forward of a converted model begins with the search, so that the order of conversion and addition makes no
difference. Two kinds are looked for: modules of torch's own classes, by their exact class, each of which is examined
once; and adapters, of any class, whenever the number of modules in the model has changed.
"""

import weakref
from collections.abc import Iterable
from typing import Protocol

import torch
from torch import nn

from .rules.likeness import ACTIVATIONS, NORMS

# The classes of torch.nn whose instances are examined when they are added.
LATE_CLASSES = frozenset(kind for kind in vars(nn).values() if isinstance(kind, type) and issubclass(kind, NORMS)) | {
    *ACTIVATIONS,
    nn.Dropout,
    nn.GLU,
}


class ContinuedConversion(Protocol):
    """What a forward needs of the conversion that it continues: see `late_conversion`."""

    seen: set["weakref.ref[nn.Module]"]
    sizes: "weakref.WeakKeyDictionary[nn.Module, int]"

    def belongs_to(self, module: nn.Module) -> bool: ...

    def begin(self, model: nn.Module, *others: nn.Module) -> None: ...

    def convert(self, modules: list[nn.Module]) -> None: ...

    def convert_adapters(self) -> None: ...


_by_module: "weakref.WeakKeyDictionary[nn.Module, ContinuedConversion]" = weakref.WeakKeyDictionary()


def set_late_conversion(modules: Iterable[nn.Module], conversion: ContinuedConversion) -> None:
    """Has the forwards of these modules look for added modules, and convert them by `conversion`."""
    _by_module.update(dict.fromkeys(modules, conversion))


def late_conversion_of(module: nn.Module) -> ContinuedConversion | None:
    """The late conversion that the forward of this module runs, or None."""
    return _by_module.get(module)


def remove_late_conversion(module: nn.Module) -> None:
    """Undoes `set_late_conversion` for one module."""
    _by_module.pop(module, None)


def module_entries(model: nn.Module) -> list[nn.Module | None]:
    """The model and every entry of the `_modules` below it: with repetitions, and with None for empty entries."""
    entries: list[nn.Module | None] = [model]
    seen: set[nn.Module] = set()
    for module in entries:
        # `seen` ends the loop where a module contains itself.
        # A scripted or traced module holds its modules elsewhere. It is left alone, and so are those.
        if module is not None and (children := module.__dict__.get("_modules")) and module not in seen:
            seen.add(module)
            entries += children.values()
    return entries


def convert_late_modules(model: nn.Module) -> None:
    """Converts the modules that were added since the last call. Runs before every forward, and must be fast."""
    # A forward that runs again within a backward pass, as in a checkpoint, must equal the first one.
    if (conversion := late_conversion_of(model)) is None or torch._C._current_graph_task_id() != -1:
        return
    entries = module_entries(model)
    # Usually nothing was added, and one set operation over all classes is enough.
    if not LATE_CLASSES.isdisjoint(map(type, entries)):
        candidates = [module for module in entries if module is not None and type(module) in LATE_CLASSES]
        if not conversion.seen.issuperset(map(weakref.ref, candidates)):
            conversion.convert([module for module in candidates if weakref.ref(module) not in conversion.seen])
    if conversion.sizes.get(model) != len(entries):
        conversion.sizes[model] = len(entries)
        conversion.convert_adapters()
