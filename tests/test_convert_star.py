"""StarReLU, `scale * relu(x) ** 2 + shift`, in any form: the sum is recomputed from relu's output."""

import copy

import pytest
import torch
from torch import Tensor, nn

import ckpt_kernels
from ckpt_kernels.memory import saved_bytes

from .conftest import DEVICE

WIDTH = 32


class StarReLU(nn.Module):
    def __init__(self, inplace: bool, learned: bool) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace)
        self.scale = nn.Parameter(torch.full((1,), 0.9), requires_grad=learned)
        self.bias = nn.Parameter(torch.full((1,), -0.4), requires_grad=learned)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.relu(x) ** 2 + self.bias


class MLP(nn.Module):
    def __init__(self, inplace: bool = False, learned: bool = True) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.act = StarReLU(inplace, learned)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.act(self.first(x)))


class ByFunctions(StarReLU):
    def forward(self, x: Tensor) -> Tensor:
        return torch.add(torch.mul(torch.relu(x).pow(2), self.scale), self.bias)


class ByMethods(StarReLU):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x).square().mul(self.scale).sub(self.bias)


class ByNumbers(StarReLU):
    def forward(self, x: Tensor) -> Tensor:
        return 0.8944 * torch.relu(x) ** 2 - 0.4472


def rows(dtype: torch.dtype = torch.float32) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(64, WIDTH, device=DEVICE, dtype=dtype)


def results(model: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.detach().clone().requires_grad_()
    output = model(x)
    sources = [x, *(p for p in model.parameters() if p.requires_grad)]
    return [output.detach(), *torch.autograd.grad(output.square().sum(), sources)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("inplace", [False, True])
def test_the_sum_is_recomputed(inplace: bool, learned: bool, dtype: torch.dtype) -> None:
    model = MLP(inplace, learned).to(DEVICE, dtype)
    eager, x = copy.deepcopy(model), rows(dtype)
    report = ckpt_kernels.convert(model)
    assert ("act", "square, scale and shift") in [(entry.name, entry.by) for entry in report.replaced]
    for found, expected in zip(results(model, x), results(eager, x), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    # x, relu's output (4 times as large) and a copy of the shift. Eager torch also keeps the sum, and the square if the
    # scale is trained.
    kept = saved_bytes(model, x)
    assert 5 * x.nbytes < kept <= 5 * x.nbytes + 16
    assert saved_bytes(eager, x) >= (13 if learned else 9) * x.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [ByFunctions, ByMethods, ByNumbers])
def test_other_forms_have_recipes(kind: type[StarReLU], dtype: torch.dtype) -> None:
    model = MLP()
    model.act = kind(False, kind is not ByNumbers).requires_grad_(kind is not ByNumbers)
    model.to(DEVICE, dtype)
    eager, x = copy.deepcopy(model), rows(dtype)
    report = ckpt_kernels.convert(model)
    assert ("act", "recipes of scaled squares") in [(entry.name, entry.by) for entry in report.replaced]
    for found, expected in zip(results(model, x), results(eager, x), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert saved_bytes(model, x) <= 5 * x.nbytes + 16
    assert saved_bytes(eager, x) >= 9 * x.nbytes


def test_squares_that_are_reduced_are_no_reason_to_note() -> None:
    class Length(nn.Module):
        def forward(self, x: Tensor, scale: float) -> Tensor:
            return x * torch.relu(x).square().sum(-1, keepdim=True) + scale

    assert not ckpt_kernels.convert(nn.ModuleList([Length()])).replaced


def test_the_shift_may_be_written_to_before_the_backward_pass() -> None:
    model, x = MLP().to(DEVICE), rows()
    expected = results(copy.deepcopy(model), x)
    ckpt_kernels.convert(model)
    x.requires_grad_()
    output = model(x)
    with torch.no_grad():
        model.act.bias.add_(1)
    output.square().sum().backward()
    torch.testing.assert_close([x.grad, model.last.weight.grad], [expected[1], expected[4]])


def test_autocast_and_no_grad() -> None:
    model, x = MLP().to(DEVICE), rows()
    eager = copy.deepcopy(model)
    ckpt_kernels.convert(model)
    with torch.no_grad():
        torch.testing.assert_close(model(x), eager(x))
    with torch.autocast(DEVICE, torch.bfloat16):
        for found, expected in zip(results(model, x), results(eager, x), strict=True):
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", [StarReLU, ByFunctions, ByMethods])
def test_torch_compile(kind: type[StarReLU]) -> None:
    model, x = MLP(), rows()
    model.act = kind(False, True)
    model.to(DEVICE)
    eager = copy.deepcopy(model)
    ckpt_kernels.convert(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), eager(x))


class Large(nn.Module):
    """A shift as large as the shifted tensor: a copy would save no memory."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU()
        self.last = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return self.last(scale * self.act(x) ** 2 + shift)


def test_large_shifts_are_not_copied() -> None:
    model = Large().to(DEVICE)
    eager = copy.deepcopy(model)
    ckpt_kernels.convert(model)
    x, scale, shift = (rows().requires_grad_() for _ in range(3))
    assert saved_bytes(lambda: model(x, scale, shift)) <= saved_bytes(lambda: eager(x, scale, shift))
    torch.testing.assert_close(model(x, scale, shift), eager(x, scale, shift), rtol=0, atol=0)
