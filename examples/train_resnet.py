"""Trains a small ResNet of bottlenecks to tell the direction of stripes under noise, in generated images."""

import math
import sys

import torch
import torch.nn.functional as F
from side_by_side import main
from torch import Tensor, nn

import ckpt_kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WIDTH, BLOCKS, SIZE, BATCH = (64, 4, 64, 64) if DEVICE == "cuda" else (32, 2, 32, 16)
CLASSES = 8


class EagerNormAct(nn.BatchNorm2d):
    """Batch norm, the residual if there is one, and ReLU, in eager torch."""

    def __init__(self, channels: int, activation: str) -> None:
        super().__init__(channels)
        self.activation = activation

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        y = super().forward(input)
        y = y if residual is None else y + residual
        return F.relu(y) if self.activation == "relu" else y


def norm(level: str, channels: int, activation: str = "relu") -> nn.Module:
    if level == "eager":
        return EagerNormAct(channels, activation)
    return ckpt_kernels.nn.BatchNorm2d(channels, activation=activation)


class Bottleneck(nn.Module):
    def __init__(self, level: str, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(channels, width, 1, bias=False), norm(level, width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), norm(level, width)
        self.conv3, self.norm3 = nn.Conv2d(width, 4 * width, 1, bias=False), norm(level, 4 * width)
        self.shortcut = None
        if stride > 1 or channels != 4 * width:
            self.shortcut = nn.Conv2d(channels, 4 * width, 1, stride, bias=False)
            self.shortcut_norm = norm(level, 4 * width, "identity")

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(self.norm1(self.conv1(x))))
        residual = x if self.shortcut is None else self.shortcut_norm(self.shortcut(x))
        return self.norm3(self.conv3(y), residual)


class ResNet(nn.Module):
    """Takes images and their classes, and returns the loss."""

    def __init__(self, level: str) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, WIDTH, 3, padding=1, bias=False), norm(level, WIDTH)
        blocks, channels = [], WIDTH
        for stage, width in enumerate((WIDTH, 2 * WIDTH, 4 * WIDTH)):
            for block in range(BLOCKS):
                blocks.append(Bottleneck(level, channels, width, 2 if stage and block == 0 else 1))
                channels = 4 * width
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(channels, CLASSES)

    def forward(self, images: Tensor, classes: Tensor) -> Tensor:
        y = self.blocks(self.norm(self.stem(images.to(memory_format=torch.channels_last))))
        return F.cross_entropy(self.head(y.mean((2, 3))), classes)


def draw_batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    classes = torch.randint(CLASSES, (BATCH,), generator=generator)
    angle = (classes * (math.pi / CLASSES)).view(-1, 1, 1)
    phase = torch.rand(BATCH, 1, 1, generator=generator) * 2 * math.pi
    y, x = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    stripes = (0.6 * (x * angle.cos() + y * angle.sin()) + phase).sin()
    noise = torch.randn(BATCH, SIZE, SIZE, generator=generator) * 1.5
    return (stripes + noise).unsqueeze(1), classes


if __name__ == "__main__":
    sys.exit(main(__doc__, ResNet, draw_batch, DEVICE, steps=60, learning_rate=2e-4))
