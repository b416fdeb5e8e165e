"""Operands that are small beside the result of an operation that saves none of them, as the shift of a modulation.

Nothing but a note on the operation's node tells of these, and a recipe of the result takes a copy of them.
"""

import weakref
from typing import Any

from torch import Tensor

# An operand is small if it has at most one part in so many of the bytes of the operation's result.
_SMALL = 4
# All copies of one recipe have at most one part in so many of the bytes of the tensor that it makes, so that the recipe
# keeps less than the tensor, however many operations lead to it.
COPIED = 2


class SmallOperand:
    """A small operand, held as long as the note, until the context `owner` is closed.

    A recipe takes a copy, because eager torch does not care for what is written to the operand later.
    """

    __slots__ = ("__weakref__", "owner", "tensor", "version")

    def __init__(self, tensor: Tensor, owner: Any) -> None:
        # A part of a larger tensor is copied now, so that nothing else is held with it.
        self.tensor: Tensor | None = tensor.detach() if fills_memory(tensor) else tensor.detach().clone()
        self.version = self.tensor._version
        self.owner = owner

    def copied(self) -> Tensor | None:
        """The operand as it was; None after a write, and where the memory is gone, as that of sharded weights is."""
        tensor = self.tensor
        if tensor is None or tensor._version != self.version or not fills_memory(tensor):
            return None
        return tensor.clone()


class SmallOperands:
    """Those of one context; the notes hold them, and so the graph."""

    def __init__(self) -> None:
        self._noted: weakref.WeakSet[SmallOperand] = weakref.WeakSet()

    def noted(self, operand: Tensor, result: Tensor, owner: Any) -> SmallOperand | None:
        """What a note says of an operand: None of one that is not small."""
        if operand.nbytes * _SMALL > result.nbytes or not operand.dtype.is_floating_point:
            return None
        found = SmallOperand(operand, owner)
        self._noted.add(found)
        return found

    def clear(self) -> None:
        """From now on there is nothing to copy."""
        for noted in self._noted:
            noted.tensor = None
        self._noted.clear()


def fills_memory(tensor: Tensor) -> bool:
    """Whether a tensor is an ordinary one that fills its memory, so that letting go of it gains memory."""
    return (
        tensor.dtype.is_floating_point
        and tensor.device.type in ("cpu", "cuda")
        and 0 < tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes()
    )
