"""The outputs that may be let go of, found by their memory."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.multiprocessing.reductions import StorageWeakRef

from .cells import watching
from .recipes import Recipe


class Entry:
    """An output that may be discarded, as long as the memory is there and unchanged.

    The output may be gone while a view lives, so that the memory is the key. `output` refers to the tensor, as long as
    Python has it.
    """

    __slots__ = ("dtype", "output", "recipe", "storage", "version")

    def __init__(self, output: Tensor, recipe: Callable[[], Recipe | None]) -> None:
        self.storage = StorageWeakRef(output.untyped_storage())
        self.output: weakref.ref[Tensor] = weakref.ref(output)
        self.dtype: torch.dtype = output.dtype
        self.version: int = output._version
        self.recipe = recipe


class Block:
    """A block's output, as the block's node knows it: the entry, and a tensor that shares the version counter."""

    __slots__ = ("entry", "owner", "watch")

    def __init__(self, owner: Any, entry: Entry, watch: Tensor | None) -> None:
        self.owner = owner
        self.entry = entry
        self.watch = watch

    def is_unwritten(self) -> bool:
        """Whether nobody has written to the output since."""
        return self.watch is not None and self.watch._version == self.entry.version


class Entries:
    """All entries, by the address of the storage; entries whose memory is gone are swept now and then."""

    def __init__(self) -> None:
        # By the address of the storage.
        self.by_storage: dict[int, Entry] = {}
        self._most = 64

    def __len__(self) -> int:
        return len(self.by_storage)

    def of(self, tensor: Tensor) -> Entry | None:
        """The entry of a tensor's memory. No other memory comes to that address while the entry refers to it."""
        return self.by_storage.get(tensor.untyped_storage()._cdata) if self.by_storage else None

    def add(self, entry: Entry) -> None:
        entries = self.by_storage
        if len(entries) >= self._most:
            for key in [key for key, entry in entries.items() if entry.storage.expired()]:
                del entries[key]
            # Entries double between two sweeps, so that the time for n entries grows as n.
            self._most = max(64, 2 * len(entries))
        entries[entry.storage.cdata] = entry

    def clear(self) -> None:
        self.by_storage.clear()


def block_of(node: Any) -> Block | None:
    """What a block's node knows of the output, which is the first."""
    if not isinstance(node, BackwardCFunction):
        return None
    block = getattr(node, "recomputed_block", None)
    return block if isinstance(block, Block) else None


def watch_of(tensor: Tensor, entry: Entry | None) -> Tensor | None:
    """What shares the version counter of a tensor in an entry's memory: one for a block's output and its views."""
    output = None if entry is None else entry.output()
    if output is not None and (tensor is output or tensor._base is output):
        block = block_of(output.grad_fn)
        if block is not None and block.entry is entry:
            return block.watch
    return watching(tensor)
