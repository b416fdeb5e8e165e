"""Trains a small diffusion UNet to find the noise that was added to generated images of rectangles."""

import sys

import torch
import torch.nn.functional as F
from side_by_side import main
from torch import Tensor, nn

import ckpt_kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WIDTH, SIZE, BATCH = (128, 64, 32) if DEVICE == "cuda" else (64, 32, 8)


class EagerNormAct(nn.GroupNorm):
    """Group norm and SiLU, in eager torch."""

    def forward(self, input: Tensor) -> Tensor:
        return F.silu(super().forward(input))


def norm(level: str, channels: int) -> nn.Module:
    if level == "eager":
        return EagerNormAct(8, channels)
    return ckpt_kernels.nn.GroupNorm(8, channels, activation="silu")


class Block(nn.Module):
    """Norm, activation and convolution, twice, with the time added between, and a shortcut around."""

    def __init__(self, level: str, channels: int, width: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = norm(level, channels), nn.Conv2d(channels, width, 3, padding=1)
        self.norm2, self.conv2 = norm(level, width), nn.Conv2d(width, width, 3, padding=1)
        self.time = nn.Linear(WIDTH, width)
        self.shortcut = nn.Conv2d(channels, width, 1) if channels != width else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        y = self.conv1(self.norm1(x)) + self.time(time)[:, :, None, None]
        return self.shortcut(x) + self.conv2(self.norm2(y))


class UNet(nn.Module):
    """Takes images, noise and times, and returns the loss of finding the noise."""

    def __init__(self, level: str) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, WIDTH, 3, padding=1)
        self.time = nn.Sequential(nn.Linear(1, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.down1, self.down2 = Block(level, WIDTH, WIDTH), Block(level, WIDTH, 2 * WIDTH)
        self.middle = Block(level, 2 * WIDTH, 2 * WIDTH)
        self.up2, self.up1 = Block(level, 4 * WIDTH, WIDTH), Block(level, 2 * WIDTH, WIDTH)
        self.norm, self.last = norm(level, WIDTH), nn.Conv2d(WIDTH, 1, 3, padding=1)

    def forward(self, images: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        t = times[:, None, None, None]
        x = self.first((1 - t).sqrt() * images + t.sqrt() * noise)
        time = self.time(times[:, None])
        high = self.down1(x, time)
        low = self.down2(F.avg_pool2d(high, 2), time)
        y = self.middle(F.avg_pool2d(low, 2), time)
        y = self.up2(torch.cat((F.interpolate(y, scale_factor=2), low), 1), time)
        y = self.up1(torch.cat((F.interpolate(y, scale_factor=2), high), 1), time)
        return F.mse_loss(self.last(self.norm(y)), noise)


def draw_batch(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    corners = torch.rand(BATCH, 4, 1, generator=generator) * SIZE
    place = torch.arange(SIZE).float()
    top, left = torch.minimum(corners[:, 0], corners[:, 1]), torch.minimum(corners[:, 2], corners[:, 3])
    bottom, right = torch.maximum(corners[:, 0], corners[:, 1]), torch.maximum(corners[:, 2], corners[:, 3])
    rows, columns = (place >= top) & (place <= bottom), (place >= left) & (place <= right)
    images = (rows[:, :, None] & columns[:, None, :]).float().unsqueeze(1) * 2 - 1
    noise = torch.randn(BATCH, 1, SIZE, SIZE, generator=generator)
    return images, noise, torch.rand(BATCH, generator=generator)


if __name__ == "__main__":
    sys.exit(main(__doc__, UNet, draw_batch, DEVICE, steps=60))
