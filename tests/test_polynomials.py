"""The polynomials of csrc/cpu/polynomials.h: Remez finds them, errors are as stated, and Triton's are the same."""

import ast
import math
import re
from dataclasses import replace

import pytest
import torch

from ckpt_kernels import functional
from tools.polynomials import (
    HEADER,
    LOG2_NORMAL_TAIL,
    POLYNOMIALS,
    ROUGH_LOG2_NORMAL_TAIL,
    Polynomial,
    coefficients,
    fused,
    greatest_error,
    greatest_ulp,
    horner,
    in_float64,
    remez,
    rounded,
    separate,
)

from .conftest import DEVICE, serving, unserved

TRITON = HEADER.parent.parent.parent / "ckpt_kernels" / "backends" / "triton" / "elementary.py"
STATED = {name: float(ulp) for ulp, name in re.findall(r"([\d.]+) ulp of ([\w ]+)[,.]", HEADER.read_text())}
# One polynomial for each array of coefficients.
ARRAYS = list({p.name: p for p in POLYNOMIALS.values()}.values())


def test_every_polynomial_has_a_script_and_a_stated_error() -> None:
    assert set(STATED) == set(POLYNOMIALS)
    assert {p.name for p in ARRAYS} == set(re.findall(r"constexpr float (\w+)\[\]", HEADER.read_text()))


def test_the_documentation_states_the_same_errors() -> None:
    table = (HEADER.parent.parent.parent / "docs" / "numerics.md").read_text().partition("greatest error |")[2]
    listed = re.findall(r"\| ([\d.]+) \|$", table, re.MULTILINE)
    names = ["exp", "expm1", "exp2", "log1p", "normal tail up to 6", "normal tail"]
    assert [float(error) for error in listed] == [STATED[name] for name in names]


@pytest.mark.parametrize("p", ARRAYS, ids=lambda p: p.name)
def test_remez_finds_the_polynomial(p: Polynomial) -> None:
    """Coefficients agree within 1e-4, and the polynomial in use is as accurate as the one found here."""
    found, used = remez(p, 5_001), p.in_use()
    assert all(abs(a - b) <= 1e-4 * abs(b) for a, b in zip(found, used, strict=True)), list(
        zip(found, used, strict=True)
    )
    least = greatest_error(p, rounded(found), 20_001)
    assert greatest_error(p, used, 20_001) <= 1.05 * least
    assert greatest_error(p, found, 20_001) <= least


@pytest.mark.parametrize("p", ARRAYS, ids=lambda p: p.name)
def test_the_greatest_relative_error_is_the_stated_one(p: Polynomial) -> None:
    before = HEADER.read_text().partition(f"float {p.name}[]")[0]
    stated = float(re.findall(r"Greatest error: 2\^(-[\d.]+) of", before)[-1])
    assert math.log2(greatest_error(p, p.in_use())) == pytest.approx(stated, abs=0.06)


@pytest.mark.parametrize("function", POLYNOMIALS)
def test_the_greatest_error_in_ulp_is_the_stated_one(function: str) -> None:
    p = POLYNOMIALS[function]
    measured = max(greatest_ulp(p, multiply_add, 100_001) for multiply_add in (fused, separate))
    assert 0.8 * STATED[function] <= measured <= STATED[function]


def test_a_changed_coefficient_is_detected() -> None:
    """One coefficient of expm1 changes by a factor of 1.00001."""
    p = POLYNOMIALS["expm1"]
    used = coefficients(p.name)
    wrong = replace(p, float32=lambda x, _, mad: p.float32(x, [used[0], used[1] * 1.00001, *used[2:]], mad))
    assert greatest_ulp(wrong, fused, 100_001) > STATED["expm1"]


@pytest.mark.parametrize("name", ["exp", "expm1"])
def test_the_library_is_as_accurate_as_stated(name: str) -> None:
    """ELU below 0 is expm1, and the derivative is exp."""
    if unserved("native", torch.float32) or DEVICE != "cpu":
        pytest.skip("there is no CPU library")
    x = torch.linspace(-20, -1e-6, 200_001, dtype=torch.float64).float().requires_grad_()
    with serving("native"):
        y = functional.bias_act(x, activation="elu")
        (slope,) = torch.autograd.grad(y.sum(), x)
    found, truth = (y, torch.expm1(x.detach().double())) if name == "expm1" else (slope, torch.exp(x.detach().double()))
    ulp = torch.exp2(truth.abs().log2().floor() - 23)
    assert float(((found.detach().double() - truth).abs() / ulp).max()) <= STATED[name]


@pytest.mark.parametrize(
    "name,function,variable,last",
    [
        ("expm1_coefficients", "expm1_nonpositive", "r", "q"),
        ("log1p_coefficients", "log1p_unit", "z", "q"),
    ],
)
def test_triton_has_the_same_coefficients(name: str, function: str, variable: str, last: str) -> None:
    """The assignments of the polynomial in Triton's function give the bits of Horner's rule."""
    module = ast.parse(TRITON.read_text())
    body = next(node for node in module.body if isinstance(node, ast.FunctionDef) and node.name == function).body
    lines = [
        ast.unparse(node)
        for node in body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == last
    ]
    assert lines
    for point in (0.1, 0.2345, 0.3):
        names = {variable: point}
        exec("\n".join(lines), {}, names)
        expected = horner(coefficients(name), torch.tensor(point, dtype=torch.float64), in_float64)
        assert names[last] == float(expected)


@pytest.mark.parametrize("p", [LOG2_NORMAL_TAIL, ROUGH_LOG2_NORMAL_TAIL], ids=lambda p: p.name)
def test_remez_finds_tritons_logarithm_of_the_normal_tail(p: Polynomial) -> None:
    """Coefficients agree within 1e-3, and the errors with an exact exponent and in float32 are at most as stated."""
    used, found = p.in_use(), remez(p, 5_001)
    assert all(abs(a - b) <= 1e-3 * abs(b) for a, b in zip(found, used, strict=True)), (found, used)
    assert greatest_error(p, used, 20_001) <= 1.05 * greatest_error(p, rounded(found), 20_001)
    function = TRITON.read_text().partition(f"def {p.name}(")[2]
    stated = re.findall(
        r"the tail is at most ([\d.e-]+\d) with an exact p, and ([\d.e-]+\d) with p in float32", function
    )[0]
    x = torch.linspace(0, 6, 100_001, dtype=torch.float32)
    true = 0.5 * torch.special.erfc(x.double() / math.sqrt(2))
    exact = torch.exp2(horner(used, x.double(), in_float64))
    assert float(((exact - true) / true).abs().max()) <= float(stated[0])
    for multiply_add in (fused, separate):
        tail = p.float32(x, p.written(p.name), multiply_add).double()
        assert float(((tail - true) / true).abs().max()) <= float(stated[1])
