"""Every activation and derivative, over the whole range of float32, on every backend."""

import pathlib
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ckpt_kernels import functional
from ckpt_kernels.activations import CODES, NAMES, activation_name
from ckpt_kernels.backends.reference import ACTIVATIONS, SLOPES

from .conftest import DEVICE, emulated

ROOT = pathlib.Path(__file__).parent.parent


def whole_range(fine: bool = True) -> torch.Tensor:
    """Values from denormals to the greatest float32, of both signs, with kinks and their neighbours."""
    magnitudes = torch.cat(
        [
            torch.logspace(-45, 38, 400 if fine else 84, dtype=torch.float64).float(),
            torch.linspace(0, 100, 2001 if fine else 401),
            torch.tensor([0.0, 1e-40, 1.0, 3.0, 6.0, 20.0, 88.7, 103.9, torch.finfo(torch.float32).max]),
        ]
    )
    kinks = torch.tensor([1.0, 3.0, 6.0, 20.0])
    magnitudes = torch.cat([magnitudes, torch.nextafter(kinks, torch.tensor(0.0)), torch.nextafter(kinks, kinks * 2)])
    return torch.cat([magnitudes, -magnitudes])


def value_and_derivative(name: str, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The activation and its derivative, by a block whose gate is the activation of x.

    A row norm over one column of ones without eps is exactly one, so the block returns the activation.
    """
    leaf = x.reshape(-1, 1).clone().requires_grad_()
    y = functional.gated_rms_norm(torch.ones_like(leaf), leaf, 1, eps=0.0, activation=name)
    (derivative,) = torch.autograd.grad(y.sum(), leaf)
    return y.detach().reshape(-1), derivative.reshape(-1)


def eager(name: str, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = x.clone().requires_grad_()
    y = ACTIVATIONS[name](leaf)
    (derivative,) = torch.autograd.grad(y.sum(), leaf)
    return y.detach(), derivative


@pytest.mark.parametrize("name", NAMES)
def test_value_and_derivative_over_the_whole_range(name: str, backend: str) -> None:
    # Emulated kernels are slow for each row.
    x = whole_range(fine=not emulated(backend)).to(DEVICE)
    for found, theirs, truth in zip(
        value_and_derivative(name, x), eager(name, x), eager(name, x.double()), strict=True
    ):
        # Where the result or an intermediate of eager torch overflows float32, there is no error to compare.
        inside = (truth.abs() < 1e38) & theirs.isfinite()
        allowed = 2e-6 * truth.abs() + 1.5 * (theirs.double() - truth).abs() + 3e-7
        wrong = inside & ~((found.double() - truth).abs() <= allowed)
        assert not wrong.any(), list(zip(x[wrong][:5], found[wrong][:5], truth[wrong][:5], strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_infinities_and_nan_are_torchs(name: str, backend: str) -> None:
    x = torch.tensor([float("inf"), -float("inf"), float("nan")], device=DEVICE)
    value, _ = value_and_derivative(name, x)
    # At infinity some of torch's kernels return NaN and others the limit; both are accepted.
    for found, theirs, wide in zip(value, eager(name, x)[0], eager(name, x.double())[0], strict=True):
        assert found.isnan() if theirs.isnan() and wide.isnan() else found in (theirs, wide) or found.isnan()
    assert value[2].isnan()


def test_float64_is_exact() -> None:
    x = torch.linspace(-30, 30, 4001, dtype=torch.float64)
    for name in NAMES:
        for found, truth in zip(value_and_derivative(name, x), eager(name, x), strict=True):
            torch.testing.assert_close(found, truth, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["silu", "sigmoid"])
@pytest.mark.parametrize(("dtype", "least"), [(torch.float32, -85.0), (torch.float64, -690.0)])
def test_nearly_zero_slopes_have_a_small_relative_error(name: str, dtype: torch.dtype, least: float) -> None:
    """As far out as the exponential is finite."""
    x = torch.linspace(least, -20, 400, dtype=dtype)
    found, truth = value_and_derivative(name, x)[1].double(), eager(name, x.double())[1]
    # The relative error of an exponential is the absolute error of the argument.
    assert (found / truth - 1).abs().max() <= 2 * -least * torch.finfo(dtype).eps


@pytest.mark.parametrize("name", NAMES)
def test_slopes_of_the_reference_are_autograds(name: str) -> None:
    x = torch.cat([whole_range(), torch.tensor([float("inf"), -float("inf"), float("nan")])]).to(DEVICE)
    x.requires_grad_()
    for scale in (1.0, -0.37):
        grad = torch.full_like(x, scale)
        (expected,) = torch.autograd.grad(ACTIVATIONS[name](x), x, grad)
        torch.testing.assert_close(SLOPES[name](grad, x.detach()), expected, rtol=0, atol=0, equal_nan=True)


def test_every_table_has_every_activation() -> None:
    assert set(ACTIVATIONS) == set(SLOPES) == set(NAMES)
    header = (ROOT / "csrc" / "math" / "activations.h").read_text()
    table = dict(re.findall(r"X\((\d+), (\w+)\)", header))
    assert [table[str(code)].lower() for code in CODES.values()] == [name.replace("_", "") for name in NAMES]
    folder = ROOT / "ckpt_kernels" / "backends" / "triton"
    triton = "".join((folder / f"{file}.py").read_text() for file in ("piecewise", "activations"))
    for name in NAMES:
        assert f"def {name}(x):" in triton and f"def {name}_grad(x):" in triton
        assert triton.count(f'ACTIVATION == "{name}"') == 2


@pytest.mark.parametrize(
    "given,name",
    [
        (nn.GELU(), "gelu"),
        (nn.GELU(approximate="tanh"), "gelu_tanh"),
        (nn.SiLU(), "silu"),
        (nn.LeakyReLU(), "leaky_relu"),
        (nn.Softplus(), "softplus"),
        (nn.Identity(), "identity"),
        (nn.ReLU6(), "relu6"),
        (nn.Hardtanh(), "hardtanh"),
        (nn.Hardtanh(0, 6), "relu6"),
        (F.silu, "silu"),
        (F.gelu, "gelu"),
        (torch.tanh, "tanh"),
        (torch.relu, "relu"),
        (F.relu6, "relu6"),
        (F.hardtanh, "hardtanh"),
        ("mish", "mish"),
    ],
)
def test_torchs_modules_and_functions_are_accepted(given: object, name: str) -> None:
    assert activation_name(given) == name


CHANGED_RELU6 = nn.ReLU6()
CHANGED_RELU6.max_val = 4.0
OTHERS = (
    *(nn.ELU(alpha=2.0), nn.Softplus(beta=2.0), nn.PReLU(), CHANGED_RELU6),
    *(nn.Hardtanh(-1, 6), nn.Hardtanh(0, 1), nn.Hardtanh(0, 4)),
    *("swish", None, 3, torch.sin),
)


@pytest.mark.parametrize("given", OTHERS)
def test_other_activations_are_an_error(given: object) -> None:
    with pytest.raises(ValueError, match="activation is"):
        activation_name(given)
