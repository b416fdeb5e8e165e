"""Activations that are a user's `autograd.Function`: converted if values and gradient are those of an activation."""

import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as TF
from torch import Tensor, nn

import ckpt_kernels

from .conftest import DEVICE
from .conversion import kept, twins

WIDTH, ROWS = 16, 12
SCALE = 0.79788456


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1.0 + torch.tanh(SCALE * x * (1 + 0.044715 * x * x)))


def gelu_slope(x: Tensor) -> Tensor:
    t = torch.tanh(SCALE * x * (1 + 0.044715 * x * x))
    return 0.5 * x * ((1 - t * t) * (SCALE + 0.1070322243 * x * x)) + 0.5 * (1 + t)


class GELU(torch.autograd.Function):
    """The activation of Bloom."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return gelu(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return gelu_slope(ctx.saved_tensors[0]) * grad


class Swish(torch.autograd.Function):
    """The activation of EfficientNet."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        result = x * torch.sigmoid(x)
        ctx.save_for_backward(x)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(x)
        return grad * (s * (1 + x * (1 - s)))


class Straight(torch.autograd.Function):
    """The values of GELU with the gradient of the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return gelu(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class Cut(torch.autograd.Function):
    """GELU with a gradient that drops negative incoming gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return gelu(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return gelu_slope(ctx.saved_tensors[0]) * torch.relu(grad)


class Remembers(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.x = x
        return gelu(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return gelu_slope(ctx.x) * grad


class More(torch.autograd.Function):
    """A function with more attributes than the two methods."""

    generate_vmap_rule = True

    forward = GELU.forward
    backward = GELU.backward


class GeluAct(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return GELU.apply(x)


class SwishAct(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Swish.apply(x)


class StraightAct(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Straight.apply(x)


class CutAct(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Cut.apply(x)


class RemembersAct(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Remembers.apply(x)


class MoreAct(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return More.apply(x)


class Layer(nn.Module):
    def __init__(self, act: type[nn.Module]) -> None:
        super().__init__()
        self.norm, self.act = nn.LayerNorm(WIDTH), act()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.act(self.up(self.norm(x))))


def rows(dtype: torch.dtype = torch.float32) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(ROWS, WIDTH, device=DEVICE, dtype=dtype)


def step(model: nn.Module, x: Tensor) -> list[Tensor]:
    given = x.clone().requires_grad_()
    output = model(given)
    return [output, *torch.autograd.grad(output.square().sum(), [given, *model.parameters()])]


@pytest.mark.parametrize(("act", "name"), [(GeluAct, "gelu_tanh"), (SwishAct, "silu")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_functions_with_a_known_gradient_are_converted(act: type[nn.Module], name: str, dtype: torch.dtype) -> None:
    """In float64 rounded constants make another activation, so the user's code runs."""
    plain, twin = twins(lambda: nn.ModuleList([Layer(act)]).to(dtype))
    report = ckpt_kernels.convert(twin, recompute="layer")
    assert f"bias_act ({name})" in {entry.by for entry in report.replaced if entry.name == "0.act"}
    torch.testing.assert_close(step(twin[0], rows(dtype)), step(plain[0], rows(dtype)), rtol=1e-5, atol=1e-5)
    if dtype is torch.float32:
        # The layer's input, statistics and copies of biases are kept, neither the product nor the activation's output.
        assert kept(twin[0], rows()) - 2 * WIDTH * 4 < 1.8 * rows().nbytes < 8 * rows().nbytes < kept(plain[0], rows())


@pytest.mark.parametrize("act", [StraightAct, CutAct, RemembersAct, MoreAct])
def test_other_functions_are_left_alone(act: type[nn.Module]) -> None:
    plain, twin = twins(lambda: Layer(act))
    report = ckpt_kernels.convert(twin)
    assert [entry.name for entry in report.left_alone] == ["act"]
    torch.testing.assert_close(step(twin, rows()), step(plain, rows()), rtol=1e-5, atol=1e-5)


def test_a_replaced_backward_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, twin = twins(lambda: GeluAct())
    ckpt_kernels.convert(twin)
    x = rows().requires_grad_()

    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 3 * grad

    monkeypatch.setattr(GELU, "backward", staticmethod(backward))
    monkeypatch.setattr(GELU._backward_cls, "backward", staticmethod(backward), raising=False)
    found, expected = (torch.autograd.grad(model(x).sum(), x)[0] for model in (twin, plain))
    assert torch.equal(found, expected)


def test_a_pickled_copy_is_converted() -> None:
    twin = Layer(GeluAct)
    ckpt_kernels.convert(twin)
    loaded = pickle.loads(pickle.dumps(twin))
    assert kept(loaded.to(DEVICE), rows()) == kept(twin.to(DEVICE), rows())
    assert torch.equal(loaded(rows()), twin(rows()))
    torch.testing.assert_close(loaded.act(rows()), TF.gelu(rows(), approximate="tanh"))
