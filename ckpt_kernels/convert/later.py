"""How a conversion goes on, for modules that come into the model after it: see `noticing`."""

import threading
import weakref
from collections.abc import Callable, Iterable

from torch import nn

from .leaves import Leaves
from .loads import modules_of, named_modules
from .noticing import LOOKED_FOR, Later, go_on
from .pointwise import is_as_torch_has_it
from .remembering import forget_what_is_local
from .report import LeftAlone, Replaced
from .selection import Choice, Selection
from .swap import original_of
from .writes import writer_in

_one_at_a_time = threading.Lock()


class Continued(Later):
    """The conversion of a model with these choices; the lists are those of its report, `as_they_are` the names of
    modules that stay as they are with all that comes into them.

    What comes later is known by its class: nothing is tried out, and no code of the model's runs.
    """

    def __init__(
        self,
        include: Choice,
        exclude: Choice,
        known: Iterable[nn.Module],
        replaced: list[Replaced],
        left_alone: list[LeftAlone],
        as_they_are: tuple[str, ...] = (),
    ) -> None:
        self.known = set(map(weakref.ref, known))
        self._as_they_are = as_they_are
        self._choices = include, exclude
        self._replaced = replaced
        self._left_alone = left_alone
        self._model: Callable[[], nn.Module | None] = lambda: None

    def __reduce__(self) -> tuple:
        """For copies of the model: they have seen what this one has."""
        model = self._model()
        known = (
            [module for module in looked_for(model) if weakref.ref(module) in self.known] if model is not None else []
        )
        return Continued, (*self._choices, known, [], [], self._as_they_are)

    def is_of(self, module: nn.Module) -> bool:
        return self._model() is module

    def begin(self, model: nn.Module, *others: nn.Module) -> None:
        """And those of `others`, which are in it."""
        self._model = weakref.ref(model)
        go_on((model, *others), self)

    def convert(self, modules: list[nn.Module]) -> None:
        model = self._model()
        with _one_at_a_time:
            new = [module for module in dict.fromkeys(modules) if weakref.ref(module) not in self.known]
            self.known = {known for known in self.known if known() is not None} | set(map(weakref.ref, new))
            # Of another, a trial would say what it computes.
            new = [module for module in new if type(module) in LOOKED_FOR and is_as_torch_has_it(module)]
            if model is None or not new:
                return
            names = {module: name for name, module in named_modules(model)}
            selection = Selection(model, *self._choices)
            leaves = Leaves(selection, "", self._replaced, self._left_alone)
            try:
                leaves.writer = writer_in(model)
                for module in new:
                    if module in names and not self._is_to_stay(names[module]):
                        leaves.convert(names[module], module)
            finally:
                forget_what_is_local()

    def _is_to_stay(self, name: str) -> bool:
        return any(name == above or name.startswith(f"{above}.") for above in self._as_they_are)


def looked_for(model: nn.Module) -> Iterable[nn.Module]:
    """The modules of the classes that are looked for, converted or not."""
    return (module for module in modules_of(model) if original_of(module) in LOOKED_FOR)
