"""Operands that are small beside the result of an op that saves none of them, such as the shift of a modulation.

Only a note on the op's autograd node refers to such an operand. A recipe of the result takes a copy of the operand.
"""

import weakref
from typing import Any

from torch import Tensor

# An operand is small if the result of the op has at least this many times as many bytes.
_SMALL = 4
# All copies of one recipe have at most the bytes of the recomputed tensor divided by this number. So a recipe keeps
# less than the tensor, however many ops lead to the tensor.
COPIED = 2


class SmallOperand:
    """A small operand, held as long as the note, until the context `owner` is closed.

    A recipe takes a copy, because eager torch allows later in-place writes to the operand.
    """

    __slots__ = ("__weakref__", "owner", "tensor", "version")

    def __init__(self, tensor: Tensor, owner: Any) -> None:
        # A part of a larger tensor is copied now, so that the rest of that tensor is not kept.
        self.tensor: Tensor | None = tensor.detach() if fills_memory(tensor) else tensor.detach().clone()
        self.version = self.tensor._version
        self.owner = owner

    def copied(self) -> Tensor | None:
        """A copy of the operand; None after an in-place write, or if the memory is gone, as that of sharded weights may
        be."""
        tensor = self.tensor
        if tensor is None or tensor._version != self.version or not fills_memory(tensor):
            return None
        return tensor.clone()


class SmallOperands(list["weakref.ref[SmallOperand]"]):
    """The small operands of one context. The notes hold them, and so does the autograd graph.

    A list, because a WeakSet takes as long to make as a small kernel runs.
    """

    def noted(self, operand: Tensor, result: Tensor, owner: Any) -> SmallOperand | None:
        """The small operand for a note; None for an operand that is not small."""
        if operand.nbytes * _SMALL > result.nbytes or not operand.dtype.is_floating_point:
            return None
        small = SmallOperand(operand, owner)
        self.append(weakref.ref(small))
        return small

    def clear(self) -> None:
        """Drops all small operands: later recipes find nothing to copy."""
        for noted in self:
            small = noted()
            if small is not None:
                small.tensor = None
        super().clear()


def fills_memory(tensor: Tensor) -> bool:
    """Whether a tensor is plain and fills its storage, so that discarding the tensor frees memory."""
    return (
        tensor.dtype.is_floating_point
        and tensor.device.type in ("cpu", "cuda")
        and 0 < tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes()
    )
