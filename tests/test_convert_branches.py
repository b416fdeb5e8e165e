"""Activations after branches that end with a norm."""

import pytest
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
