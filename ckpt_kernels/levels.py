"""Recompute levels: their names, in the order of what they keep, which are possible where, and how one is spelled.

none        as it is: nothing is converted                               modules
block       a block keeps its input                                      functions, modules, models
output      and lets go of its output                                    functions, modules, models
all         and of the product that made its input                       functions, modules, models
layer       a layer keeps its input and what attention gives             modules, models
checkpoint  a layer keeps its input alone; "output" inside               modules

Of a model or a module a level may say how many tiles its MLPs take their rows in: "all, tiles=4". Of a module it may
say that what is kept waits in host memory: "output, offload", "all, tiles=4, offload". It is spelled so wherever one is
given or shown: in `convert`, in plans and their files, in tables.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

OF_FUNCTIONS = ("block", "output", "all")
OF_MODELS = (*OF_FUNCTIONS, "layer")
# Levels of single layers, whose neighbours may have others.
NONE, CHECKPOINT = "none", "checkpoint"
OF_LAYERS = (NONE, *OF_MODELS)
OF_MODULES = (*OF_LAYERS, CHECKPOINT)
# What there is within a checkpoint by itself.
WITHIN_CHECKPOINT = "output"
# Where MLPs do not keep all that is between their products.
IN_TILES = ("output", "all", "layer", CHECKPOINT)
_OFFLOAD = "offload"
_SPELLED = rf"(\w+)(?:, ?tiles=([1-9]\d*))?(, ?{_OFFLOAD})?"


@dataclass(frozen=True)
class Policy:
    """A level, and what is said of it.

    Attributes:
        level: its name.
        tiles: how many parts MLPs take their rows in; None where nothing is said of it.
        is_offloaded: whether what is kept waits in host memory.
    """

    level: str
    tiles: int | None = None
    is_offloaded: bool = False

    def __str__(self) -> str:
        tiles = "" if self.tiles is None else f", tiles={self.tiles}"
        return f"{self.level}{tiles}{', offload' if self.is_offloaded else ''}"

    @property
    def is_checkpoint(self) -> bool:
        return self.level == CHECKPOINT

    def inside(self) -> "Policy":
        """That of what is inside, for a checkpoint; any other itself."""
        return replace(self, level=WITHIN_CHECKPOINT) if self.is_checkpoint else self

    @staticmethod
    def read(text: Any, levels: Sequence[str]) -> "Policy | None":
        """What is spelled; None if it is none of these levels, or says what is not possible at it."""
        found = re.fullmatch(_SPELLED, text) if isinstance(text, str) else None
        if found is None or found[1] not in levels or (found[2] and found[1] not in IN_TILES):
            return None
        # What is kept of single layers may be offloaded; a checkpoint's input is no tensor that autograd keeps.
        if found[3] and (NONE not in levels or found[1] == CHECKPOINT):
            return None
        return Policy(found[1], int(found[2]) if found[2] else None, found[3] is not None)

    @staticmethod
    def of(text: Any, levels: Sequence[str], argument: str) -> "Policy":
        """What is spelled.

        Raises:
            ValueError: it is none of these levels, or says what is not possible at it.
        """
        policy = Policy.read(text, levels)
        if policy is None:
            tiled = ", ".join(level for level in levels if level in IN_TILES)
            offloaded = f"; all but checkpoint may end in ', {_OFFLOAD}'" if NONE in levels else ""
            raise ValueError(
                f"{argument} is {text!r}; expected one of {', '.join(levels)}, or one of {tiled} with tiles, such as "
                f"'{WITHIN_CHECKPOINT}, tiles=4'{offloaded}"
            )
        return policy


def level_of_blocks(level: str) -> str:
    """The level of the blocks in what has a level: "layer" is "all" within."""
    return "all" if level == "layer" else level
