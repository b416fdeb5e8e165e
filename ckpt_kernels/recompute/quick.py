"""Packing and unpacking in C where `_thin` is there (`csrc/thin/cells.cpp`), for the usual cases.

C makes the cells that Python beside it makes, of the same classes, and gives the tensors that these give: where a
tensor is surely kept as it is, and where one is that nobody has written to. In every other case, and for every error,
it calls that Python, which alone serves where `_thin` is missing.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .contents import Cell, Operand

if TYPE_CHECKING:
    from .discarder import Discarder

# `_thin`, if it is there: see `contexts.answer_by`.
library: Any = None


def packing(discarder: "Discarder") -> Callable[[Tensor], Cell]:
    """The hook that packs what is saved; as a method's, its `__self__` is the discarder."""
    return discarder.pack if library is None else library.packer(discarder)


def unpack(cell: Cell) -> Tensor:
    """The tensor that a cell stands for."""
    return cell.content.get() if library is None else library.unpack(cell)


def tensors(operands: Sequence[Operand | None]) -> Sequence[Tensor | None]:
    """Those of a recipe's operands."""
    if library is None:
        return [None if o is None else o.get() for o in operands]
    return library.tensors(operands)
