"""Layers of real networks, of eager torch's modules or of ours, for the benchmarks and the tests of floors.

Each class takes `level`: "eager" for torch's own modules, else the `recompute` of ours. At "output" and "all" a forward
pass must run within `recompute.discard_outputs()`. At "layer" the modules are those of "all", and a forward pass
must run as a `recompute.layer`. `runner` does both.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ckpt_kernels.nn as ours
from ckpt_kernels.functional import rotary
from ckpt_kernels.levels import OF_MODELS
from ckpt_kernels.recompute import discard_outputs, layer

LEVELS = ("eager", *OF_MODELS)


def runner(module: nn.Module, level: str) -> Callable[..., Tensor]:
    """A callable that runs a module as this level requires."""
    if level == "layer":
        return layer(module)
    return discard_outputs()(module.forward) if level in ("output", "all") else module


def _within(level: str) -> str:
    """The level of the modules inside a layer."""
    return "all" if level == "layer" else level


class EagerAddRMSNorm(nn.RMSNorm):
    def forward(self, input: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        total = residual + input
        return super().forward(total), total


class EagerAddLayerNorm(nn.LayerNorm):
    def forward(self, input: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        total = residual + input
        return super().forward(total), total


class EagerGatedMLP(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class EagerMLP(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class LlamaLayer(nn.Module):
    """RMSNorm, attention with rotary embeddings, RMSNorm, gated MLP; (batch, tokens, width) to the same."""

    def __init__(self, width: int, heads: int, hidden: int, tokens: int, level: str) -> None:
        super().__init__()
        self.eager = eager = level == "eager"
        self.heads = heads
        self.norm1 = (nn.RMSNorm if eager else ours.RMSNorm)(width, 1e-6)
        self.norm2 = (EagerAddRMSNorm if eager else ours.AddRMSNorm)(width, 1e-6)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.mlp = EagerGatedMLP(width, hidden) if eager else ours.GatedMLP(width, hidden, recompute=_within(level))
        size = width // heads
        angles = torch.outer(torch.arange(tokens), 10000 ** -(torch.arange(0, size, 2) / size)).repeat(1, 2)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def rotated(self, x: Tensor) -> Tensor:
        if not self.eager:
            return rotary(x, self.cos, self.sin)
        first, second = x.chunk(2, -1)
        return x * self.cos + torch.cat((-second, first), -1) * self.sin

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = (p(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q, self.k, self.v))
        heads = F.scaled_dot_product_attention(self.rotated(q), self.rotated(k), v, is_causal=True)
        y, residual = self.norm2(self.out(heads.transpose(1, 2).flatten(2)), x)
        return residual + self.mlp(y)


class GPT2Layer(nn.Module):
    """LayerNorm, attention, LayerNorm, MLP; (batch, tokens, width) to the same."""

    def __init__(self, width: int, heads: int, level: str) -> None:
        super().__init__()
        eager = level == "eager"
        self.heads = heads
        self.norm1 = (nn.LayerNorm if eager else ours.LayerNorm)(width)
        self.norm2 = (EagerAddLayerNorm if eager else ours.AddLayerNorm)(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = EagerMLP(width, 4 * width) if eager else ours.MLP(width, 4 * width, recompute=_within(level))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        heads = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        y, residual = self.norm2(self.out(heads), x)
        return residual + self.mlp(y)


class EagerBatchNormAct(nn.BatchNorm2d):
    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        y = super().forward(input)
        return F.relu(y if residual is None else y + residual)


class OurBatchNormAct(ours.BatchNorm2d):
    def __init__(self, channels: int) -> None:
        super().__init__(channels, activation="relu")


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions with batch norms, as in ResNet; (batch, 4 * width, height, width) to the same."""

    def __init__(self, width: int, level: str) -> None:
        super().__init__()
        norm = EagerBatchNormAct if level == "eager" else OurBatchNormAct
        self.conv1, self.norm1 = nn.Conv2d(4 * width, width, 1, bias=False), norm(width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, padding=1, bias=False), norm(width)
        self.conv3, self.norm3 = nn.Conv2d(width, 4 * width, 1, bias=False), norm(4 * width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(self.norm1(self.conv1(x))))
        return self.norm3(self.conv3(y), x)


class EagerGroupNormAct(nn.GroupNorm):
    def forward(self, input: Tensor) -> Tensor:
        return F.silu(super().forward(input))


class UNetBlock(nn.Module):
    """A residual block of a diffusion UNet: twice GroupNorm, SiLU and a 3x3 convolution; the time is added between."""

    def __init__(self, width: int, level: str) -> None:
        super().__init__()
        if level == "eager":
            self.norm1, self.norm2 = (EagerGroupNormAct(32, width) for _ in range(2))
        else:
            self.norm1, self.norm2 = (ours.GroupNorm(32, width, activation="silu") for _ in range(2))
        self.conv1, self.conv2 = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.time = nn.Linear(width, width)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        y = self.conv1(self.norm1(x)) + self.time(time)[:, :, None, None]
        return x + self.conv2(self.norm2(y))
