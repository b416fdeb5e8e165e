"""Plans for layers with unusual classes or references."""

import abc
import weakref

import pytest
import torch
from torch import Tensor, nn

import ckpt_kernels
from ckpt_kernels import plan

WIDTH = 8


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Slotted:
    __slots__ = ()


class Interface(abc.ABC):
    @abc.abstractmethod
    def forward(self, x: Tensor) -> Tensor: ...


class AbstractFirst(Interface, Layer):
    """The first base determines the memory layout of a Python object."""

    def forward(self, x: Tensor) -> Tensor:
        return Layer.forward(self, x)


class SlottedFirst(Slotted, Layer):
    pass


class HoldsItsChild(Layer):
    """A weak reference to a child, which a copy of the model shares."""

    def __init__(self) -> None:
        super().__init__()
        self.child = weakref.ref(self.up)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.child()(self.norm(x))))  # type: ignore[misc]


class Final(Layer):
    def __init_subclass__(cls) -> None:
        raise TypeError("this class is final")


def made(kind: type[nn.Module]) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(kind(), kind()), torch.randn(2, 5, WIDTH)


@pytest.mark.parametrize("kind", [AbstractFirst, SlottedFirst])
def test_every_order_of_bases_is_converted(kind: type[nn.Module]) -> None:
    model, x = made(kind)
    expected = model(x)
    ckpt_kernels.convert(model, recompute="layer")
    assert ckpt_kernels.is_converted(model[0]) and type(model[0]) is not kind
    torch.testing.assert_close(model(x), expected)
    found = plan(model, x, budget=1.0)
    assert "cannot be" not in found.note


def test_a_class_that_cannot_be_subclassed_is_planned_as_a_part_of_the_model() -> None:
    model, x = made(Final)
    found = plan(model, x, budget=1.0)
    assert found.whole is not None
    assert "a layer cannot be marked: its class cannot be subclassed" in found.note


def test_planning_does_not_change_gradients() -> None:
    model, x = made(HoldsItsChild)
    plan(model, x, budget=1.0)
    assert all(parameter.grad is None for parameter in model.parameters())
    model(x).sum().backward()
    before = [
        (parameter.grad, parameter.grad.clone()) for parameter in model.parameters() if parameter.grad is not None
    ]
    plan(model, x, budget=1.0)
    for parameter, (gradient, values) in zip(model.parameters(), before, strict=True):
        assert parameter.grad is gradient and torch.equal(gradient, values)


@pytest.mark.parametrize("tiles", [2, True, "24"])
def test_tiles_of_another_type_are_an_error(tiles: object) -> None:
    model, x = made(Layer)
    with pytest.raises(TypeError, match=r"tiles is .*; expected several whole numbers above 1"):
        plan(model, x, budget=None, tiles=tiles)  # type: ignore[arg-type]
