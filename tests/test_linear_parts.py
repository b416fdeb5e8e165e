"""Modules of several parts with hooks, replaced classes or computed weights: such parts are called one by one."""

from collections.abc import Callable

import pytest
import torch
from torch.nn.utils import prune

from ckpt_kernels import nn
from ckpt_kernels.memory import saved_bytes
from ckpt_kernels.nested_values import tensors_in

from .conftest import DEVICE

Make = Callable[[str], torch.nn.Module]
X = torch.randn(32, 8, generator=torch.Generator().manual_seed(0)).to(DEVICE)
MODULES: dict[str, tuple[Make, tuple[str, ...]]] = {
    "MLP": (lambda level: nn.MLP(8, 16, recompute=level), ("fc1", "fc2")),
    "GatedMLP": (lambda level: nn.GatedMLP(8, 16, recompute=level), ("gate_proj", "up_proj", "down_proj")),
    "GatedMLP (packed)": (
        lambda level: nn.GatedMLP(8, 16, packed=True, layout="value_first", recompute=level),
        ("gate_up_proj", "down_proj"),
    ),
    "NormLinear": (lambda level: nn.NormLinear(8, 5, norm="rms_norm", recompute=level), ("norm", "linear")),
    "NormLinear (two)": (lambda level: nn.NormLinear(8, (5, 6), recompute=level), ("norm", "linears.0", "linears.1")),
}
by_module = pytest.mark.parametrize("name", MODULES)
by_level = pytest.mark.parametrize("level", ["block", "output", "all"])


def outputs(module: torch.nn.Module, input: torch.Tensor = X) -> list[torch.Tensor]:
    return list(tensors_in(module(input)))


@by_level
@by_module
def test_hooks_of_parts_run_once_and_keep_no_more(name: str, level: str) -> None:
    make, parts = MODULES[name]
    module = make(level).to(DEVICE)
    x = X.clone().requires_grad_()
    expected, kept = outputs(module), saved_bytes(module, x)
    seen: list[str] = []
    for part in parts:
        module.get_submodule(part).register_forward_hook(lambda *_, part=part: seen.append(part))
    torch.testing.assert_close(outputs(module), expected)
    assert seen == list(parts)
    biases = sum(p.nbytes for p in module.parameters() if p.dim() == 1)
    assert saved_bytes(module, x) <= kept + biases


@by_level
@by_module
def test_a_part_with_its_own_forward_is_called(name: str, level: str) -> None:
    make, parts = MODULES[name]
    module = make(level).to(DEVICE)
    expected = outputs(module)

    class Adapted(torch.nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input) + 1

    module.get_submodule(parts[-1]).__class__ = Adapted
    torch.testing.assert_close(outputs(module)[-1], expected[-1] + 1)


def test_a_part_whose_weight_is_computed_before_each_call_is_trained() -> None:
    module = nn.MLP(8, 16).to(DEVICE)
    prune.l1_unstructured(module.fc1, "weight", amount=0.5)
    for _ in range(2):
        module(X).sum().backward()
    assert ((module.fc1.weight_orig.grad == 0) | (module.fc1.weight_mask == 1)).all()


@by_level
def test_dropout_between_parts_drops_only_in_training(level: str) -> None:
    module = nn.MLP(8, 16, dropout=0.5, recompute=level).to(DEVICE)
    read: list[torch.Tensor] = []
    module.fc2.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    module(X), module.eval()(X)
    assert 0.3 < (read[0] == 0).double().mean() < 0.7
    assert (read[1] != 0).all()
