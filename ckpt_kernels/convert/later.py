"""How a conversion goes on, for modules that come into the model after it: see `noticing`."""

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping

from torch import nn

from ..levels import NONE
from .adapters import is_adapter
from .code.in_place_writes import in_place_writer
from .code.memoization import forget_local_results
from .loads import modules_of, named_modules
from .noticing import LOOKED_FOR, Later, below, go_on
from .report import LeftAlone, Replaced
from .rewriting.methods import adapter_of
from .rules.leaves import Leaves
from .rules.pointwise import is_as_torch_has_it
from .selection import Choice, Selection
from .swap import may_be_swapped, original_of, rule_of

_one_at_a_time = threading.Lock()


class Continued(Later):
    """The conversion of a model with these choices; the lists are those of its report, `levels` the levels of modules
    with all that comes into them, by name.

    What comes later is known by its class, or noted: nothing is tried out, and no code of the model's runs.
    """

    def __init__(
        self,
        include: Choice,
        exclude: Choice,
        known: Iterable[nn.Module],
        replaced: list[Replaced],
        left_alone: list[LeftAlone],
        levels: Mapping[str, str],
    ) -> None:
        self.known = set(map(weakref.ref, known))
        self.sizes = weakref.WeakKeyDictionary()
        self._levels = levels
        self._choices = include, exclude
        self._replaced = replaced
        self._left_alone = left_alone
        self._model: Callable[[], nn.Module | None] = lambda: None

    def __reduce__(self) -> tuple:
        """For copies of the model: they have seen what this one has."""
        model = self._model()
        modules = modules_of(model) if model is not None else ()
        known = [module for module in modules if weakref.ref(module) in self.known]
        return Continued, (*self._choices, known, [], [], self._levels)

    def is_of(self, module: nn.Module) -> bool:
        return self._model() is module

    def begin(self, model: nn.Module, *others: nn.Module) -> None:
        """From now on the forwards of the model, and of `others` in it, look for modules that come later."""
        self._model = weakref.ref(model)
        self.sizes.update((module, len(below(module))) for module in (model, *others))
        go_on((model, *others), self)

    def convert(self, modules: list[nn.Module]) -> None:
        model = self._model()
        with _one_at_a_time:
            new = [module for module in dict.fromkeys(modules) if weakref.ref(module) not in self.known]
            self.known = {known for known in self.known if known() is not None} | set(map(weakref.ref, new))
            # Of another, a trial would say what it computes.
            new = [module for module in new if type(module) in LOOKED_FOR and is_as_torch_has_it(module)]
            if model is not None and new:
                with self._leaves(model) as (leaves, names):
                    leaves.writer = in_place_writer(model)
                    for module in new:
                        if module in names and self._level_of(names[module]) != NONE:
                            leaves.convert(names[module], module)

    def convert_adapters(self) -> None:
        model = self._model()
        with _one_at_a_time:
            if model is None:
                return
            with self._leaves(model) as (leaves, names):
                new = [module for module in names if weakref.ref(module) not in self.known and is_adapter(module)]
                self.known |= set(map(weakref.ref, new))
                for module in new:
                    level = self._level_of(names[module])
                    if level == NONE or not leaves.selection.covers(module) or not may_be_swapped(module):
                        continue
                    if rule_of(module) is None and (rule := adapter_of(module, level)):
                        leaves.apply(names[module], module, rule)

    @contextlib.contextmanager
    def _leaves(self, model: nn.Module) -> Iterator[tuple[Leaves, dict[nn.Module, str]]]:
        """What converts the model's modules, and their names."""
        names = {module: name for name, module in named_modules(model)}
        try:
            yield Leaves(Selection(model, *self._choices), "", self._replaced, self._left_alone), names
        finally:
            forget_local_results()

    def _level_of(self, name: str) -> str:
        """That of the module, or of the nearest that it is in. "layer" is "all" within."""
        while name and name not in self._levels:
            name = name.rpartition(".")[0]
        return self._levels[name]


def looked_for(model: nn.Module) -> Iterable[nn.Module]:
    """The modules of the classes that are looked for, converted or not, and adapters."""
    return (module for module in modules_of(model) if original_of(module) in LOOKED_FOR or is_adapter(module))
