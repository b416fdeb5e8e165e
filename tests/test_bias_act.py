"""`bias_act`: dropout, saved bytes, and errors. The dropout masks are those of the row norms."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from ckpt_kernels import functional as F
from ckpt_kernels import nn
from ckpt_kernels.activations import NAMES
from ckpt_kernels.memory import saved_bytes

from .conftest import DEVICE, serving, unserved


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype).requires_grad_()


def dropped(x: torch.Tensor, p: float, seed: int = 0, **options: object) -> torch.Tensor:
    torch.manual_seed(seed)
    return F.bias_act(x, dropout_p=p, **options)


def test_every_backend_draws_the_mask_of_the_row_norms() -> None:
    for columns in (1, 30, 257, 20000):
        x = torch.ones(3, columns, device=DEVICE)
        torch.manual_seed(0)
        expected = F.add_rms_norm(x, torch.zeros_like(x), columns, dropout_p=0.3)[1]
        # The outputs stay alive, so that no backend gets memory that already holds the mask.
        found = []
        for name in ("reference", "native", "triton", "cuda_on_host"):
            if not unserved(name, x.dtype):
                with serving(name):
                    found.append(dropped(x, 0.3))
                    assert torch.equal(found[-1], expected), name


def test_keep_rate_is_within_four_sigma() -> None:
    p, x = 0.3, torch.ones(2500, 4000, device=DEVICE)
    kept = (dropped(x, p) != 0).double().mean().item()
    assert abs(kept - (1 - p)) < 4 * (p * (1 - p) / x.numel()) ** 0.5


def test_dropout_of_zero_and_one_is_exact(backend: str) -> None:
    x = randn(4, 33)
    assert torch.equal(dropped(x, 0.0), x)
    assert (dropped(x, 1.0) == 0).all()
    assert torch.equal(dropped(x, 0.7, training=False), x)
    assert torch.equal(nn.BiasAct(33, bias=False, dropout=0.7).eval()(x), x)


@pytest.mark.parametrize("activation", ["identity", "relu", "silu"])
def test_dropout_gradients_use_the_forward_mask(activation: str, backend: str) -> None:
    x, bias = randn(70, 41), randn(41)
    torch.manual_seed(3)
    y = F.bias_act(x, bias, activation=activation, dropout_p=0.4)
    torch.manual_seed(3)
    mask = F.bias_act(torch.ones_like(x), dropout_p=0.4)
    plain = F.bias_act(x, bias, activation=activation)
    torch.testing.assert_close(y, plain * mask)
    g = torch.randn_like(y)
    found, expected = torch.autograd.grad(y, (x, bias), g), torch.autograd.grad(plain, (x, bias), g * mask)
    for a, e in zip(found, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)


def test_a_checkpointed_block_redraws_its_mask() -> None:
    x = torch.ones(16, 64, device=DEVICE, requires_grad=True)
    y = checkpoint(nn.BiasAct(64, dropout=0.5).to(DEVICE), x, use_reentrant=False)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())


@pytest.mark.parametrize("activation", NAMES)
def test_saved_bytes_are_the_input_and_a_seed(activation: str) -> None:
    x, bias = randn(8, 16), torch.nn.Parameter(randn(16).detach())
    tensors = 0 if activation == "identity" else 1
    assert saved_bytes(lambda: F.bias_act(x, bias, activation=activation)) == tensors * x.nbytes
    assert saved_bytes(lambda: F.bias_act(x, bias, activation=activation, dropout_p=0.5)) == tensors * x.nbytes + 8


@pytest.mark.parametrize("activation", ["relu", "leaky_relu"])
def test_activations_that_keep_the_output_share_it_with_the_reader(activation: str) -> None:
    x, linear = randn(8, 16), torch.nn.Linear(16, 4).to(DEVICE)
    assert saved_bytes(lambda: linear(F.bias_act(x, activation=activation))) == x.nbytes


X = torch.randn(4, 8)
BAD = {
    "not a tensor": (lambda: F.bias_act(3), TypeError, "input is int"),
    "bias shape": (lambda: F.bias_act(X, X[0, :4]), RuntimeError, r"bias has shape \(4,\); expected that of the last"),
    "bias of a scalar": (lambda: F.bias_act(X[0, 0], X[0]), RuntimeError, r"bias has shape \(8,\)"),
    "device": (lambda: F.bias_act(X, X[0].to("meta")), RuntimeError, "bias is on meta; expected it on cpu"),
    "p": (lambda: F.bias_act(X, dropout_p=-0.5), ValueError, "dropout_p is -0.5"),
    "module's p": (lambda: nn.BiasAct(8, dropout=2.0), ValueError, "dropout is 2.0"),
    "activation": (lambda: F.bias_act(X, activation=None), ValueError, "activation is None"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_a_named_error(case: str) -> None:
    call, kind, message = BAD[case]
    with pytest.raises(kind, match=message):
        call()


def test_repr_of_the_module() -> None:
    assert repr(nn.BiasAct(8)) == "BiasAct(8)"
    assert repr(nn.BiasAct(8, False, activation="gelu", dropout=0.1)) == (
        "BiasAct(8, bias=False, activation='gelu', dropout=0.1)"
    )


@pytest.mark.parametrize("activation", ["identity", "gelu"])
def test_tensors_without_columns(activation: str, backend: str) -> None:
    x, bias = (torch.zeros(*shape, 0, device=DEVICE, requires_grad=True) for shape in ((3,), ()))
    y = F.bias_act(x, bias, activation=activation)
    grad_x, grad_bias = torch.autograd.grad(y.sum(), (x, bias))
    assert y.shape == grad_x.shape == (3, 0) and grad_bias.shape == (0,)
