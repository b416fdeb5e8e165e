"""The rows of the tables of diffusers models, and the functions that make inputs."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .entry import Shape

TEXT = 32
POOLED = 32


class Row(NamedTuple):
    cls: str
    settings: dict[str, Any]
    inputs: dict[str, Any]
    wide: bool = False


def noise(*sizes: int) -> Callable[[Shape], Tensor]:
    """Noise of these sizes for each example."""
    return lambda shape: torch.randn(shape.batch, *sizes)


def text(shape: Shape) -> Tensor:
    return torch.randn(shape.batch, shape.length, TEXT)


def time(shape: Shape) -> Tensor:
    return torch.arange(3, 3 + shape.batch)


def part(shape: Shape) -> Tensor:
    """A time from 0 to 1."""
    return torch.linspace(0.3, 0.7, shape.batch)


def everything(shape: Shape) -> Tensor:
    """A mask that masks nothing."""
    return torch.ones(shape.batch, shape.length, dtype=torch.bool)


def constant(*sizes: float) -> Callable[[Shape], Tensor]:
    return lambda shape: torch.tensor([sizes] * shape.batch)


def places(count: int | None, axes: int = 3) -> Callable[[Shape], Tensor]:
    return lambda shape: torch.zeros(count or shape.length, axes)


IMAGE = noise(4, 16, 16)
VIDEO = noise(4, 3, 8, 8)
PIXELS = noise(3, 32, 32)
CLIP = noise(3, 5, 32, 32)
SEQUENCE = noise(16, 4)
