"""What tried modules read, changed after the conversion: helper methods, settings, classes and bound arguments."""

import functools
import types
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import ckpt_kernels

from .conftest import DEVICE
from .conversion import WIDTH, close, random_tensor, results_of, twins


class Mixin:
    """Defines nothing until a test does."""


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def scaled(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return self.scaled(x) * self.weight


class Norm(Mixin, Base):
    """Inherits the helper."""


class Activation(Mixin, nn.Module):
    def scaled(self, x: Tensor) -> Tensor:
        return torch.sigmoid(x)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scaled(x)


class Method(Mixin, nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def scaled(self, x: Tensor) -> Tensor:
        return torch.sigmoid(x)

    def act(self, x: Tensor) -> Tensor:
        return x * self.scaled(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))


class Gate(Mixin, nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.limit = 1.5

    def scaled(self, x: Tensor) -> Tensor:
        return x.clamp(max=self.limit)

    def gate(self, packed: Tensor) -> Tensor:
        gate, value = packed.chunk(2, dim=-1)
        gate, value = self.scaled(gate), value.clamp(min=-self.limit, max=self.limit)
        return gate * torch.sigmoid(gate) * (value + 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.gate(self.up(x)))


def other(self: nn.Module, x: Tensor) -> Tensor:
    return torch.tanh(x)


def on_the_instance(kind: type, monkeypatch: pytest.MonkeyPatch) -> Callable[[nn.Module], None]:
    return lambda module: setattr(module, "scaled", types.MethodType(other, module))


def on_a_mixin(kind: type, monkeypatch: pytest.MonkeyPatch) -> Callable[[nn.Module], None]:
    monkeypatch.setattr(Mixin, "scaled", other, raising=False)
    return lambda module: None


def on_the_class(kind: type, monkeypatch: pytest.MonkeyPatch) -> Callable[[nn.Module], None]:
    monkeypatch.setattr(kind, "scaled", other)
    return lambda module: None


@pytest.mark.parametrize("change", [on_the_instance, on_a_mixin, on_the_class])
@pytest.mark.parametrize("kind", [Norm, Activation, Method, Gate])
def test_other_helpers_are_seen(kind: type, change: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    model, twin = twins(lambda: nn.Sequential(kind(), nn.Linear(WIDTH, WIDTH)).to(DEVICE))
    assert ckpt_kernels.convert(twin, recompute="block").replaced
    x = random_tensor(2, 4, WIDTH)
    before = results_of(model, x)
    assert close(results_of(twin, x), before)
    apply = change(kind, monkeypatch)
    for each in (model, twin):
        apply(each[0])
    now = results_of(model, x)
    # A helper that the class itself defines stays where only a mixin behind the class changes.
    assert change is on_a_mixin or not close(now, before, 1e-2)
    assert close(results_of(twin, x), now)


SPEED = {"factor": 1.0}


class Field:
    """A data descriptor whose values follow a schedule."""

    def __get__(self, instance: object, kind: type) -> object:
        return self if instance is None else instance.__dict__["beta"] * SPEED["factor"]

    def __set__(self, instance: object, value: float) -> None:
        instance.__dict__["beta"] = value


class ByDescriptor(nn.Module):
    beta = Field()

    def __init__(self) -> None:
        super().__init__()
        self.beta = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.beta * x)


class ByGetattribute(ByDescriptor):
    beta = 1.0

    def __getattribute__(self, name: str) -> object:
        value = super().__getattribute__(name)
        return value * SPEED["factor"] if name == "beta" else value


class Scheduled(float):
    def __mul__(self, other: Tensor) -> Tensor:
        return other * SPEED["factor"]


class BySubclass(ByDescriptor):
    beta = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.beta = Scheduled(1.0)


def by_closure() -> nn.Module:
    class Operations:
        @staticmethod
        def sigmoid(x: Tensor) -> Tensor:
            return torch.sigmoid(x * SPEED["factor"])

    class Activation(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * Operations.sigmoid(x)

    return Activation()


@pytest.mark.parametrize("make", [ByDescriptor, ByGetattribute, BySubclass, by_closure])
def test_values_that_code_computes_are_no_settings(
    make: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, twin = twins(lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), make()).to(DEVICE))
    ckpt_kernels.convert(twin)
    x = random_tensor(4, WIDTH)
    before = results_of(model, x)
    assert close(results_of(twin, x), before)
    monkeypatch.setitem(SPEED, "factor", 3.0)
    assert not close(results_of(model, x), before, 1e-2)
    assert close(results_of(twin, x), results_of(model, x))


class Partial(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.act = functools.partial(nn.functional.gelu, approximate="tanh")

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x)


def test_bound_arguments_are_watched() -> None:
    model, twin = twins(lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), Partial()).to(DEVICE, torch.float64))
    assert ckpt_kernels.convert(twin, recompute="block").replaced
    x = 4 * random_tensor(64, WIDTH).double()
    for each in (model, twin):
        each[1].act.keywords["approximate"] = "none"
    assert close(results_of(twin, x), results_of(model, x), 1e-9)


def test_brackets_in_names_stand_for_themselves() -> None:
    model = nn.Module()
    for name in ("layer[0]", "layer0"):
        model.add_module(name, nn.LayerNorm(WIDTH))
    ckpt_kernels.convert(model, exclude=["layer[0]"])
    assert [ckpt_kernels.is_converted(child) for child in model.children()] == [False, True]
