"""The outputs that may be let go of, found by their memory."""

import weakref
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from .recipes import Recipe


class Entry(NamedTuple):
    """A tensor that may be discarded, as long as its memory is there and unchanged.

    The tensor that was returned may be gone while a view of it lives, so that it is by its memory that it is known.
    `output` is that tensor, as long as Python has it.
    """

    storage: StorageWeakRef
    output: "weakref.ref[Tensor]"
    dtype: torch.dtype
    version: int
    recipe: Callable[[], Recipe | None]


class Entries:
    """All of them, by the address of their storage; those whose memory is gone are swept now and then."""

    def __init__(self) -> None:
        self._entries: dict[int, Entry] = {}
        self._most = 64

    def __len__(self) -> int:
        return len(self._entries)

    def of(self, tensor: Tensor) -> Entry | None:
        """That of a tensor's memory."""
        entry = self._entries.get(tensor.untyped_storage()._cdata) if self._entries else None
        return entry if entry is not None and not entry.storage.expired() else None

    def add(self, output: Tensor, recipe: Callable[[], Recipe | None]) -> Entry:
        entries = self._entries
        if len(entries) >= self._most:
            for key in [key for key, entry in entries.items() if entry.storage.expired()]:
                del entries[key]
            # So a sweep is paid for by as many entries as it looks at.
            self._most = max(64, 2 * len(entries))
        storage = StorageWeakRef(output.untyped_storage())
        entry = Entry(storage, weakref.ref(output), output.dtype, output._version, recipe)
        entries[storage.cdata] = entry
        return entry

    def clear(self) -> None:
        self._entries.clear()
