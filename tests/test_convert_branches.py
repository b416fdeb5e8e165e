"""Activations after branches that end with a norm, and activations that a method of the module computes."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ckpt_kernels

from .conversion import WIDTH, close, kept, random_tensor, replacement_of, results_of, twins

UNIT = 64 * WIDTH * 4
STATISTICS = 2 * 64 * 4


class Branches(nn.Module):
    """A norm in each of several branches, and the activation after them, as in diffusers' blocks of a ResNet."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.norm, self.act, self.last = nn.LayerNorm(WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "plain":
            x = self.norm(x)
        elif self.kind == "scaled":
            x = self.norm(x)
            x = x * 2
        elif self.kind == "left out":
            pass
        elif self.kind == "returned":
            return x
        x = self.act(x)
        return self.last(x)


class InLoop(Branches):
    def forward(self, x: Tensor) -> Tensor:
        for number in range(3):
            if number == 2:
                break
            if number == 1:
                x = self.norm(x)
            x = self.act(x)
        return self.last(x)


@pytest.mark.parametrize("kind", ("plain", "scaled", "left out", "neither", "returned"))
def test_an_activation_after_branches_is_fused_with_the_norm_in_a_branch(kind: str) -> None:
    model, twin = twins(lambda: Branches(kind))
    report = ckpt_kernels.convert(model, recompute="block")
    assert replacement_of(report, "") == "norm, activation"
    x = random_tensor(64, WIDTH)
    assert close(results_of(model, x), results_of(twin, x))
    if kind == "plain":
        # The input and the activation's output; eager torch keeps the norm's output too.
        assert kept(model, x) <= 2 * UNIT + STATISTICS < kept(twin, x)


def test_an_activation_after_a_branch_in_a_loop() -> None:
    model, twin = twins(lambda: InLoop(""))
    assert replacement_of(ckpt_kernels.convert(model, recompute="block"), "") == "norm, activation"
    x = random_tensor(64, WIDTH)
    assert close(results_of(model, x), results_of(twin, x))
    assert kept(model, x) <= 3 * UNIT + STATISTICS < kept(twin, x)


class ByMethod(nn.Module):
    """A gate whose activation is a method of the module, as in diffusers' GEGLU."""

    casts = False

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def activated(self, gate: Tensor) -> Tensor:
        if self.casts:
            return F.gelu(gate.to(torch.float64)).to(gate.dtype)
        return F.gelu(gate)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.first(x).chunk(2, dim=-1)
        return self.last(value * self.activated(gate))


class Casting(ByMethod):
    casts = True


class Frozen(ByMethod):
    """The value requires no gradient."""

    def forward(self, x: Tensor) -> Tensor:
        gate = self.first(x)[..., :WIDTH]
        return self.last(x.detach() * self.activated(gate))


class Written(ByMethod):
    """The method writes to the tensor that it is given, or activates another one."""

    def activated(self, gate: Tensor) -> Tensor:
        if gate.shape[0] == 1:
            return F.gelu(gate * 2)
        with torch.no_grad():
            gate.mul_(2)
        return F.gelu(gate)

    def forward(self, x: Tensor) -> Tensor:
        packed = self.first(x)
        return self.last(packed[..., :WIDTH] * self.activated(packed[..., WIDTH:]))


@pytest.mark.parametrize("kind", (ByMethod, Casting, Frozen, Written))
@pytest.mark.parametrize("level", ("block", "output", "all"))
@pytest.mark.parametrize("rows", (64, 1))
def test_products_with_an_activation_that_a_method_computes(kind: type[ByMethod], level: str, rows: int) -> None:
    model, twin = twins(kind)
    report = ckpt_kernels.convert(model, recompute=level)
    x = random_tensor(rows, WIDTH)
    assert "value * act(gate)" in (replacement_of(report, "") or "")
    assert close(results_of(model, x), results_of(twin, x))
    if kind is ByMethod and rows == 64:
        # The inputs of both linear layers, gate and value; eager torch keeps the activation's output too.
        floor = {"block": 4, "output": 3, "all": 1}[level] * UNIT + (2 * WIDTH * 4 if level == "all" else 0)
        assert kept(model, x) <= floor < kept(twin, x)


def test_without_gradients_the_product_is_the_same() -> None:
    model, twin = twins(ByMethod)
    ckpt_kernels.convert(model)
    with torch.no_grad():
        assert torch.allclose(model(random_tensor(8, WIDTH)), twin(random_tensor(8, WIDTH)), atol=1e-6)
