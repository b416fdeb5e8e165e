"""The outputs that may be discarded, found by their storage."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from . import fast_path
from .cells import version_watch
from .recipes import Recipe


class Entry:
    """An output that may be discarded while the output's storage exists and is unchanged.

    The key is the storage, because the output may be gone while a view of the output lives. `output` is a weak
    reference to the tensor object.
    """

    __slots__ = ("dtype", "output", "recipe", "storage", "version")

    def __init__(self, output: Tensor, recipe: Callable[[], Recipe | None]) -> None:
        self.storage = fast_path.storage_reference(output)
        self.output: weakref.ref[Tensor] = weakref.ref(output)
        self.dtype: torch.dtype = output.dtype
        self.version: int = output._version
        self.recipe = recipe


class Block:
    """The output of a block, as stored on the block's autograd node: the entry and a version watch."""

    __slots__ = ("entry", "owner", "watch")

    def __init__(self, owner: Any, entry: Entry, watch: Tensor | None) -> None:
        self.owner = owner
        self.entry = entry
        self.watch = watch

    def is_unwritten(self) -> bool:
        """Whether the output has had no in-place write since."""
        return self.watch is not None and self.watch._version == self.entry.version


class Entries(dict[int, Entry]):
    """All entries, by the address of the storage. Entries whose storage is gone are removed now and then, by `add`."""

    sweep_size = 64

    def of(self, tensor: Tensor) -> Entry | None:
        """The entry for the storage of a tensor. No new storage gets this address while the entry refers to the old
        one."""
        return self.get(tensor.untyped_storage()._cdata) if self else None

    def add(self, entry: Entry) -> None:
        if len(self) >= self.sweep_size:
            for key in [key for key, entry in self.items() if entry.storage.expired()]:
                del self[key]
            # The number of entries doubles between two sweeps, so that the total time is linear in the number of
            # entries.
            self.sweep_size = max(64, 2 * len(self))
        self[entry.storage.cdata] = entry


def block_of(node: Any) -> Block | None:
    """The `Block` on an autograd node, None if the node is not a block's."""
    if not isinstance(node, BackwardCFunction):
        return None
    block = getattr(node, "recomputed_block", None)
    return block if isinstance(block, Block) else None


def watch_of(tensor: Tensor, entry: Entry | None) -> Tensor | None:
    """The version watch of a tensor that has an entry. A block's output and its views share one."""
    output = None if entry is None else entry.output()
    if output is not None and (tensor is output or tensor._base is output):
        block = block_of(output.grad_fn)
        if block is not None and block.entry is entry:
            return block.watch
    return version_watch(tensor)
