"""Recompute levels: their names and order, where each is possible, and how a level is written as text.

none        nothing is converted                                         modules
block       a block keeps its input                                      functions, modules, models
output      and discards its output                                      functions, modules, models
all         and discards the product that made its input                 functions, modules, models
layer       a layer keeps its input and the result of attention          modules, models
checkpoint  a layer keeps only its input; inside the level is "output"   modules

For a model or a module, a level may give the number of tiles in which MLPs process their rows: "all, tiles=4". For a
module, a level may say that kept tensors wait in host memory: "output, offload", "all, tiles=4, offload". The spelling
is the same in `convert`, in plans and their files, and in tables.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

OF_FUNCTIONS = ("block", "output", "all")
OF_MODELS = (*OF_FUNCTIONS, "layer")
# Levels of single layers. Neighbouring layers may have other levels.
NONE, CHECKPOINT = "none", "checkpoint"
OF_LAYERS = (NONE, *OF_MODELS)
OF_MODULES = (*OF_LAYERS, CHECKPOINT)
# The level of the modules within a checkpoint.
WITHIN_CHECKPOINT = "output"
# The levels at which MLPs discard tensors between their products, so that tiles save memory.
IN_TILES = ("output", "all", "layer", CHECKPOINT)
_OFFLOAD = "offload"
_SPELLED = rf"(\w+)(?:, ?tiles=([1-9]\d*))?(, ?{_OFFLOAD})?"


@dataclass(frozen=True)
class Policy:
    """A recompute level with its options.

    Attributes:
        level: the name of the level.
        tiles: the number of tiles in which MLPs process their rows; None if not given.
        is_offloaded: whether kept tensors wait in host memory.
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
        """For a checkpoint the policy of the modules inside; any other policy is returned as is."""
        return replace(self, level=WITHIN_CHECKPOINT) if self.is_checkpoint else self

    @staticmethod
    def read(text: Any, levels: Sequence[str]) -> "Policy | None":
        """The policy that `text` spells; None if the level is not one of `levels`, or has impossible options."""
        spelled = re.fullmatch(_SPELLED, text) if isinstance(text, str) else None
        if spelled is None or spelled[1] not in levels or (spelled[2] and spelled[1] not in IN_TILES):
            return None
        # Only single layers can be offloaded. Autograd does not keep the input of a checkpoint, so hooks cannot offload
        # that.
        if spelled[3] and (NONE not in levels or spelled[1] == CHECKPOINT):
            return None
        return Policy(spelled[1], int(spelled[2]) if spelled[2] else None, spelled[3] is not None)

    @staticmethod
    def of(text: Any, levels: Sequence[str], argument: str) -> "Policy":
        """The policy that `text` spells.

        Raises:
            ValueError: the level is not one of `levels`, or has impossible options.
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


# Questions about the bare name of a level, without options. For a checkpoint ask about `Policy.inside()`.


def discards_outputs(level: str) -> bool:
    """Whether the outputs of blocks are discarded: above the level "block"."""
    return level not in (NONE, "block")


def runs_products_again(level: str) -> bool:
    """Whether the matrix products that blocks read run again."""
    return level in ("all", "layer")


def runs_layers_again(level: str) -> bool:
    """Whether a layer keeps its input and the result of attention, and all else runs again."""
    return level == "layer"


def level_of_blocks(level: str) -> str:
    """The level of the blocks within a module of this level: "all" within "layer"."""
    return "all" if runs_layers_again(level) else level
