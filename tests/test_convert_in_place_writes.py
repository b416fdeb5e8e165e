"""In-place writes to the input of a norm in float32: eager torch saves a float32 copy of a 16-bit input."""

import functools
import operator
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ckpt_kernels

from .conftest import DEVICE
from .conversion import WIDTH, RMSNormInFloat32, random_tensor, twins

LEVELS = ("block", "output", "all", "layer")


def add(x: Tensor, y: Tensor) -> Tensor:
    x += y
    return x


class Adder(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return add(x, y)

    def method(self, x: Tensor, y: Tensor) -> Tensor:
        return add(x, y)

    static = staticmethod(add)


others = types.ModuleType("others")
others.add = add


class Layer(nn.Module):
    """A norm and a linear layer, whose output is added in place to the norm's input by what `held` holds."""

    def __init__(self, held: Any) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(WIDTH, WIDTH), RMSNormInFloat32(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.held, self.name = held, "add"

    def encoded(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y = self.second(self.norm(x))
        return self.add(x, y)

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        return self.held(x, y)

    def forward(self, x: Tensor) -> Tensor:
        return self.encoded(x)


class Named(Layer):
    def add(self, x: Tensor, y: Tensor) -> Tensor:
        return getattr(others, self.name)(x, y)


class Imported(Layer):
    def add(self, x: Tensor, y: Tensor) -> Tensor:
        from operator import iadd

        return iadd(x, y)


class InList(Layer):
    def add(self, x: Tensor, y: Tensor) -> Tensor:
        return self.held[0](x, y)


class Parent(nn.Module):
    """Calls a method of the layers that is not their forward."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(operator.iadd) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer.encoded(x)
        return x


class Residual(nn.Module):
    """Layers that write to their own input, after which the first layer's input is no more what the layer received."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Branch() for _ in range(3))
        self.embedding = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x)
        for layer in self.layers:
            x = layer(x)
        return x


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.act, self.down = (
            RMSNormInFloat32(WIDTH),
            nn.Linear(WIDTH, WIDTH),
            nn.GELU(),
            nn.Linear(WIDTH, WIDTH),
        )

    def forward(self, x: Tensor) -> Tensor:
        x += self.down(self.act(self.up(self.norm(x))))
        return x


WRITERS: dict[str, Callable[[], nn.Module]] = {
    "function": lambda: Layer(add),
    "object": lambda: Layer(Adder()),
    "method": lambda: Layer(Adder().method),
    "static method": lambda: Layer(Adder.static),
    "partial": lambda: Layer(functools.partial(add)),
    "operator": lambda: Layer(operator.iadd),
    "by name": lambda: Named(None),
    "imported": lambda: Imported(None),
    "in a list": lambda: InList([Adder()]),
    "method of a child": Parent,
    "layers": Residual,
}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("writer", WRITERS)
def test_a_norms_input_may_be_written_to(writer: str, level: str) -> None:
    model, converted = (m.to(DEVICE, torch.bfloat16) for m in twins(WRITERS[writer]))
    ckpt_kernels.convert(converted, recompute=level)
    assert_same_gradients(model, converted)


@pytest.mark.parametrize("level", LEVELS)
def test_a_writer_may_come_after_the_conversion(level: str) -> None:
    model, converted = (m.to(DEVICE, torch.bfloat16) for m in twins(lambda: Layer(torch.add)))
    ckpt_kernels.convert(converted, recompute=level)
    for each in (model, converted):
        each.held = operator.iadd
    assert_same_gradients(model, converted)


def assert_same_gradients(model: nn.Module, converted: nn.Module) -> None:
    """Asserts gradients within a few roundings of bfloat16."""
    x = random_tensor(5, WIDTH).bfloat16()
    for each in (model, converted):
        each(x).float().square().mean().backward()
    for (name, p), q in zip(model.named_parameters(), converted.parameters(), strict=True):
        error, size = (p.grad.double() - q.grad.double()).norm(), p.grad.double().norm()
        assert error <= 2 * torch.finfo(torch.bfloat16).eps * size, name
