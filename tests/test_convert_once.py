"""Sizes that come from arguments, products that must not run twice, and attributes that change at each step."""

import collections
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ckpt_kernels

from .conversion import INNER, WIDTH, close, kept, random_tensor, results_of, twins


class Sized(nn.Module):
    """Uses the numbers of rows and columns of its argument as sizes."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.norm, self.linear, self.act = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.GELU()
        self.token = nn.Parameter(torch.linspace(-1, 1, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self, self.how)(self.act(self.linear(self.norm(x))), x.shape[0])

    def expanded(self, y: Tensor, n: int) -> Tensor:
        return torch.cat([y, self.token.expand(n, -1)], dim=-1)

    def interpolated(self, y: Tensor, n: int) -> Tensor:
        return F.interpolate(y[None], size=3 * n, mode="linear")[0]

    def repeated(self, y: Tensor, n: int) -> Tensor:
        return self.norm(y).repeat(n, 1) + torch.full((n * n, 1), float(n), device=y.device)

    def one_hot(self, y: Tensor, n: int) -> Tensor:
        return y * F.one_hot(torch.arange(n, device=y.device) % WIDTH, WIDTH) + torch.eye(n, WIDTH, device=y.device)


@pytest.mark.parametrize("recompute", ("block", "output", "all", "layer"))
@pytest.mark.parametrize("how", ("expanded", "interpolated", "repeated", "one_hot"))
def test_sizes_are_those_of_each_call(how: str, recompute: Any) -> None:
    model, converted = twins(lambda: Sized(how))
    ckpt_kernels.convert(converted, recompute=recompute)
    for rows in (4, 7):
        x = random_tensor(rows, WIDTH)
        assert close(results_of(model, x), results_of(converted, x))


class WrittenOut(nn.Module):
    """SiLU, written as a product that is no gated MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.last(h * torch.sigmoid(h))


def products(model: nn.Module, x: Tensor) -> int:
    """The number of matrix products of a step."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        results_of(model, x)
    names = collections.Counter(event.name for event in profile.events())
    return names["aten::mm"] + names["aten::addmm"]


@pytest.mark.parametrize("recompute", ("block", "output"))
def test_no_product_runs_twice_for_an_activation_that_is_written_out(recompute: Any) -> None:
    model, converted = twins(WrittenOut)
    ckpt_kernels.convert(converted, recompute=recompute)
    x = random_tensor(8, WIDTH)
    assert kept(converted, x) < kept(model, x)
    assert products(converted, x) == products(model, x) > 0


def test_an_attribute_may_have_many_values() -> None:
    model, converted = twins(lambda: nn.Sequential(WrittenOut(), nn.LayerNorm(WIDTH)))
    ckpt_kernels.convert(converted)
    x = random_tensor(8, WIDTH)
    first = kept(converted, x)
    for step in range(40):
        for each in (model, converted):
            each[0].epoch = each[1].epoch = step
    assert kept(converted, x) == first < kept(model, x)
    assert close(results_of(model, x), results_of(converted, x))
