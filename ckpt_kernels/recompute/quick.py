"""Packing and unpacking in C where `_thin` is there (`csrc/thin/cells.cpp`), for the usual cases.

C makes the cells that Python beside it makes, of the same classes: where a tensor is surely kept as it is, and where it
is a block's output, or a view of it. It gives the tensors that these give, where nobody has written to them. In every
other case, and for every error, it calls that Python, which alone serves where `_thin` is missing.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .contents import Cell, Operand

if TYPE_CHECKING:
    from .discarder import Discarder

_is_traced = torch.compiler.is_dynamo_compiling
# `_thin`, if it is there: see `contexts.answer_by`.
library: Any = None


def packing(discarder: "Discarder") -> Callable[[Tensor], Cell]:
    """The hook that packs what is saved; as a method's, its `__self__` is the discarder."""
    return discarder.pack if library is None else library.packer(discarder)


def unpack(cell: Cell) -> Tensor:
    """The hook that unpacks: the tensor that a cell stands for."""
    # Compiled autograd traces through hooks. Versions, locks and shared results are for no tracer.
    if _is_traced():
        return _unpack_untraced(cell)
    return cell.content.get() if library is None else library.unpack(cell)


@torch._disable_dynamo
def _unpack_untraced(cell: Cell) -> Tensor:
    return cell.get()


def biases(module: nn.Module) -> "dict[int, tuple[nn.Parameter, int, int]] | None":
    """What `biases.versions_in` finds; None where that is to be asked."""
    return None if library is None else library.biases(module)


def tensors(operands: Sequence[Operand | None]) -> Sequence[Tensor | None]:
    """Those of a recipe's operands."""
    if library is None:
        return [None if o is None else o.get() for o in operands]
    return library.tensors(operands)
