"""Helper methods of tried modules that are replaced, or overridden, after the conversion."""

import types
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import ckpt_kernels

from .conftest import DEVICE
from .conversion import WIDTH, close, random_tensor, results_of, twins


class Mixin:
    pass


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def scaled(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return self.scaled(x) * self.weight


class Norm(Mixin, Base):
    pass


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
