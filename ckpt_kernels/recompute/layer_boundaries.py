"""The tensors at the boundaries of layers: the inputs and outputs of each layer."""

import weakref
from typing import Any

from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.multiprocessing.reductions import StorageWeakRef

from .cells import Cell


class Boundary:
    """A tensor at the boundary of a layer: kept if a node saves the tensor, and never replaced by a recipe.

    A recipe reads such a tensor only if a node saves the tensor too (`is_saved`), because torch would then also refuse
    an in-place write; or the copy that a node saves (`copy`), which nobody else can write to. Of such a copy,
    `original` is the tensor at the boundary.
    """

    def __init__(self, tensor: Tensor, original: "Boundary | None" = None) -> None:
        self.storage = StorageWeakRef(tensor.untyped_storage())
        self.tensor = weakref.ref(tensor)
        self.version = tensor._version
        self.is_saved = False
        self.original = original
        self.copy: Cell | None = None

    def saved(self, cell: Cell) -> None:
        """Records that a node saves the tensor, in this cell."""
        self.is_saved = True
        if self.original is not None:
            self.original.copy = cell


class LayerBoundaries(dict[int, Boundary]):
    """The boundary tensors, by the addresses of their storages.

    A weak reference to a storage keeps its address from being given to another storage.
    """

    def add(self, tensor: Tensor, original: Boundary | None = None) -> None:
        for key in [key for key, held in self.items() if held.storage.expired()]:
            del self[key]
        held = Boundary(tensor, original)
        self[held.storage.cdata] = held

    def of(self, tensor: Tensor) -> Boundary | None:
        """The boundary tensor that shares the storage of `tensor`, if there was no in-place write since."""
        held = self.get(tensor.untyped_storage()._cdata) if self else None
        return None if held is None or held.version != tensor._version else held

    def made_by(self, node: Any, output: int) -> Tensor | Cell | None:
        """The boundary tensor that is this output of a node, or the cell of a saved copy of the whole tensor.

        None if no node saves one of the two, or after an in-place write to the tensor.
        """
        for held in self.values():
            tensor = held.tensor()
            if tensor is None or tensor.output_nr != output or not tensor.requires_grad:
                continue
            # Of a leaf that a checkpoint has unpacked the node knows another tensor, so that the nodes are compared.
            if get_gradient_edge(tensor).node is node:
                if tensor._version != held.version:
                    return None
                return tensor if held.is_saved else held.copy
        return None
