"""The arguments `include` and `exclude` of `convert`, invalid arguments, and repeated conversions."""

from typing import Any

import pytest
import torch
from torch import nn

import ckpt_kernels

from .conftest import DEVICE
from .conversion import WIDTH, equal, kept, mlps, random_tensor, reason_of, results_of


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


def test_a_shared_module_has_several_names() -> None:
    model = mlps()
    model.again = model[1][2]
    report = ckpt_kernels.convert(model, include=["again"])
    assert [entry.name for entry in report.replaced] == ["1.2"]


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
    with pytest.raises(TypeError, match=r"exclude has <class 'int'>; expected names or classes of modules"):
        ckpt_kernels.convert(mlps(), exclude=[int])
    with pytest.raises(TypeError, match=r"model is compiled already"):
        ckpt_kernels.convert(torch.compile(mlps()))


def test_a_forward_that_was_replaced_on_the_instance_is_left_alone() -> None:
    model = mlps()
    model[0][0].forward = lambda input: input
    report = ckpt_kernels.convert(model)
    assert reason_of(report, "0.0") == "its forward was replaced on the instance"
    assert torch.equal(model[0][0](random_tensor(3, WIDTH)), random_tensor(3, WIDTH))


@pytest.mark.parametrize(
    ("recompute", "described"),
    [
        ({"first": "layer"}, "1 x all, 2 x layer"),
        ({"first.*": "layer"}, "2 x layer"),
        ({"first.0.1": "layer"}, "1 x layer"),
        ({"first": "output"}, "1 x output"),
        ({"third": "layer"}, "1 x layer"),
    ],
)
def test_the_level_layer_by_name_holds_for_the_layers_inside(recompute: dict[str, str], described: str) -> None:
    def layer() -> nn.Module:
        return nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))

    model = nn.Sequential()
    for name in ("first", "second"):
        model.add_module(name, nn.Sequential(layer(), layer()))
    model.add_module("third", nn.Linear(WIDTH, WIDTH))
    assert ckpt_kernels.convert(model, recompute=recompute).recompute == f"by module: {described}"


def test_members_of_a_list_that_are_single_modules_are_no_layers() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
    assert ckpt_kernels.convert(model, recompute={"": "layer"}).recompute == "by module: 1 x layer"


def test_a_level_keeps_the_same_tensors_as_by_name() -> None:
    def kept_at(recompute: Any) -> int:
        model = mlps().to(DEVICE)
        ckpt_kernels.convert(model, recompute=recompute)
        return kept(model, random_tensor(4, WIDTH))

    found = {level: kept_at(level) for level in ("block", "output", "all")}
    assert found == {level: kept_at({"": level}) for level in found}
    assert found["block"] > found["output"] > found["all"]


def test_the_level_block_leaves_modules_without_blocks_as_they_are() -> None:
    model = nn.Module()
    model.layers = nn.ModuleList(mlps())
    for layer in model.layers:
        layer[0] = layer[2] = nn.Identity()
    ckpt_kernels.convert(model, recompute="block")
    assert not any(map(ckpt_kernels.is_converted, model.layers))
