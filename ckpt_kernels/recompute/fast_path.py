"""Packing and recording in C where `_thin` is there (`csrc/thin/cells.cpp`, `csrc/thin/records.cpp`).

C makes what Python beside it makes, of the same classes, in the usual cases: cells of tensors that are surely kept as
they are, and of blocks' outputs and views of these; and recipes of what a block's node keeps. In every other case, and
for every error, Python is asked, which alone serves where `_thin` is missing.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .cells import Cell

if TYPE_CHECKING:
    from .discarder import Discarder

# `_thin`, if it is there: see `contexts.use_library`.
library: Any = None


def packing(discarder: "Discarder") -> Callable[[Tensor], Cell]:
    """The hook that packs what is saved; as a method's, its `__self__` is the discarder."""
    return discarder.pack if library is None else library.packer(discarder)


def record(discarder: "Discarder", output: Tensor) -> None:
    """Takes the output of the announced op."""
    if library is None or not library.record(discarder, output):
        discarder.record(output)


def biases(module: nn.Module) -> "dict[int, tuple[nn.Parameter, int, int]] | None":
    """What `biases.versions_in` finds; None where that is to be asked."""
    return None if library is None else library.biases(module)
