"""In-place activations after a norm, a product or a convolution: saved bytes and results."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ckpt_kernels

from .conversion import close, kept, random_tensor, replacement_of, results_of, twins

CHANNELS = 8


class Method(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(CHANNELS)

    def forward(self, h: Tensor) -> Tensor:
        h = self.norm(h)
        return F.leaky_relu(h, 0.2, inplace=True)


def after(*modules: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, CHANNELS, 3), *modules, nn.Conv2d(CHANNELS, 4, 3))


norms = {"batch norm": nn.BatchNorm2d, "instance norm": nn.InstanceNorm2d, "group norm": lambda c: nn.GroupNorm(2, c)}
# The module, and how many feature maps eager torch keeps. This package keeps one.
FOUND: dict[str, tuple[Callable[[], nn.Module], int]] = {
    **{
        f"{name}, {act}": (lambda norm=norm, act=act: after(norm(CHANNELS), act), 2)
        for name, norm in norms.items()
        for act in (nn.LeakyReLU(0.1, True), nn.ELU(0.5, True), nn.CELU(1.5, True), nn.ReLU6(True))
    },
    "in a method": (lambda: after(Method()), 2),
    **{
        f"convolution, {act}": (lambda act=act: after(act), 2)
        for act in (nn.ReLU6(inplace=True), nn.SiLU(inplace=True), nn.Hardtanh(-0.5, 0.7, inplace=True))
    },
}


@pytest.mark.parametrize("name", FOUND)
def test_in_place_activations_keep_one_feature_map(name: str) -> None:
    make, maps = FOUND[name]
    model, twin = twins(make)
    ckpt_kernels.convert(model, recompute="output")
    given = random_tensor(2, 3, 14, 14)
    assert close(results_of(model, given), results_of(twin, given), 1e-5)
    image, feature_map = 3 * 14 * 14, CHANNELS * 12 * 12
    ratio = kept(model, given) / kept(twin, given)
    assert ratio <= (image + feature_map) / (image + maps * feature_map) + 0.02


class OfAProduct(nn.Module):
    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.first, self.act, self.last = nn.Linear(16, 48), act, nn.Linear(48, 16)

    def forward(self, h: Tensor) -> Tensor:
        h = self.first(h)
        h = self.act(h)
        return self.last(h)


@pytest.mark.parametrize("act", (nn.Hardtanh(-0.5, 0.7, True), nn.Hardsigmoid(True)), ids=str)
@pytest.mark.parametrize("kind", ("method", "sequence"))
@pytest.mark.parametrize("level", ("block", "output", "all"))
def test_in_place_activations_of_a_product_run_out_of_place(act: nn.Module, kind: str, level: str) -> None:
    """A product of three dimensions is a view, and the autograd graph does not show the overwritten values."""

    def make() -> nn.Module:
        return OfAProduct(act) if kind == "method" else nn.Sequential(nn.Linear(16, 48), act, nn.Linear(48, 16))

    model, twin = twins(make)
    assert replacement_of(ckpt_kernels.convert(model, recompute=level), "") == "activation of a product, out of place"
    given = random_tensor(2, 32, 16)
    assert close(results_of(model, given), results_of(twin, given), 1e-5)
    ratio = kept(model, given) / kept(twin, given)
    assert ratio <= (1.0 if level == "block" else 4 / 7 + 0.01)


@pytest.mark.parametrize("act", (nn.ReLU6(True), nn.Hardtanh(0, 6, True), nn.Hardtanh(inplace=True), nn.SiLU(True)))
@pytest.mark.parametrize(("level", "most"), (("block", 1.0), ("output", 4 / 7), ("all", 1 / 7)))
def test_in_place_activations_are_fused_into_an_mlp(act: nn.Module, level: str, most: float) -> None:
    """Eager torch keeps a clone of the product beside the output."""
    model, twin = twins(lambda: OfAProduct(act))
    assert replacement_of(ckpt_kernels.convert(model, recompute=level), "") == "MLP"
    given = random_tensor(2, 32, 16)
    assert close(results_of(model, given), results_of(twin, given), 1e-5)
    assert kept(model, given) <= (most + 0.01) * kept(twin, given)


def test_in_place_activations_of_a_tensor_with_other_readers_stay() -> None:
    class ReadTwice(OfAProduct):
        def forward(self, h: Tensor) -> Tensor:
            h = self.first(h)
            activated = self.act(h)
            return self.last(activated) + h.mean()

    model, twin = twins(lambda: ReadTwice(nn.ReLU6(inplace=True)))
    assert replacement_of(ckpt_kernels.convert(model), "") is None
    given = random_tensor(2, 32, 16)
    assert close(results_of(model, given), results_of(twin, given), 1e-5)


@torch.no_grad()
def test_in_place_without_gradients_stays_in_place() -> None:
    model, twin = twins(lambda: OfAProduct(nn.ReLU6(inplace=True)))
    ckpt_kernels.convert(model)
    assert torch.equal(model(random_tensor(2, 32, 16)), twin(random_tensor(2, 32, 16)))


@pytest.mark.parametrize("act", (nn.ReLU(inplace=True), nn.LeakyReLU(0.1, inplace=True)))
def test_in_place_activations_of_a_convolution_keep_only_the_output(act: nn.Module) -> None:
    """The backward pass of these activations reads only the output, in eager torch too."""
    model, twin = twins(lambda: after(act))
    ckpt_kernels.convert(model)
    given = random_tensor(2, 3, 14, 14)
    assert close(results_of(model, given), results_of(twin, given), 1e-5)
    assert kept(model, given) == kept(twin, given)


def test_a_write_that_autograd_does_not_see() -> None:
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(3, CHANNELS, 3), nn.Conv2d(CHANNELS, 4, 3)

        def forward(self, h: Tensor) -> Tensor:
            h = F.relu6(self.first(h).clone())
            h.detach().mul_(1.5)
            return self.last(h)

    model, twin = twins(Hidden)
    ckpt_kernels.convert(model)
    given = random_tensor(2, 3, 14, 14)
    assert close(results_of(model, given), results_of(twin, given), 1e-5)
    assert torch.equal(model(given), twin(given))
