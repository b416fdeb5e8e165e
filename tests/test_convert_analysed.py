"""Analyses of a model's own code: each conversion reads classes and functions as they are then."""

import importlib
import linecache
import pathlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ckpt_kernels

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


by_class.__qualname__ = "Patched.scaled"


def test_a_method_that_is_patched_between_two_conversions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SCALES, Patched, 0.5)
    assert replacement_of(agrees(Patched), "") == "MLP"
    monkeypatch.setattr(Patched, "scaled", by_class)
    assert replacement_of(agrees(Patched), "") is None
    monkeypatch.undo()
    assert replacement_of(agrees(Patched), "") == "MLP"
