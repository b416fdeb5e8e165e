"""Helpers for the tests of `convert`: models and converted copies, inputs, results, and entries of the report."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ckpt_kernels import memory
from ckpt_kernels.convert.report import Report

from .conftest import DEVICE

WIDTH, INNER = 32, 48


def random_tensor(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor of normal numbers, the same for each call with a shape."""
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def results_of(model: nn.Module, *inputs: Tensor) -> dict[str, Tensor]:
    """The output of a model, and the gradients of inputs and parameters."""
    model.zero_grad()
    leaves = [x.detach().clone().requires_grad_() if x.is_floating_point() else x for x in inputs]
    y = model(*leaves)
    (y * torch.linspace(-1, 1, y.numel(), device=y.device, dtype=y.dtype).view(y.shape)).sum().backward()
    found = {"output": y.detach()} | {f"grad {i}": x.grad for i, x in enumerate(leaves) if x.grad is not None}
    return found | {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def close(left: dict[str, Tensor], right: dict[str, Tensor], tolerance: float = 1e-4) -> bool:
    """Whether no result differs by more than `tolerance` times the largest number in `left`."""
    largest = max(t.abs().max().item() for t in left.values())
    return left.keys() == right.keys() and all(
        (left[key] - right[key]).abs().max().item() <= tolerance * largest for key in left
    )


def replacement_of(report: Report, name: str) -> str | None:
    """The block that replaces a module, by the report; None if the module is not replaced."""
    return next((entry.by for entry in report.replaced if entry.name == name), None)


def reason_of(report: Any, name: str) -> str | None:
    """The reason for which a module is left alone, by the report; None if there is none."""
    return next((entry.reason for entry in report.left_alone if entry.name == name), None)


def kept(model: nn.Module, *inputs: Tensor) -> int:
    return memory.saved_bytes(model, *[i.detach().clone().requires_grad_() for i in inputs])


def twins(kind: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model = kind().to(DEVICE)
    return model, copy.deepcopy(model)


def mlps() -> nn.Sequential:
    """Three sequences, each of a norm, a linear layer and an activation."""
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.GELU()) for _ in range(3)])


class RMSNormInFloat32(nn.Module):
    """Llama's norm, of which eager torch saves a float32 copy of a 16-bit input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)).to(x.dtype)
