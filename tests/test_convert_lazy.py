"""Models with lazy parameters, and layers of nested tensors: tensors without a single shape take the eager path."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ckpt_kernels
from ckpt_kernels import memory, plan, recompute

WIDTH = 16
LEVELS = ("block", "output", "all", "layer", {"layers.*": "checkpoint"})


class Lazy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.batch_norm = nn.LayerNorm(WIDTH), nn.LazyBatchNorm1d()
        self.first, self.second = nn.LazyLinear(2 * WIDTH), nn.LazyLinear(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.batch_norm(self.second(F.gelu(self.first(self.norm(x)))))


class LazyBuffers(Lazy):
    """A module whose only lazy tensors are buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.batch_norm = nn.LazyBatchNorm1d(affine=False)
        self.first, self.second = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)


class Eager(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.first, self.second = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.gelu(self.first(self.norm(x))))


class Model(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList([kind(), kind()])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def trained(kind: type[nn.Module], level: Any) -> tuple[list[Tensor], list[Tensor]]:
    """The gradients and buffers of a lazy model after two steps; the first step materializes the parameters."""
    torch.manual_seed(0)
    model, x = Model(kind), torch.randn(6, WIDTH)
    if level is not None:
        ckpt_kernels.convert(model, recompute=level)
    for _ in range(2):
        model(x).sin().sum().backward()
    return [p.grad for p in model.parameters() if p.grad is not None], list(model.buffers())


@pytest.mark.parametrize("kind", [Lazy, LazyBuffers])
@pytest.mark.parametrize("level", LEVELS, ids=str)
def test_lazy_models_train_as_they_do_unconverted(level: Any, kind: type[nn.Module]) -> None:
    for found, expected in zip(trained(kind, level), trained(kind, None), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_copies_of_a_lazy_model_are_an_error() -> None:
    x = torch.randn(6, WIDTH)
    with pytest.raises(ValueError, match=r"layers\.0\.batch_norm.weight is a lazy parameter; expected the model to be"):
        ckpt_kernels.convert(Model(Lazy), inputs=x)
    with pytest.raises(ValueError, match=r"layers\.0\.batch_norm.running_mean is a lazy parameter"):
        ckpt_kernels.convert(Model(LazyBuffers), inputs=x)
    with pytest.raises(ValueError, match=r"^weight is a lazy parameter"):
        ckpt_kernels.convert(nn.LazyLinear(WIDTH), inputs=x)
    with pytest.raises(ValueError, match="is a lazy parameter"):
        plan(Model(Lazy), x, budget=1.0)
    assert memory.saved_bytes(Model(Lazy), x) > 0


@pytest.mark.parametrize("level", LEVELS, ids=str)
def test_nested_tensors_give_eager_gradients(level: Any) -> None:
    def gradients(level: Any) -> list[Tensor]:
        torch.manual_seed(0)
        model = Model(Eager)
        if level is not None:
            ckpt_kernels.convert(model, recompute=level)
        x = torch.nested.nested_tensor([torch.ones(3, WIDTH), torch.full((5, WIDTH), 0.3)], requires_grad=True)
        model(x).to_padded_tensor(0.0).sin().sum().backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    torch.testing.assert_close(gradients(level), gradients(None), rtol=1e-4, atol=1e-5)


def test_arguments_of_the_wrong_kind_are_named() -> None:
    three: Any = 3
    with pytest.raises(TypeError, match="fn is int; expected a function or a module"):
        memory.saved_bytes(three)
    with pytest.raises(TypeError, match="fn is int; expected a function"):
        memory.peak_bytes(three)
    with pytest.raises(TypeError, match=r"model is int; expected a torch\.nn\.Module"):
        memory.report(three)
    with pytest.raises(TypeError, match="function is int; expected a function or a module"):
        recompute.layer(three)
    with pytest.raises(TypeError, match=r"module is int; expected a torch\.nn\.Module or None"):
        recompute.discard_outputs(three)
    with pytest.raises(ValueError, match="recompute is ''; expected one of"):
        ckpt_kernels.convert(Model(Eager), recompute="")
