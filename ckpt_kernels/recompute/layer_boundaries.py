"""The tensors at the edges of layers: what goes into a layer and what comes out of it."""

import weakref
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef


class Held:
    """A tensor at the edge of a layer: kept if somebody saves it, and never replaced by a recipe.

    Recipes read such a tensor only if a node saves it too (`is_saved`): then torch would refuse a write as well.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.storage = StorageWeakRef(tensor.untyped_storage())
        self.tensor = weakref.ref(tensor)
        self.version = tensor._version
        self.is_saved = False


class Edges:
    """The held tensors, found by their memory."""

    def __init__(self) -> None:
        # By the address of the storage.
        self.held: dict[int, Held] = {}

    def add(self, tensor: Tensor) -> None:
        for key in [key for key, held in self.held.items() if held.storage.expired()]:
            del self.held[key]
        held = Held(tensor)
        self.held[held.storage.cdata] = held

    def of(self, tensor: Tensor) -> Held | None:
        """The held tensor with the memory of `tensor`, if nobody has written to that since."""
        held = self.held.get(tensor.untyped_storage()._cdata) if self.held else None
        if held is None or held.storage.expired() or held.version != tensor._version:
            return None
        return held

    def made_by(self, node: Any, output: int) -> Tensor | None:
        """The held result of a node, if a node saves this tensor, and nobody has written to it since."""
        for held in self.held.values():
            tensor = held.tensor()
            if tensor is None or tensor.output_nr != output:
                continue
            maker = tensor.grad_fn
            if maker is node if maker is not None else getattr(node, "variable", None) is tensor:
                return tensor if held.is_saved and tensor._version == held.version else None
        return None

    def clear(self) -> None:
        self.held.clear()
