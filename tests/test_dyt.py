"""DyT: alpha and the gradient of alpha, saved bytes, the module, and errors."""

import copy

import pytest
import torch
from torch import Tensor

from ckpt_kernels import functional as F
from ckpt_kernels import nn
from ckpt_kernels.memory import saved_bytes
from ckpt_kernels.recompute import discard_outputs

from .conftest import DEVICE, interprets


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE, requires_grad=True)


@pytest.mark.parametrize("shape", [(), (1,)])
def test_alpha_may_have_a_dimension_or_none(shape: tuple[int, ...], backend: str) -> None:
    x, weight = randn(5, 16), randn(16)
    alpha = torch.full(shape, 0.7, device=DEVICE, requires_grad=True)
    found = torch.autograd.grad(F.dyt(x, alpha, weight).sin().sum(), (x, alpha, weight))
    expected = torch.autograd.grad((torch.tanh(alpha * x) * weight).sin().sum(), (x, alpha, weight))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_alphas_gradient_is_exact_for_long_sums() -> None:
    """A running sum of as many float32 numbers of one sign would lose four digits."""
    x = torch.rand(3000, 700, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    alpha = torch.full((1,), 0.5, device=DEVICE, requires_grad=True)
    (found,) = torch.autograd.grad(F.dyt(x, alpha).sum(), alpha)
    (expected,) = torch.autograd.grad(torch.tanh(alpha.double() * x.double()).sum(), alpha)
    torch.testing.assert_close(found, expected, rtol=3e-7, atol=0)


@pytest.mark.parametrize("large", [20.0, 1e4, float("inf")])
def test_where_tanh_is_flat(large: float, backend: str) -> None:
    x = torch.tensor([[large, -large, 0.0, 1.0]], device=DEVICE, requires_grad=True)
    y = F.dyt(x, torch.tensor([2.0], device=DEVICE), torch.full((4,), 3.0, device=DEVICE))
    assert y[0, :3].tolist() == [3.0, -3.0, 0.0]
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert grad[0, :2].abs().max() <= 1e-6 and grad[0, 2] == 6.0


@pytest.mark.parametrize("shape", [(2, 2100), (2, 17001), (300, 24)], ids=str)
def test_sums_that_several_programs_share(shape: tuple[int, int], backend: str) -> None:
    """Rows wider than a strip of columns in any kernel, and more rows than one program processes."""
    if interprets(backend) and shape[1] > 5000:
        pytest.skip("the other shapes are enough where kernels are interpreted")
    torch.manual_seed(0)
    x, weight, alpha = randn(*shape), randn(shape[1]), torch.tensor([0.3], device=DEVICE, requires_grad=True)
    found = torch.autograd.grad(F.dyt(x, alpha, weight).square().sum(), (x, alpha, weight))
    wide = [t.detach().double().requires_grad_() for t in (x, alpha, weight)]
    expected = torch.autograd.grad((torch.tanh(wide[1] * wide[0]) * wide[2]).square().sum(), wide)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-4)


def test_the_output_is_discarded_and_gradients_are_the_same_bits() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(nn.DyT(64), torch.nn.Linear(64, 8)).to(DEVICE)
    x = randn(8, 64)
    assert saved_bytes(model, x) == 2 * x.nbytes
    assert saved_bytes(discard_outputs()(model), x) == x.nbytes
    plain, recomputed = (
        torch.autograd.grad(call(x).square().sum(), [x, *model.parameters()])
        for call in (model, discard_outputs()(model))
    )
    assert all(map(torch.equal, plain, recomputed))


class PapersDyT(torch.nn.Module):
    """A module with the parameters' names and shapes of the paper's code."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.alpha = torch.nn.Parameter(torch.ones(1) * 0.5)
        self.weight = torch.nn.Parameter(torch.randn(width))
        self.bias = torch.nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.alpha * x) * self.weight + self.bias


def test_the_module_loads_the_state_of_the_papers_code() -> None:
    theirs = PapersDyT(16)
    ours = nn.DyT(16, alpha_init=0.1)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(3, 4, 16)
    torch.testing.assert_close(ours(x), theirs(x))
    ours.reset_parameters()
    assert ours.alpha.item() == pytest.approx(0.1) and (ours.weight == 1).all() and (ours.bias == 0).all()


def test_repr_of_the_module() -> None:
    assert repr(nn.DyT(8)) == "DyT(8)"
    assert repr(nn.DyT(8, 0.8, bias=False)) == "DyT(8, alpha_init=0.8, bias=False)"
    plain = nn.DyT(8, elementwise_affine=False)
    assert repr(plain) == "DyT(8, elementwise_affine=False)"
    assert plain.weight is None and plain.bias is None
    x = torch.randn(2, 8)
    torch.testing.assert_close(copy.deepcopy(plain)(x), torch.tanh(0.5 * x))


def test_alpha_under_vmap() -> None:
    """Each sample has another alpha, which torch's ops compute."""
    x, alphas = torch.randn(3, 5, 8), torch.tensor([0.2, 0.5, 0.9])
    found = torch.func.vmap(torch.func.grad(lambda x, alpha: F.dyt(x, alpha).sum(), argnums=1))(x, alphas)
    expected = (x * (1 - torch.tanh(alphas[:, None, None] * x) ** 2)).sum((1, 2))
    torch.testing.assert_close(found, expected)


def test_no_columns_and_no_dimensions(backend: str) -> None:
    alpha = torch.tensor([0.5], device=DEVICE, requires_grad=True)
    x, weight, bias = randn(3, 0), randn(0), randn(0)
    y = F.dyt(x, alpha, weight, bias)
    grads = torch.autograd.grad(y.sum(), (x, alpha, weight, bias))
    assert y.shape == (3, 0) and [g.shape for g in grads] == [(3, 0), (1,), (0,), (0,)] and grads[1] == 0
    one = randn()
    y = F.dyt(one, alpha)
    assert y.shape == ()
    torch.testing.assert_close(y, torch.tanh(0.5 * one))
    torch.testing.assert_close(torch.autograd.grad(y, alpha)[0], (one * (1 - y * y)).reshape(1), rtol=1e-5, atol=1e-6)


X, ALPHA = torch.randn(4, 8), torch.ones(1)
BAD = {
    "not a tensor": (lambda: F.dyt(X, 0.5), TypeError, "alpha is float; expected a tensor"),
    "two alphas": (lambda: F.dyt(X, torch.ones(2)), RuntimeError, r"alpha has shape \(2,\); expected \(1,\) or \(\)"),
    "dtype": (lambda: F.dyt(X, torch.ones(1, dtype=torch.int64)), RuntimeError, "alpha has dtype torch.int64"),
    "device": (lambda: F.dyt(X, ALPHA.to("meta")), RuntimeError, "alpha is on meta; expected it on cpu"),
    "weight": (lambda: F.dyt(X, ALPHA, X[0, :4]), RuntimeError, r"weight has shape \(4,\); expected that of the last"),
    "bias": (lambda: F.dyt(X, ALPHA, None, X), RuntimeError, r"bias has shape \(4, 8\); expected that of the last"),
    "of a scalar": (lambda: F.dyt(X[0, 0], ALPHA, X[0]), RuntimeError, r"weight has shape \(8,\)"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_a_named_error(case: str) -> None:
    call, kind, message = BAD[case]
    with pytest.raises(kind, match=message):
        call()
