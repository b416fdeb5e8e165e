"""Calls the module `_thin` to pack, record and unpack in C (`csrc/thin`), if that was built.

In the usual cases C (cells.cpp, records.cpp) creates the same objects of the same classes as the Python code: cells of
tensors that are certainly kept, cells of blocks' outputs and of their views, and recipes that read only tensors that a
block's node keeps. C (unpacking.cpp) unpacks kept tensors, and runs such recipes for their only reader. In all other
cases the Python code runs, also after an error in C, so that a recipe that raises runs twice.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from .cells import Cell
from .rules import Rule


class Packer(Protocol):
    """What packs saved tensors: a `Discarder`."""

    def pack(self, tensor: Tensor) -> Cell: ...


# The module `_thin`, None without the library: see `contexts.use_library`. Its functions `announce(announcement,
# elementwise, total)` and `record(output)` return False, with nothing done, where Python must do that.
library: Any = None


def packing(discarder: Packer) -> Callable[[Tensor], Cell]:
    """The hook that packs saved tensors: a bound method, whose `__self__` is the discarder."""
    return discarder.pack if library is None else library.packer(discarder)


def unpacking(unpack: Callable[[Cell], Tensor]) -> Callable[[Cell], Tensor]:
    """The hook that unpacks saved tensors; `unpack` is that in Python."""
    return unpack if library is None else library.unpack


def storage_reference(tensor: Tensor) -> Any:
    """A weak reference to the storage of a tensor. While it exists, no other storage gets the address `cdata`."""
    return StorageWeakRef(tensor.untyped_storage()) if library is None else library.storage_reference(tensor)


def biases(module: nn.Module) -> "dict[int, tuple[nn.Parameter, int, int]] | None":
    """The result of `biases.versions_in`; None where Python must compute it."""
    return None if library is None else library.biases(module)


def keeps_result(discarder: Packer, node: Any, name: str, rules: Mapping[str, Rule]) -> bool:
    """Whether there is certainly no recipe for the result, never written to, of a node that saves the result: the usual
    outcome in recurrent loops. False without the library."""
    return library is not None and library.keeps_result(discarder, node, name, rules)
