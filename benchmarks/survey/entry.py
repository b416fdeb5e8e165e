"""The entries of the catalogue."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn


class Shape(NamedTuple):
    """The shape of a batch: the number of examples, and of tokens (or frames) in each. Images keep their size."""

    batch: int = 2
    length: int = 24


FIRST = Shape(2, 24)
SECOND = Shape(3, 16)

NARROW = 64
WIDE = 256


@dataclass(frozen=True)
class Entry:
    """An architecture: functions that make the model at a width, and inputs by name for a batch of a shape.

    With `has_wide`, the model can also be made so wide that computation outweighs the overhead of calls, for timing.
    With `random`, the entry is about randomness, and dropout stays on. Inputs that are `differentiable` get gradients.
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
