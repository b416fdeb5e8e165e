"""The arguments `include` and `exclude` of `convert`, invalid arguments, and repeated conversions."""

from typing import Any

import pytest
import torch
from torch import nn

import ckpt_kernels

from .conftest import DEVICE
from .conversion import WIDTH, equal, mlps, random_tensor, reason_of, results_of


@pytest.mark.parametrize(
    ("options", "expected"),
    (
        ({}, {"0.0", "0.2", "1.0", "1.2", "2.0", "2.2"}),
        ({"exclude": ["1"]}, {"0.0", "0.2", "2.0", "2.2"}),
        ({"include": ["1"]}, {"1.0", "1.2"}),
        ({"exclude": [nn.GELU]}, {"0.0", "1.0", "2.0"}),
        ({"include": nn.LayerNorm, "exclude": "?.0"}, set()),
        ({"include": ["*.2"], "exclude": ["0*"]}, {"1.2", "2.2"}),
    ),
)
def test_include_and_exclude(options: dict[str, Any], expected: set[str]) -> None:
    report = ckpt_kernels.convert(mlps(), **options)
    assert {entry.name for entry in report.replaced} == expected
    assert {e.name for e in report.left_alone} == {f"{i}.{j}" for i in range(3) for j in (0, 2)} - expected


def test_excluded_modules_are_not_fused() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, 64), nn.GELU(), nn.Linear(64, WIDTH))
    report = ckpt_kernels.convert(model, exclude=["1"])
    assert not report.replaced and reason_of(report, "1") == "not selected"


def test_converting_twice_and_reverting_twice_change_nothing() -> None:
    model = mlps().to(DEVICE)
    first, kinds = ckpt_kernels.convert(model), [type(m) for m in model.modules()]
    assert str(ckpt_kernels.convert(model)) == str(first) and [type(m) for m in model.modules()] == kinds
    ckpt_kernels.revert(model)
    ckpt_kernels.revert(model)
    fresh = mlps().to(DEVICE)
    assert [type(m) for m in model.modules()] == [type(m) for m in fresh.modules()]
    assert [vars(m).keys() for m in model.modules()] == [vars(m).keys() for m in fresh.modules()]
    assert equal(results_of(model, random_tensor(4, WIDTH)), results_of(fresh, random_tensor(4, WIDTH)))


def test_bad_arguments_are_named() -> None:
    with pytest.raises(TypeError, match=r"model is int; expected a torch.nn.Module"):
        ckpt_kernels.convert(3)
    with pytest.raises(ValueError, match=r"recompute is 'some'; expected one of block, output, all"):
        ckpt_kernels.convert(mlps(), recompute="some")
    with pytest.raises(ValueError, match=r"recompute is 'checkpoint', a level of single modules; .* mapping of names"):
        ckpt_kernels.convert(mlps(), recompute="checkpoint")
    with pytest.raises(ValueError, match=r"exclude names 'layers.0'; expected a name"):
        ckpt_kernels.convert(mlps(), exclude=["layers.0"])
    with pytest.raises(TypeError, match=r"include has 3; expected names or classes"):
        ckpt_kernels.convert(mlps(), include=[3])
    with pytest.raises(TypeError, match=r"model is compiled already"):
        ckpt_kernels.convert(torch.compile(mlps()))


def test_a_forward_that_was_replaced_on_the_instance_is_left_alone() -> None:
    model = mlps()
    model[0][0].forward = lambda input: input
    report = ckpt_kernels.convert(model)
    assert reason_of(report, "0.0") == "its forward was replaced on the instance"
    assert torch.equal(model[0][0](random_tensor(3, WIDTH)), random_tensor(3, WIDTH))
