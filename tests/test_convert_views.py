"""Outputs of a converted module are views only if the original's outputs are."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ckpt_kernels
from ckpt_kernels.memory import saved_bytes

from .conftest import DEVICE


class OverChannels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(16)), nn.Parameter(torch.rand(16))

    def forward(self, x: Tensor) -> Tensor:
        u = x.mean(1, keepdim=True)
        x = (x - u) / torch.sqrt((x - u).pow(2).mean(1, keepdim=True) + 1e-6)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class OverRows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(16))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class Quick(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class SumAndNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + x)


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return self.act(a) * b


_KINDS: dict[str, Callable[[], nn.Module]] = {
    "over channels": OverChannels,
    "over rows": OverRows,
    "quick": Quick,
    "sum and norm": SumAndNorm,
    "gate": Gate,
    "layer norm": lambda: nn.LayerNorm(16),
    "rms norm": lambda: nn.RMSNorm(16),
    "group norm": lambda: nn.GroupNorm(4, 16),
    "batch norm 1d": lambda: nn.BatchNorm1d(16),
    "batch norm 2d": lambda: nn.BatchNorm2d(16),
    "instance norm 1d": lambda: nn.InstanceNorm1d(16, affine=True),
    "instance norm 2d": lambda: nn.InstanceNorm2d(16, affine=True),
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "glu": nn.GLU,
    "dropout": lambda: nn.Dropout(0.3),
    "norm and gelu": lambda: nn.Sequential(nn.LayerNorm(16), nn.GELU()),
    "norm and silu": lambda: nn.Sequential(nn.GroupNorm(4, 16), nn.SiLU()),
    "norm and relu": lambda: nn.Sequential(nn.BatchNorm2d(16), nn.ReLU()),
    "gelu and dropout": lambda: nn.Sequential(nn.GELU(), nn.Dropout(0.3)),
}


def layouts() -> dict[str, Tensor]:
    last = torch.channels_last
    made = {
        "vector": torch.randn(16),
        "rows": torch.randn(5, 16),
        "columns": torch.randn(16, 5).t(),
        "samples of rows": torch.randn(2, 5, 16),
        "rows of samples": torch.randn(5, 2, 16).transpose(0, 1),
        "channels": torch.randn(2, 16, 6),
        "channels that lie last": torch.randn(2, 6, 16).transpose(1, 2),
        "map": torch.randn(2, 16, 4, 4),
        "map that lies last": torch.randn(2, 16, 4, 4).to(memory_format=last),
        "point": torch.randn(2, 16, 1, 1),
        "part of a map": torch.randn(2, 32, 4, 4)[:, :16],
        "heads": torch.randn(2, 4, 5, 16).transpose(1, 2),
        "one sample": torch.randn(16, 4, 4),
    }
    return {name: tensor.to(DEVICE) for name, tensor in made.items()}


def outcome(module: nn.Module, input: Tensor, grad: bool) -> Tensor | type[Exception]:
    try:
        with torch.set_grad_enabled(grad):
            return module(input.detach().requires_grad_(grad))
    except (RuntimeError, ValueError, IndexError) as error:
        return type(error)


@pytest.mark.parametrize("kind", _KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_are_views_only_if_the_originals_are(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(_KINDS[kind]()).to(DEVICE, dtype)
    converted = copy.deepcopy(model)
    ckpt_kernels.convert(converted)
    for name, input in layouts().items():
        for grad in (True, False):
            theirs, ours = (outcome(module, input.to(dtype), grad) for module in (model, converted))
            if not isinstance(theirs, Tensor):
                assert ours is theirs, name
                continue
            assert theirs._is_view() or not ours._is_view(), name
            if not theirs._is_view():
                ours.detach_().mul_(torch.ones((), device=DEVICE, requires_grad=True))


class MovedNorm(nn.LayerNorm):
    """A norm over the channels of a map, which a copy moves back."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4:
            raise ValueError(f"expected 4 dimensions, got {x.shape}")
        x = F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2).contiguous()


class WrittenNorm(nn.LayerNorm):
    """The same, written to between two copies."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4:
            raise ValueError(f"expected 4 dimensions, got {x.shape}")
        x = F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        moved = x.permute(0, 3, 1, 2).contiguous()
        self.write(x)
        return moved + x.permute(0, 3, 1, 2).contiguous().tanh()

    def write(self, x: Tensor) -> None:
        x.mul_(2.0)


@pytest.mark.parametrize("kind", [MovedNorm, WrittenNorm])
def test_the_copy_of_a_norm_of_a_moved_map_is_recomputed(kind: type[nn.LayerNorm]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 1), kind(16), nn.Conv2d(16, 4, 3)).to(DEVICE)
    twin, x = copy.deepcopy(model), torch.randn(2, 3, 12, 12, device=DEVICE)
    ckpt_kernels.convert(model)
    if kind is MovedNorm:
        assert saved_bytes(model, x) <= 0.6 * saved_bytes(twin, x)
    gradients = [torch.autograd.grad(each(x).square().sum(), list(each.parameters())) for each in (model, twin)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))
