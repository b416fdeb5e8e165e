"""What a catalogue is made of."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn


class Shape(NamedTuple):
    """Of a batch: how many examples, and how many tokens (or frames) each. Images keep their size."""

    batch: int = 2
    length: int = 24


FIRST = Shape(2, 24)
SECOND = Shape(3, 16)

NARROW = 64
WIDE = 256


@dataclass(frozen=True)
class Entry:
    """An architecture: how its model is made at a width, and inputs by name for a batch of a shape.

    `has_wide` says that it can also be made at a width at which computing outweighs calling, to be timed. `random` is
    for what is about randomness: its dropout stays. Inputs that are `differentiable` get gradients too.
    """

    name: str
    model: Callable[[int], nn.Module]
    inputs: Callable[[nn.Module, Shape], dict[str, Any]]
    has_wide: bool = False
    random: bool = False
    differentiable: bool = False

    @property
    def library(self) -> str:
        return self.name.partition("/")[0]
