"""Calls the module `_thin` to pack and record in C (`csrc/thin/cells.cpp`, `csrc/thin/records.cpp`), if that was built.

In the usual cases C creates the same objects of the same classes as the Python code: cells of tensors that are
certainly kept, cells of blocks' outputs and of their views, and recipes that read only tensors that a block's node
keeps. In all other cases, and for every error, the Python code runs.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .cells import Cell

if TYPE_CHECKING:
    from .discarder import Discarder

# The module `_thin`, None without the library: see `contexts.use_library`.
library: Any = None


def packing(discarder: "Discarder") -> Callable[[Tensor], Cell]:
    """The hook that packs saved tensors: a bound method, whose `__self__` is the discarder."""
    return discarder.pack if library is None else library.packer(discarder)


def record(discarder: "Discarder", output: Tensor) -> None:
    """Records the output of the announced op."""
    if library is None or not library.record(discarder, output):
        discarder.record(output)


def biases(module: nn.Module) -> "dict[int, tuple[nn.Parameter, int, int]] | None":
    """The result of `biases.versions_in`; None where Python must compute it."""
    return None if library is None else library.biases(module)
