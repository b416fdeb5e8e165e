"""Recompute levels: their names, in the order of what they keep, and which are possible where.

none        as it is: nothing is converted                               modules
block       a block keeps its input                                      functions, modules, models
output      and lets go of its output                                    functions, modules, models
all         and of the product that made its input                       functions, modules, models
layer       a layer keeps its input and what attention gives             modules, models
checkpoint  a layer keeps its input alone; "output" inside               modules
"""

OF_FUNCTIONS = ("block", "output", "all")
OF_MODELS = (*OF_FUNCTIONS, "layer")
# Levels of single layers, whose neighbours may have others.
NONE, CHECKPOINT = "none", "checkpoint"
OF_LAYERS = (NONE, *OF_MODELS)
OF_MODULES = (*OF_LAYERS, CHECKPOINT)
# What there is within a checkpoint by itself.
WITHIN_CHECKPOINT = "output"


def of_blocks(level: str) -> str:
    """The level of the blocks in what has a level: "layer" is "all" within."""
    return "all" if level == "layer" else level
