"""Converts modules that are added to a model after its conversion: the implementation of `late_modules`."""

import contextlib
import copy
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping

from torch import nn

from ..levels import NONE
from .adapters import is_adapter
from .code.memoization import shared_results
from .late_modules import LATE_CLASSES, module_entries, set_late_conversion
from .module_tree import modules_of, named_modules, nearest
from .report import LeftAlone, Replaced
from .rewriting.methods import adapter_of
from .rules.leaves import LeafConverter
from .rules.pointwise import is_unmodified_torch
from .selection import Choice, Selection
from .swap import may_be_swapped, original_of, rule_of

_lock = threading.Lock()


class LateConversion:
    """The conversion of a model, continued with the choices that it began with.

    A module of torch's own classes is converted by class, an adapter by the source of the methods. No trials run, and
    no code of the model runs, because this happens within a training step.

    `seen` are the modules of `LATE_CLASSES` and the adapters that were examined already, converted or not; `sizes` has,
    for each module whose forward looks for added modules, the number of modules inside at the last search for adapters.

    Args:
        include, exclude: the choices that `convert` was given.
        replaced, left_alone: the lists of the conversion's report, which are continued.
        levels: recompute levels by names of modules, each for all modules below that name.
    """

    def __init__(
        self,
        include: Choice,
        exclude: Choice,
        seen: Iterable[nn.Module],
        replaced: list[Replaced],
        left_alone: list[LeftAlone],
        levels: Mapping[str, str],
    ) -> None:
        self.seen = set(map(weakref.ref, seen))
        self.sizes: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()
        self._levels = levels
        self._choices = include, exclude
        self._replaced = replaced
        self._left_alone = left_alone
        self._model: Callable[[], nn.Module | None] = lambda: None

    def __reduce__(self) -> tuple:
        """For copies of the model: the copy of each seen module counts as seen."""
        model = self._model()
        modules = modules_of(model) if model is not None else ()
        seen = [module for module in modules if weakref.ref(module) in self.seen]
        return LateConversion, (*self._choices, seen, [], [], self._levels)

    def belongs_to(self, module: nn.Module) -> bool:
        """Whether `module` is the model itself, and not a part of the model."""
        return self._model() is module

    def begin(self, model: nn.Module, *others: nn.Module) -> None:
        """Make calls of the model, and of the modules `others` in it, look for added modules from now on."""
        if self._model() is not None:
            # The model is a shallow copy, whose state holds the conversion of the first model.
            copy.copy(self).begin(model, *others)
            return
        self._model = weakref.ref(model)
        self.sizes.update((module, len(module_entries(module))) for module in (model, *others))
        set_late_conversion((model, *others), self)

    def convert(self, modules: list[nn.Module]) -> None:
        """Converts these modules as the conversion of the model would have done."""
        model = self._model()
        with _lock:
            new = [module for module in dict.fromkeys(modules) if weakref.ref(module) not in self.seen]
            self.seen = {module for module in self.seen if module() is not None} | set(map(weakref.ref, new))
            # A module that does not run torch's own forward would need a trial.
            new = [module for module in new if type(module) in LATE_CLASSES and is_unmodified_torch(module)]
            if model is not None and new:
                with self._converter(model) as (converter, names):
                    for module in new:
                        if module in names and self._level_of(names[module]) != NONE:
                            converter.convert(names[module], module)

    def convert_adapters(self) -> None:
        """Converts the adapters in the model as the conversion of the model would have done."""
        model = self._model()
        with _lock:
            if model is None:
                return
            with self._converter(model) as (converter, names):
                new = [module for module in names if weakref.ref(module) not in self.seen and is_adapter(module)]
                self.seen |= set(map(weakref.ref, new))
                for module in new:
                    level = self._level_of(names[module])
                    if level == NONE or not converter.selection.covers(module) or not may_be_swapped(module):
                        continue
                    if rule_of(module) is None and (rule := adapter_of(module, level)):
                        converter.apply(names[module], module, rule)

    @contextlib.contextmanager
    def _converter(self, model: nn.Module) -> Iterator[tuple[LeafConverter, dict[nn.Module, str]]]:
        """A converter of the model's modules, and their names."""
        names = {module: name for name, module in named_modules(model)}
        with shared_results():
            yield LeafConverter(Selection(model, *self._choices), self._replaced, self._left_alone), names

    def _level_of(self, name: str) -> str:
        """The level of that module; without one, the level of the nearest module around that has one."""
        return self._levels[nearest(name, self._levels)]


def late_candidates(model: nn.Module) -> Iterable[nn.Module]:
    """The modules of `LATE_CLASSES` in the model, converted or not, and its adapters."""
    return (module for module in modules_of(model) if original_of(module) in LATE_CLASSES or is_adapter(module))
