"""Residual sums before an activation: however they are written, the activation's output is recomputed."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ckpt_kernels

from .conversion import close, kept, random_tensor, results_of, twins

WIDTH = 8


class Block(nn.Module):
    """A bottleneck without the narrow part. `act` is the activation after the sum."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.BatchNorm2d(WIDTH)
        self.shortcut = nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 1), nn.BatchNorm2d(WIDTH))
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        y += self.shortcut(x)
        return self.act(y)


class Plus(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        y = y + self.shortcut(x)
        return self.act(y)


class Branched(Block):
    def forward(self, x: Tensor) -> Tensor:
        y, other = self.norm(self.conv(x)), self.shortcut(x)
        if self.training:
            y = torch.add(other, y)
        else:
            y += other
        return self.act(y)


class Method(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)).add(self.shortcut(x)))


class Expression(Block):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.shortcut(x) + self.norm(self.conv(x)))


class OfTensors(Block):
    def forward(self, x: Tensor) -> Tensor:
        return (self.norm(self.conv(x)) + self.shortcut(x)).relu()


class OfTensorsInPlace(Block):
    def forward(self, x: Tensor) -> Tensor:
        return (self.norm(self.conv(x)) + self.shortcut(x)).relu_()


class FromZero(Block):
    """A sum over branches, the first of which is added to a number."""

    def forward(self, x: Tensor) -> Tensor:
        y = 0
        for branch in (self.shortcut, self.norm_of_convolution):
            y += branch(x)
        return self.act(y)

    def norm_of_convolution(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class Aliased(Block):
    """The sum is written over a tensor that has another name."""

    def forward(self, x: Tensor) -> Tensor:
        z = y = self.norm(self.conv(x))
        y *= 0.5
        y += self.shortcut(x)
        return self.act(y) * z


class Weighted(Block):
    """Sums with factors, by torch's functions and methods of tensors."""

    def forward(self, x: Tensor) -> Tensor:
        y = torch.add(self.norm(self.conv(x)), self.shortcut(x), alpha=0.5)
        z = self.act(y).add(0.3, alpha=2).sub(x, alpha=-3)
        y = torch.sub(z, 0.7, alpha=2)
        return F.relu(y.add(x, alpha=0.25))


FORMS = (Plus, Branched, FromZero, Method, Expression, OfTensors, OfTensorsInPlace)


def model_of(kinds: Sequence[type[Block]], act: nn.Module) -> nn.Module:
    return nn.Sequential(*[kind(act) for kind in kinds], nn.Conv2d(WIDTH, 4, 1)).double()


@functools.cache
def ratio(kinds: Sequence[type[Block]], act: Callable[[], nn.Module], level: str) -> float:
    """The kept bytes of a converted model of these blocks, of eager's; checks the results in float64."""
    model, twin = twins(lambda: model_of(kinds, act()))
    ckpt_kernels.convert(model, recompute=level)
    given = random_tensor(2, WIDTH, 6, 6, dtype=torch.float64)
    assert close(results_of(model, given), results_of(twin, given), 1e-10)
    return kept(model, given) / kept(twin, given)


relu_in_place = functools.partial(nn.ReLU, inplace=True)


@pytest.mark.parametrize("level", ["output", "layer"])
@pytest.mark.parametrize("act", [nn.ReLU, relu_in_place], ids=["relu", "in place"])
@pytest.mark.parametrize("kinds", [FORMS[:3], FORMS[3:]], ids=["modules", "functions"])
def test_all_forms_of_a_sum_keep_the_same(
    kinds: Sequence[type[Block]], act: Callable[[], nn.Module], level: str
) -> None:
    assert ratio(kinds, act, level) <= ratio((Block,) * len(kinds), act, level) < 0.75


@pytest.mark.parametrize("kind", [nn.LeakyReLU, nn.ELU, nn.SiLU, nn.Hardswish, nn.ReLU6, nn.Mish])
def test_other_activations_that_write_over_a_sum(kind: Callable[..., nn.Module]) -> None:
    act = functools.partial(kind, inplace=True)
    assert ratio((Plus, Plus), act, "output") <= ratio((Block, Block), act, "output") < 0.75


class WrittenBefore(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x)) + self.shortcut(x)
        with torch.no_grad():
            y[:, 0] = 0.5
        return self.act(y)


class WrittenAfter(Block):
    """The write falls between the activation, whose output is read later, and the end of the sum's life."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x)) + self.shortcut(x)
        z = F.relu(y)
        with torch.no_grad():
            y[:, 0] = 0.5
        return z + y


class WrittenThere(Block):
    """As many writes as an activation in place makes."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x)) + self.shortcut(x)
        y.detach().mul_(0.5)
        return F.relu(y)


class Refilled(Block):
    """The sum is gone, and another tensor may have got its memory, with one write."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm(self.conv(x)) + self.shortcut(x))
        y = y.clone()
        y.detach().mul_(0.5)
        return F.relu(y)


@pytest.mark.parametrize("level", ["output", "layer"])
@pytest.mark.parametrize("act", [nn.ReLU, functools.partial(nn.SiLU, inplace=True)], ids=["relu", "silu in place"])
def test_writes_to_a_sum_that_autograd_does_not_see(act: Callable[[], nn.Module], level: str) -> None:
    ratio((WrittenBefore, WrittenAfter, WrittenThere, Refilled), act, level)


@pytest.mark.parametrize("level", ["output", "layer"])
def test_sums_under_two_names_and_with_factors(level: str) -> None:
    assert ratio((Aliased, Weighted), nn.ReLU, level) < 1


class Normed(nn.Module):
    """The norm of a sum with a tensor that `made` makes; the output leaves the layer after a cheap op."""

    def __init__(self, made: Callable[[Tensor], Tensor], scale: float | None) -> None:
        super().__init__()
        self.norm, self.first, self.last = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)
        self.act, self.final, self.made, self.scale = nn.GELU(), nn.RMSNorm(32), made, scale

    def forward(self, x: Tensor) -> Tensor:
        h = self.last(self.act(self.first(self.norm(x))))
        y = self.final(h + self.made(x))
        return y if self.scale is None else y * self.scale


class Layers(nn.Module):
    def __init__(self, *arguments: Any) -> None:
        super().__init__()
        self.layers, self.head = nn.ModuleList(Normed(*arguments) for _ in range(2)), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


@pytest.mark.parametrize("scale", [None, 3.0])
@pytest.mark.parametrize("made", [torch.zeros_like, Tensor.detach, torch.sin])
def test_layer_keeps_no_more_than_all(made: Callable[[Tensor], Tensor], scale: float | None) -> None:
    given = random_tensor(64, 32, dtype=torch.float64)
    sizes = {}
    for level in ("all", "layer"):
        model, twin = twins(lambda: Layers(made, scale).double())
        ckpt_kernels.convert(model, recompute=level)
        assert close(results_of(model, given), results_of(twin, given), 1e-10)
        sizes[level] = kept(model, given)
    assert sizes["layer"] <= sizes["all"] < kept(twin, given) / 3
