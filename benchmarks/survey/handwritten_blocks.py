"""Hand-written blocks: gated MLPs, custom norms, convolutions, mixers, experts."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ChunkedSwiGLU(nn.Module):
    """Has no children: the weights are parameters of the module, and one product is split in two."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.w_in = nn.Parameter(torch.randn(4 * width, width) / math.sqrt(width))
        self.w_out = nn.Parameter(torch.randn(width, 2 * width) / math.sqrt(2 * width))

    def forward(self, x: Tensor) -> Tensor:
        gate, up = F.linear(x, self.w_in).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, self.w_out)


class SwiGLU(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, 2 * width, bias=False)
        self.up = nn.Linear(width, 2 * width, bias=False)
        self.down = nn.Linear(2 * width, width, bias=False)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.gate(x)) * self.up(x))


class GatedByGLU(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.project = nn.Linear(width, 2 * width)
        self.glu = nn.GLU(dim=-1)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.glu(self.project(x)))


class RMSNorm(nn.Module):
    """The norm of Llama, with a literal eps."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).type_as(x)


class ScaleNorm(nn.Module):
    """Scales by the norm of a row and by one plus the weight."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))
        self.scale = width**0.5

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1) * self.scale * (1 + self.weight)


class HandLayerNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(-1, keepdim=True)
        variance = (x - mean).pow(2).mean(-1, keepdim=True)
        return (x - mean) / torch.sqrt(variance + 1e-5) * self.weight + self.bias


class Norms(nn.Module):
    """Several norms in sequence, each before a product."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([RMSNorm(width), ScaleNorm(width), HandLayerNorm(width)])
        self.products = nn.ModuleList([nn.Linear(width, width) for _ in self.norms])

    def forward(self, x: Tensor) -> Tensor:
        for norm, product in zip(self.norms, self.products, strict=True):
            x = x + product(F.gelu(norm(x)))
        return x


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, 4, width // 4).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, width))


class Block(nn.Module):
    """A transformer layer, with pre-norms or post-norms."""

    def __init__(self, width: int, before: bool = True) -> None:
        super().__init__()
        self.before = before
        self.attention = Attention(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        if self.before:
            x = x + self.attention(self.norm1(x))
            return x + self.mlp(self.norm2(x))
        x = self.norm1(x + self.attention(x))
        return self.norm2(x + self.mlp(x))


class ConvNeXtBlock(nn.Module):
    """Channels last from the depthwise convolution on."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.wide = nn.Linear(width, 4 * width)
        self.narrow = nn.Linear(4 * width, width)
        self.gamma = nn.Parameter(1e-1 * torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        inner = self.depthwise(x).permute(0, 2, 3, 1)
        inner = self.gamma * self.narrow(F.gelu(self.wide(self.norm(inner))))
        return x + inner.permute(0, 3, 1, 2)


class Basic(nn.Module):
    """The basic block of ResNet: one activation used twice, in place."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.relu(self.bn1(self.conv1(x)))
        inner = self.bn2(self.conv2(inner))
        inner += x
        return self.relu(inner)


class Bottleneck(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        sizes = [(width, width // 4, 1), (width // 4, width // 4, 3), (width // 4, width, 1)]
        self.convs = nn.ModuleList([nn.Conv2d(i, o, k, padding=k // 2, bias=False) for i, o, k in sizes])
        self.norms = nn.ModuleList([nn.BatchNorm2d(o) for _, o, _ in sizes])

    def forward(self, x: Tensor) -> Tensor:
        inner = x
        for index, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            inner = norm(conv(inner))
            if index < 2:
                inner = F.relu(inner)
        return F.relu(inner + x)


class SqueezeExcite(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.GroupNorm(8, width)
        self.squeeze = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(width, width // 4, 1), nn.SiLU(), nn.Conv2d(width // 4, width, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        inner = F.silu(self.norm(self.conv(x)))
        return x + inner * torch.sigmoid(self.squeeze(inner))


class Mixer(nn.Module):
    def __init__(self, width: int, length: int = 24) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.tokens = nn.Sequential(nn.Linear(length, 2 * length), nn.GELU(), nn.Linear(2 * length, length))
        self.channels = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.norms[0](x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norms[1](x))


class GMLP(nn.Module):
    """A spatial gate, over positions."""

    def __init__(self, width: int, length: int = 24) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.wide = nn.Linear(width, 4 * width)
        self.gate_norm = nn.LayerNorm(2 * width)
        self.places = nn.Conv1d(length, length, 1)
        self.narrow = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        kept, gate = F.gelu(self.wide(self.norm(x))).chunk(2, dim=-1)
        return x + self.narrow(kept * self.places(self.gate_norm(gate)))


class Experts(nn.Module):
    """Routes each token to the best two of four experts."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.router = nn.Linear(width, 4, bias=False)
        self.experts = nn.ModuleList([SwiGLU(width) for _ in range(4)])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        flat = x.flatten(0, -2)
        scores = self.router(flat).softmax(-1)
        weights, picked = scores.topk(2, dim=-1)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            token, slot = (picked == number).nonzero(as_tuple=True)
            if len(token):
                out.index_add_(0, token, expert(flat[token]) * weights[token, slot, None])
        return out.view_as(x), scores
