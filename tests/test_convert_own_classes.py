"""Modules whose own code reads their class, which therefore stays; and the report's reasons."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor, nn

import ckpt_kernels
from ckpt_kernels.convert.swap import reader_of_class

from .conversion import WIDTH, reason_of

BACKENDS: dict[type, str] = {}


class Initialized(nn.Module):
    """A module with a method that compares the classes of other modules, and with one that compares its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.act, self.last = nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH)
        self.apply(self.initialize)

    def initialize(self, module: nn.Module) -> None:
        if type(module) in {nn.Linear}:
            nn.init.ones_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.act(self.first(x)))


class OwnInitialized(Initialized):
    def initialize(self, module: nn.Module) -> None:
        self.is_initialized = type(module) is OwnInitialized


@pytest.mark.parametrize("kind, is_converted", [(Initialized, True), (OwnInitialized, False)])
def test_a_method_that_compares_other_classes_does_not_tell_its_own(kind: type, is_converted: bool) -> None:
    ckpt_kernels.convert(module := kind())
    assert (type(module) is not kind) is is_converted


class Registering(Initialized):
    """Its class stays: a method hands the class on."""

    def save(self) -> list[type]:
        return [type(self)]


class RegisteredByHook(Initialized):
    """The constructor alone names the private method, which runs after each forward."""

    def __init__(self) -> None:
        super().__init__()
        self.register_forward_hook(self._register)

    def _register(self, *_: Any) -> None:
        BACKENDS[type(self)] = "registered"


class Sized(Initialized):
    """A method that Python calls, and that the constructor names."""

    def __init__(self) -> None:
        super().__init__()
        self.size = self.__len__()

    def __len__(self) -> int:
        return len(BACKENDS.get(type(self), ""))


def compares(module: nn.Module) -> bool:
    return type(module) is Holding


def compares_others(module: nn.Module) -> bool:
    return type(module) is nn.LayerNorm


class Comparer:
    def __call__(self, module: nn.Module) -> bool:
        return type(module) is Holding

    def own(self, module: nn.Module) -> bool:
        return type(module) is Holding

    def others(self, module: nn.Module) -> bool:
        return type(module) is nn.LayerNorm


class Holding(Initialized):
    """Passes itself to what `held` is."""

    def __init__(self, held: Any) -> None:
        super().__init__()
        self.held = held

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + float(self.held(self))


UNREAD: dict[str, Any] = {}
exec("def forward(self, x):\n    return self.last(x) if type(self).__name__ else x", UNREAD)
READERS = {
    "a hook": (RegisteredByHook, "_register"),
    "by Python": (Sized, "__len__"),
    "a function": (lambda: Holding(compares), "held"),
    "a function of other classes": (lambda: Holding(compares_others), ""),
    "an object": (lambda: Holding(Comparer()), "held"),
    "an object in a list": (lambda: Holding([Comparer()]), "held"),
    "a method": (lambda: Holding(Comparer().own), "held"),
    "a method of other classes": (lambda: Holding(Comparer().others), ""),
    "code without a source": (type("Unread", (Initialized,), {"forward": UNREAD["forward"]}), "forward"),
}


@pytest.mark.parametrize("name", READERS)
def test_which_code_reads_the_class_of_its_module(name: str) -> None:
    make, reader = READERS[name]
    assert reader_of_class(make()) == reader


class Copied(Initialized):
    """A function of the standard library gets the module."""

    def forward(self, x: Tensor) -> Tensor:
        return super(Copied, copy.copy(self)).forward(x)


def test_the_standard_library_does_not_tell_the_class_of_a_module() -> None:
    assert not reader_of_class(Copied())


@pytest.mark.parametrize("around", [lambda module: module, lambda module: nn.Sequential(module, nn.ReLU())])
def test_the_report_names_what_reads_the_class(around: Callable[[nn.Module], nn.Module]) -> None:
    model = around(Registering())
    report = ckpt_kernels.convert(model)
    name = "" if isinstance(model, Registering) else "0"
    assert reason_of(report, name) == "keeps its class, which save reads"


@pytest.mark.parametrize("level", ["output", "checkpoint"])
def test_a_level_by_name_leaves_the_reason(level: str) -> None:
    report = ckpt_kernels.convert(nn.Sequential(Registering()), recompute={"0": level})
    assert [entry.reason for entry in report.left_alone if entry.name == "0"] == ["keeps its class, which save reads"]


class Listing(nn.Linear):
    """A module without modules inside, whose class stays."""

    def save(self) -> list[type]:
        return [type(self)]


def test_the_report_names_no_module_without_modules_inside() -> None:
    assert not ckpt_kernels.convert(nn.Sequential(Listing(WIDTH, WIDTH))).left_alone
