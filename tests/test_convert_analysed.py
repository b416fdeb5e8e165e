"""Analyses of a model's own code: each conversion reads classes and functions as they are then."""

import copy
import importlib
import linecache
import os
import pathlib
import types
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import ckpt_kernels
import ckpt_kernels.runs
from ckpt_kernels.convert.code import call_graph
from ckpt_kernels.convert.code.code_objects import imports_in

from .conversion import WIDTH, replacement_of
from .test_convert_replaced import MLP
from .test_convert_source import twins
from .test_convert_tried import rows


def agrees(kind: type[nn.Module]) -> Any:
    """The report of a conversion, after which the output must be eager's."""
    model, converted = twins(kind)
    report = ckpt_kernels.convert(converted)
    torch.testing.assert_close(converted(rows()), model(rows()))
    return report


SOURCE = """import torch.nn.functional as F
from torch import nn

class Edited(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear({width}, {width}), nn.Linear({width}, {width})

    def forward(self, x):
        return self.down(F.gelu(self.up(x))){factor}
"""


def test_code_that_is_replaced_in_place(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "edited_in_place.py"
    monkeypatch.syspath_prepend(tmp_path)
    path.write_text(SOURCE.format(width=WIDTH, factor=""))
    kind = importlib.import_module(path.stem).Edited
    assert replacement_of(agrees(kind), "") == "MLP"
    source = SOURCE.format(width=WIDTH, factor=" * 10")
    path.write_text(source)
    linecache.clearcache()
    edited: dict[str, Any] = {"__name__": path.stem}
    exec(compile(source, path, "exec"), edited)
    kind.forward.__code__ = edited["Edited"].forward.__code__
    assert replacement_of(agrees(kind), "") == "MLP"


def activation(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def no_activation(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.3 * x)


class OfFunction(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(activation(self.up(x)))


def test_an_activation_whose_code_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    assert replacement_of(agrees(OfFunction), "") == "MLP"
    monkeypatch.setattr(activation, "__code__", no_activation.__code__)
    assert replacement_of(agrees(OfFunction), "") is None
    monkeypatch.undo()
    assert replacement_of(agrees(OfFunction), "") == "MLP"


SCALES: dict[type, float] = {}


class Patched(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.scaled(self.down(self.act(self.up(x))))

    def scaled(self, x: Tensor) -> Tensor:
        return x


def by_class(self: Patched, x: Tensor) -> Tensor:
    return SCALES.get(type(self), 1.0) * x


def test_a_method_that_is_patched_between_two_conversions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SCALES, Patched, 0.5)
    assert replacement_of(agrees(Patched), "") == "MLP"
    monkeypatch.setattr(Patched, "scaled", by_class)
    assert replacement_of(agrees(Patched), "") is None
    monkeypatch.undo()
    assert replacement_of(agrees(Patched), "") == "MLP"


# Code that tells the class of a converted module from the original


def by_class_attached(self: Any, x: Tensor) -> Tensor:
    return SCALES.get(type(self), 1.0) * x


class Attached(MLP):
    """A method that was defined outside the class."""

    scaled = by_class_attached

    def forward(self, x: Tensor) -> Tensor:
        return self.scaled(self.down(self.act(self.up(x))))


def attached_forward(self: Any, x: Tensor) -> Tensor:
    return self.down(self.act(self.up(x))) + super(type(self), self).forward(x)


class AttachedForward(MLP):
    forward = attached_forward


class ByAlias(MLP):
    def forward(self, x: Tensor) -> Tensor:
        me = self
        kind = type(me)
        return SCALES.get(kind, 1.0) * self.down(self.act(self.up(x)))


class Processor:
    def __call__(self, module: nn.Module, x: Tensor) -> Tensor:
        return self.run(module, x)

    def run(self, module: nn.Module, x: Tensor) -> Tensor:
        return SCALES.get(module.__class__, 1.0) * x


class ProcessedBy(MLP):
    def __init__(self, held: Any = None) -> None:
        super().__init__()
        self.held = Processor() if held is None else held

    def forward(self, x: Tensor) -> Tensor:
        return self.held(self, self.down(self.act(self.up(x))))


class ProcessedByFunction(ProcessedBy):
    def __init__(self) -> None:
        super().__init__(lambda module, x: SCALES.get(type(module), 1.0) * x)


class ProcessedByMethod(ProcessedBy):
    def __init__(self) -> None:
        super().__init__(Processor().run)


class ProcessedInList(ProcessedBy):
    def __init__(self) -> None:
        super().__init__([Processor()])

    def forward(self, x: Tensor) -> Tensor:
        return self.held[0].run(self, self.down(self.act(self.up(x))))


class ProcessedByLocal(ProcessedBy):
    def forward(self, x: Tensor) -> Tensor:
        processor = self.held
        return processor(self, self.down(self.act(self.up(x))))


class Child(nn.Module):
    def forward(self, module: nn.Module, x: Tensor) -> Tensor:
        return SCALES.get(type(module), 1.0) * x


class ProcessedByChild(ProcessedBy):
    def __init__(self) -> None:
        super().__init__(Child())


READERS = [
    *(Attached, AttachedForward, ByAlias, ProcessedBy, ProcessedByFunction, ProcessedByMethod, ProcessedInList),
    *(ProcessedByLocal, ProcessedByChild),
]


@pytest.mark.parametrize("kind", READERS)
def test_code_that_reads_the_class(kind: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SCALES, kind, 0.5)
    assert replacement_of(agrees(kind), "") is None


class HarmlessProcessor:
    """A processor that reads its own class, and formats that of the module."""

    def __call__(self, module: nn.Module, x: Tensor) -> Tensor:
        if type(self) is not HarmlessProcessor or type(module).__name__ != "Harmless":
            raise TypeError(f"{type(module)}")
        return x


class Harmless(MLP):
    calls: ClassVar[int] = 3

    def __init__(self) -> None:
        super().__init__()
        self.held = HarmlessProcessor()

    def train(self, mode: bool = True) -> "Harmless":
        kind = type(self)
        if not issubclass(type(self), MLP) or getattr(kind, "calls", 0) != kind.calls:
            raise TypeError(f"{kind}")
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        return self.held(self, self.down(self.act(self.up(x))))


def test_code_that_reads_only_inherited_attributes_of_the_class() -> None:
    assert replacement_of(agrees(Harmless), "") == "MLP"


class FrozenNorm(nn.Module):
    """Methods other than the forward read the class."""

    steps: ClassVar[int] = 0

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up = nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.act, self.down = nn.GELU(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(self.norm(x))))


class TrainsBySuper(FrozenNorm):
    def train(self, mode: bool = True) -> "TrainsBySuper":
        super(self.__class__, self).train(mode)
        self.norm.eval()
        return self


class CountsSteps(FrozenNorm):
    def training_step(self, x: Tensor) -> Tensor:
        type(self).steps += 1
        return SCALES[type(self)] * self(x).square().mean()


def test_methods_of_lightning_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    class Lightning(MLP):
        def hook(self, other: Any) -> bool:
            return isinstance(other, self.__class__)

    assert replacement_of(agrees(Lightning), "") is None
    for module in ("lightning.pytorch.core.module", "pytorch_lightning.core.module"):
        monkeypatch.setattr(Lightning.hook, "__module__", module)
        assert replacement_of(agrees(Lightning), "") == "MLP"


@pytest.mark.parametrize("kind", [TrainsBySuper, CountsSteps])
def test_methods_beside_the_forward_that_read_the_class(kind: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SCALES, kind, 0.5)
    model = kind().eval()
    ckpt_kernels.convert(model)
    model.train()
    if isinstance(model, CountsSteps):
        model.training_step(torch.randn(4, WIDTH)).backward()
        assert kind.steps == 1
        kind.steps = 0


def imports() -> Any:
    import os.path as first
    from collections import abc, deque

    def inner() -> Any:
        from . import conversion
        from .calls import draw

        return conversion, draw

    return first, abc, deque, inner


def test_the_imports_in_code() -> None:
    names = ["os.path", "collections", "collections.abc", "collections.deque"]
    relative = ["tests", "tests.conversion", "tests.calls", "tests.calls.draw"]
    assert list(imports_in(imports.__code__, "tests")) == names + relative
    assert list(imports_in(imports.__code__, None)) == names


def test_imports_after_many_names() -> None:
    # Numbers above 255 take further instructions.
    many = "\n".join(f"name{number}" for number in range(300))
    code = compile(
        f"def function():\n import copy\n {many.replace(chr(10), chr(10) + ' ')}\n from json import loads", "", "exec"
    )
    assert list(imports_in(code, None)) == ["copy", "json", "json.loads"]


def names_modules() -> Any:
    import torch.autograd as of_torch

    from . import conversion

    return of_torch, conversion, ckpt_kernels.runs.run, torch.jit, pathlib.Path


def test_the_modules_that_code_names() -> None:
    function: Any = names_modules
    modules = call_graph._modules_named(function, function.__code__.co_names)
    expected = {"tests", "tests.conversion", "ckpt_kernels", "ckpt_kernels.runs", "ckpt_kernels.runs.run", "pathlib"}
    assert {module.__name__ for module in modules} == expected and len(modules) == len(expected)


class Copies(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return copy.copy(x)


def test_the_standard_librarys_own_calls_do_not_count() -> None:
    assert set(call_graph.reachable_functions(Copies)) == {Copies.forward, copy.copy}


def test_functions_of_the_standard_library() -> None:
    def placed(*path: str) -> types.FunctionType:
        return types.FunctionType(Copies.forward.__code__.replace(co_filename=os.path.join(*path)), {})

    standard = os.path.dirname(os.__file__)
    assert call_graph.is_standard(placed(standard, "json", "decoder.py"))
    assert call_graph.is_standard(placed("<frozen posixpath>"))
    for path in (
        (standard, "site-packages", "m.py"),
        (standard, "dist-packages", "m.py"),
        ("<string>",),
        (f"{standard}-x",),
    ):
        assert not call_graph.is_standard(placed(*path))
