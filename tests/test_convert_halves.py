"""Gates of two halves of one tensor with any activation: kept tensors, and tensors that are no halves."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ckpt_kernels

from .conversion import WIDTH, close, kept, random_tensor, replacement_of, results_of, twins


class Gate(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        u, v = h.chunk(2, dim=-1)
        return u * F.relu(v)


class Sigmoid(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        u, v = torch.chunk(h, 2, 2)
        return torch.sigmoid(u) * v


class Written(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        u, v = h.chunk(2, -1)
        return u * (v * 0.5 * (1.0 + torch.erf(v * 0.5**0.5)))


class Slices(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        half = h.shape[-1] // 2
        u, v = h[..., :half], h[..., half:]
        return F.relu(u) * v


class Chooses(nn.Module):
    """The gate of timm's GluMlp."""

    def __init__(self) -> None:
        super().__init__()
        self.act, self.dim, self.gate_last = nn.Sigmoid(), -1, True

    def forward(self, h: Tensor) -> Tensor:
        u, v = h.chunk(2, dim=self.dim)
        return u * self.act(v) if self.gate_last else self.act(u) * v


class Returns(nn.Module):
    """The gate of diffusers' GEGLU: a branch binds the argument's name to a half, and returns the product."""

    def forward(self, h: Tensor) -> Tensor:
        if h.dim() == 1:
            return h
        else:
            h, gate = h.chunk(2, dim=-1)
            return h * F.gelu(gate)


class ReturnsLater(nn.Module):
    """The return is a statement of its own."""

    def forward(self, h: Tensor) -> Tensor:
        if h.dim() > 1:
            h, gate = h.chunk(2, dim=-1)
            y = h * F.gelu(gate)
            return y
        return h


class Within(nn.Module):
    """An MLP that is fused into one call, from the first product to the last."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, h: Tensor) -> Tensor:
        a, b = torch.chunk(self.first(h), 2, 2)
        return self.last(F.relu(a) * b)


def between(gate: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 6 * WIDTH), gate, nn.Linear(3 * WIDTH, WIDTH))


# What the report says, and how many halves eager torch keeps beside the whole tensor. This package keeps no half.
FOUND = {
    Gate: ("packed gate", 2),
    Sigmoid: ("packed gate (where dimension 2 is the last)", 2),
    Written: ("packed gate", 4),
    Returns: ("packed gate", 2),
    ReturnsLater: ("packed gate", 2),
    Slices: ("gate", 2),
    Chooses: ("2 x gate", 2),
}


@pytest.mark.parametrize("kind", FOUND, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("level", ("block", "output", "all"))
def test_a_gate_of_halves_keeps_only_the_whole(kind: type[nn.Module], level: str) -> None:
    model, twin = twins(lambda: between(kind()))
    found, halves = FOUND[kind]
    assert replacement_of(ckpt_kernels.convert(model, recompute=level), "1") == found
    given = random_tensor(2, 32, WIDTH)
    assert close(results_of(model, given), results_of(twin, given), 1e-5)
    # The input has size 1, the whole tensor size 6, and a half size 3.
    most = 1.0 if level == "block" else 7 / (7 + 3 * halves)
    assert kept(model, given) / kept(twin, given) <= most + 0.01


def test_an_mlp_of_halves() -> None:
    model, twin = twins(Within)
    assert replacement_of(ckpt_kernels.convert(model), "") == "packed gated MLP (where dimension 2 is the last)"
    given = random_tensor(2, 32, WIDTH)
    assert close(results_of(model, given), results_of(twin, given), 1e-5)
    assert kept(model, given) / kept(twin, given) <= 3 / 5 + 0.01


def test_a_dimension_that_is_not_the_last() -> None:
    model, twin = twins(Sigmoid)
    ckpt_kernels.convert(model)
    given = random_tensor(2, 3, 4, 6)
    assert close(results_of(model, given), results_of(twin, given), 1e-6) and model(given).shape == (2, 3, 2, 6)


class OwnChunk(nn.Module):
    """Both operands look like parts of one tensor, but a method of the model makes them."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def chunk(self, h: Tensor) -> tuple[Tensor, Tensor]:
        return self.linear(h), h * 2.0

    def forward(self, h: Tensor) -> Tensor:
        u, v = self.chunk(h)
        y = F.relu(u) * v
        u.add_(1.0)
        return y


class WritesOver(nn.Module):
    """The activation writes in place to the whole tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.act = nn.Linear(WIDTH, 2 * WIDTH), nn.ReLU(inplace=True)

    def forward(self, h: Tensor) -> Tensor:
        whole = self.linear(h)
        u, v = whole[..., :WIDTH], whole[..., WIDTH:]
        return self.act(u) * v + whole.sum(-1, keepdim=True)


class Separate(nn.Module):
    """The activation's operand, which eager torch does not keep, is written to."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, h: Tensor) -> Tensor:
        u, v = self.a(h), self.b(h)
        y = F.relu(u) * v
        u.add_(1.0)
        return y + u


@pytest.mark.parametrize("make", (OwnChunk, WritesOver, Separate))
def test_operands_that_are_no_halves_are_unchanged(make: Callable[[], nn.Module]) -> None:
    model, twin = twins(make)
    ckpt_kernels.convert(model)
    assert close(results_of(model, random_tensor(8, WIDTH)), results_of(twin, random_tensor(8, WIDTH)), 1e-5)
    assert kept(model, random_tensor(8, WIDTH)) <= kept(twin, random_tensor(8, WIDTH))


class Unpacks(nn.Module):
    """Unpacks what a norm returns to a name and to an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.act = nn.LayerNorm(WIDTH), nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        first, self.second = self.norm(x)
        return self.act(first)


class AssignsTwice(Unpacks):
    def forward(self, x: Tensor) -> Tensor:
        first = second = self.norm(x)
        return self.act(first) * second


@pytest.mark.parametrize("kind", [Unpacks, AssignsTwice])
def test_assignments_to_two_targets(kind: type[nn.Module]) -> None:
    model, converted = twins(kind)
    ckpt_kernels.convert(converted)
    x = random_tensor(2, 4, WIDTH)
    assert close(results_of(converted, x), results_of(model, x))
