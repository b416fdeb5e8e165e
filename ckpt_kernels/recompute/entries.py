"""The outputs that may be let go of, found by their memory."""

import weakref
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from .recipes import Recipe


class Entry(NamedTuple):
    """An output that may be discarded, as long as the memory is there and unchanged.

    The output may be gone while a view lives, so that the memory is the key. `output` refers to the tensor, as long as
    Python has it.
    """

    storage: StorageWeakRef
    output: "weakref.ref[Tensor]"
    dtype: torch.dtype
    version: int
    recipe: Callable[[], Recipe | None]


class Entries:
    """All entries, by the address of the storage; entries whose memory is gone are swept now and then."""

    def __init__(self) -> None:
        self._entries: dict[int, Entry] = {}
        self._most = 64

    def __len__(self) -> int:
        return len(self._entries)

    def of(self, tensor: Tensor) -> Entry | None:
        """The entry of a tensor's memory."""
        entry = self._entries.get(tensor.untyped_storage()._cdata) if self._entries else None
        return entry if entry is not None and not entry.storage.expired() else None

    def add(self, output: Tensor, recipe: Callable[[], Recipe | None]) -> Entry:
        entries = self._entries
        if len(entries) >= self._most:
            for key in [key for key, entry in entries.items() if entry.storage.expired()]:
                del entries[key]
            # Entries double between two sweeps, so that the time for n entries grows as n.
            self._most = max(64, 2 * len(entries))
        storage = StorageWeakRef(output.untyped_storage())
        entry = Entry(storage, weakref.ref(output), output.dtype, output._version, recipe)
        entries[storage.cdata] = entry
        return entry

    def clear(self) -> None:
        self._entries.clear()
