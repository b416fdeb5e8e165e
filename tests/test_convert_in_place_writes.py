"""In-place writes to the input of a norm in float32: eager torch saves a float32 copy of a 16-bit input."""

import copy
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

    def __init__(self, kind: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(kind() for _ in range(3))
        self.embedding = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x)
        for layer in self.layers:
            x = layer(x)
        return x


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.other_norm = RMSNormInFloat32(WIDTH), RMSNormInFloat32(WIDTH)
        self.up, self.act, self.down = nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH)

    def mlp(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))

    def forward(self, x: Tensor) -> Tensor:
        x += self.mlp(self.norm(x))
        x += self.mlp(self.other_norm(x))
        return x


class ScaledAfter(Branch):
    """Reads the input after a write."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        x *= 0.5
        return x + self.mlp(y) + self.act(x)


class OfASlice(Branch):
    """The norm reads a part of the input."""

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x) + self.mlp(self.norm(x[:1])) + self.mlp(self.other_norm(x))


class Transposed(Branch):
    """The norm reads the input, which is square, in another order."""

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x) + self.mlp(self.norm(x.t())) + self.mlp(x)


WRITERS: dict[str, Callable[[], nn.Module]] = {
    "function": lambda: Layer(add),
    "by name": lambda: Named(None),
    "method of a child": Parent,
    "twice": lambda: Residual(Branch),
    "read after the write": lambda: Residual(ScaledAfter),
    "norm of a slice": lambda: Residual(OfASlice),
    "norm of a transposed input": lambda: Residual(Transposed),
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


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("level", LEVELS)
def test_an_input_without_a_gradient_may_be_written_to(level: str, dtype: torch.dtype) -> None:
    """Torch saves only the normalized rows, for the gradient of the weight."""
    model, converted = (m.to(DEVICE, dtype) for m in twins(lambda: nn.Sequential(RMSNormInFloat32(WIDTH))))
    assert ckpt_kernels.convert(converted, recompute=level).replaced
    gradients = []
    for each in (model, converted):
        x = random_tensor(5, WIDTH).to(dtype)
        output = each(x)
        x.zero_()
        gradients += torch.autograd.grad(output.float().square().mean(), list(each.parameters()))
    expected, found = gradients
    assert (found.double() - expected.double()).norm() <= 2 * torch.finfo(dtype).eps * expected.double().norm()


def assert_same_gradients(model: nn.Module, converted: nn.Module) -> None:
    """Asserts gradients with at most 1.5 times eager torch's error against float64, plus a rounding."""
    truth = copy.deepcopy(model).double()
    x = random_tensor(WIDTH, WIDTH).bfloat16()
    for each in (truth, model, converted):
        each(x.double() if each is truth else x).double().square().mean().backward()
    for (name, p), q, t in zip(model.named_parameters(), converted.parameters(), truth.parameters(), strict=True):
        if t.grad is None:
            assert q.grad is None, name
            continue
        error, usual = ((grad.double() - t.grad).norm() for grad in (q.grad, p.grad))
        assert error <= 1.5 * usual + torch.finfo(torch.bfloat16).eps * t.grad.norm(), name
