"""Activations that write over a permuted norm, as timm's LayerNormAct2d does: kept bytes and results."""

import functools
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ckpt_kernels
from ckpt_kernels.recompute import discard_outputs, write_over_view
from ckpt_kernels.recompute.recipes import LONGEST_CHAIN

from .conftest import DEVICE
from .conversion import close, kept, random_tensor, results_of, twins

WIDTH = 8


class Normed(nn.Module):
    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(WIDTH, WIDTH, 1), nn.Conv2d(WIDTH, WIDTH, 1)
        self.weight, self.bias = nn.Parameter(torch.rand(WIDTH)), nn.Parameter(torch.rand(WIDTH) - 0.5)
        self.drop, self.act = nn.Identity(), act

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).permute(0, 2, 3, 1)
        x = F.layer_norm(x, (WIDTH,), self.weight, self.bias, 1e-5)
        x = x.permute(0, 3, 1, 2)
        return self.last(self.act(self.drop(x)))


class Transposed(Normed):
    def forward(self, x: Tensor) -> Tensor:
        n = F.layer_norm(self.first(x).flatten(2).transpose(1, 2), (WIDTH,), self.weight, self.bias, 1e-5)
        return self.last(self.act(n.transpose(1, 2).reshape(x.shape)))


class ReadElsewhere(Normed):
    """The norm's output is read by its own name after the write."""

    def forward(self, x: Tensor) -> Tensor:
        n = F.layer_norm(self.first(x).permute(0, 2, 3, 1), (WIDTH,), self.weight, self.bias, 1e-5)
        y = self.act(n.permute(0, 3, 1, 2))
        return self.last(y) + F.linear(n, self.last.weight[:, :, 0, 0]).permute(0, 3, 1, 2)


class Partly(Normed):
    """Half of the channels are written over."""

    def forward(self, x: Tensor) -> Tensor:
        n = F.layer_norm(self.first(x).permute(0, 2, 3, 1), (WIDTH,), self.weight, self.bias, 1e-5).permute(0, 3, 1, 2)
        self.act(n[:, : WIDTH // 2])
        return self.last(n)


class FirstSample(Normed):
    """The part that is written over lies in memory as a whole tensor does."""

    def forward(self, x: Tensor) -> Tensor:
        n = F.layer_norm(self.first(x).permute(0, 2, 3, 1), (WIDTH,), self.weight, self.bias, 1e-5).permute(0, 3, 1, 2)
        self.act(n[:1])
        return self.last(n)


FORMS = (Normed, Transposed, ReadElsewhere, Partly, FirstSample)


class ReadBefore(Normed):
    """A reader from before the write gets the values from before."""

    def forward(self, x: Tensor) -> Tensor:
        n = F.layer_norm(self.first(x).permute(0, 2, 3, 1), (WIDTH,), self.weight, self.bias, 1e-5).permute(0, 3, 1, 2)
        before = self.last(n.clone())
        return self.last(self.act(n)) + before


class WrittenBefore(Normed):
    def forward(self, x: Tensor) -> Tensor:
        n = F.layer_norm(self.first(x).permute(0, 2, 3, 1), (WIDTH,), self.weight, self.bias, 1e-5).permute(0, 3, 1, 2)
        n.detach()[0] = 0.3
        return self.last(self.act(n))


class Refused(Normed):
    """Torch refuses the first write."""

    def forward(self, x: Tensor) -> Tensor:
        n = F.layer_norm(self.first(x).permute(0, 2, 3, 1), (WIDTH,), self.weight, self.bias, 1e-5).permute(0, 3, 1, 2)
        try:
            self.act(n[:, :1].expand(-1, WIDTH, -1, -1))
        except RuntimeError:
            n.detach()[0] = 0.3
            return self.last(n)
        raise AssertionError("torch wrote over an expanded view")


class WrittenTwice(Normed):
    def forward(self, x: Tensor) -> Tensor:
        n = F.layer_norm(self.first(x).permute(0, 2, 3, 1), (WIDTH,), self.weight, self.bias, 1e-5).permute(0, 3, 1, 2)
        return self.last(F.hardtanh(self.act(n), -0.2, 0.2, inplace=True))


def compare(kinds: Sequence[type[Normed]], act: Callable[[], nn.Module], level: str) -> float:
    """The kept bytes of the converted model, of eager's; checks the results in float64."""
    model, twin = twins(lambda: nn.Sequential(*[kind(act()) for kind in kinds]).double())
    ckpt_kernels.convert(model, recompute=level)
    given = random_tensor(2, WIDTH, 6, 6, dtype=torch.float64)
    assert close(results_of(model, given), results_of(twin, given), 1e-10)
    return kept(model, given) / kept(twin, given)


@pytest.mark.parametrize("kind", FORMS)
@pytest.mark.parametrize(("act", "least"), [(nn.ReLU, 0.75), (nn.SiLU, 0.65)])
def test_writes_over_views_of_a_norm_are_followed(act: Callable[..., nn.Module], least: float, kind: type) -> None:
    assert compare((kind, kind), functools.partial(act, inplace=True), "output") < least


@pytest.mark.parametrize("act", [nn.ELU, nn.Hardsigmoid, nn.Hardswish, nn.LeakyReLU, nn.Mish, nn.ReLU6])
def test_every_activation_in_place(act: Callable[..., nn.Module]) -> None:
    assert compare((Normed, Partly), functools.partial(act, inplace=True), "layer") < 0.55


@pytest.mark.parametrize("act", [nn.SiLU, nn.Hardswish])
def test_writes_that_are_not_followed(act: Callable[..., nn.Module]) -> None:
    compare((ReadBefore, WrittenBefore, Refused, WrittenTwice), functools.partial(act, inplace=True), "output")


def test_a_graph_that_is_kept_gives_the_same_gradients_twice() -> None:
    model, twin = twins(lambda: nn.Sequential(Normed(nn.ReLU(inplace=True)), Partly(nn.SiLU(inplace=True))).double())
    ckpt_kernels.convert(model)
    given = random_tensor(2, WIDTH, 6, 6, dtype=torch.float64)
    loss = model(given).square().sum()
    first = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    second = torch.autograd.grad(loss, list(model.parameters()))
    expected = torch.autograd.grad(twin(given).square().sum(), list(twin.parameters()))
    for one, other, right in zip(first, second, expected, strict=True):
        assert torch.equal(one, other)
        torch.testing.assert_close(one, right)


@pytest.mark.parametrize("writes", (LONGEST_CHAIN - 1, LONGEST_CHAIN))
def test_a_long_chain_of_writes_is_not_followed(writes: int) -> None:
    computed = []

    def scaled(tensor: Tensor) -> Tensor:
        computed.append(tensor)
        return tensor * 0.9

    weights = [torch.rand(WIDTH, device=DEVICE).requires_grad_() for _ in range(3)]
    with discard_outputs():
        n = ckpt_kernels.functional.layer_norm(random_tensor(5, WIDTH), (WIDTH,), *weights[:2])
        view = n.transpose(0, 1)
        for _ in range(writes):
            write_over_view(lambda tensor: tensor.mul_(0.9), scaled, view)
        (n @ weights[2]).sum().backward()
    torch.testing.assert_close(weights[2].grad, n.sum(0))
    assert len(computed) == (writes if writes < LONGEST_CHAIN else 0)
