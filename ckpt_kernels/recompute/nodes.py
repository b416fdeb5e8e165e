"""What a node of the autograd graph holds for each saved tensor, and notes on nodes."""

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..autocast import is_autocast
from .active import thread
from .cells import Absent, Cell, watching
from .recipes import Geometry
from .rules import Rule
from .small_operands import SmallOperand

# A node, and which of its outputs.
Edge = tuple[Any, int]
# The keys in a node's metadata: of a note, with an entry for each operand, its value if a number, a `SmallOperand` if a
# small tensor, else None; and of what shares the version counter of the node's output, with the number of that output.
# (`csrc/thin/graph.cpp` reads notes too.)
_NOTED = "ckpt_kernels"
_WATCHED = "ckpt_kernels watched"
NUMBERS = (int, float)
Note = tuple[float | SmallOperand | None, ...]


class Result(NamedTuple):
    """All who keep the result of a node that saves the result, first of all the node itself."""

    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype
    keepers: list[tuple["weakref.ref[Cell]", Geometry]]


def packed_operands(node: Any, rule: Rule, edges: Sequence[Edge]) -> list[Any]:
    if rule.saved is None:
        return [None] * len(edges)
    return [None if name is None else packed(node, name) for name in rule.saved]


def result_cell(node: Any) -> Cell | None:
    """The cell of a node that saves the result."""
    own = packed(node, "result")
    return own if isinstance(own, Cell) else None


def packed(node: Any, name: str) -> Any:
    """A node's content for a saved tensor of that name: a cell, a number in the place of a tensor, else None."""
    try:
        saved = getattr(node, f"_raw_saved_{name}")
        held = saved.data
        if isinstance(held, Cell):
            return held
        # A Python number: torch wraps such an operand in a tensor that hooks do not see.
        if saved.unpack_hook is None and isinstance(held, Tensor) and held.dim() == 0 and held.is_cpu:
            number = held.item()
            return number if isinstance(number, NUMBERS) and held._version == 0 else None
    except (AttributeError, RuntimeError):
        # This torch does not show saved tensors, or the graph's tensors are freed.
        pass
    return None


def results_of_function(node: Any) -> dict[int, Cell]:
    """The cells in which the node of an `autograd.Function` saves its own outputs, by the outputs' numbers.

    Torch itself says which they are: of what a node saves, its own outputs have that node for their maker.
    """
    try:
        cells = [saved.data for saved in node._raw_saved_tensors]
        if not all(cell is None or isinstance(cell, Cell) for cell in cells):
            return {}
        thread.wants_identities = True
        try:
            tensors = node.saved_tensors
        finally:
            thread.wants_identities = False
    except (AttributeError, RuntimeError):
        # This torch does not show saved tensors, or the graph's tensors are freed.
        return {}
    pairs = [(tensor, cell) for tensor, cell in zip(tensors, cells, strict=True) if cell is not None]
    return {tensor.output_nr: cell for tensor, cell in pairs if tensor.grad_fn is node}


def packed_beside(node: Any, name: str) -> list[Cell | Absent | None]:
    """A node's cells for saved tensors that are no operands; `Absent` where there is no tensor, None for other
    contents."""
    try:
        saved = getattr(node, f"_raw_saved_{name}")
        several = saved if isinstance(saved, tuple | list) else (saved,)
        return [_cell_or_absent(s) for s in several]
    except (AttributeError, RuntimeError):
        return [None]


def _cell_or_absent(saved: Any) -> Cell | Absent | None:
    held = None if saved is None else saved.data
    if held is None and saved is not None and saved.unpack_hook is None:
        return Absent()
    return held if isinstance(held, Cell) else None


def is_as_made(tensor: Tensor) -> bool:
    """Whether nobody has written to a tensor. (Of a parameter the version is compared later, at the reading.)"""
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided and not tensor.is_inference()
    return plain and (tensor._version == 0 or tensor.is_leaf)


def note(node: Any, operands: Note) -> None:
    """Notes on a node that nobody has written to the operands."""
    node.metadata[_NOTED] = operands


def noted(node: Any) -> Note:
    """The note on a node; () where there is none."""
    return node.metadata.get(_NOTED, ())


def watch(tensor: Tensor) -> None:
    """From now on the node of a tensor that nobody has written to shows whether somebody has."""
    node: Any = tensor.grad_fn
    node.metadata[_WATCHED] = tensor.output_nr, watching(tensor)


def is_watched(node: Any, output: int) -> bool:
    """Whether a node's output is watched, and nobody has written to it."""
    number, watched = node.metadata.get(_WATCHED, (None, None))
    return number == output and watched is not None and watched._version == 0


def is_cast_by_autocast(node: Any) -> bool:
    """Whether a node's output is autocast's cast of a parameter."""
    if node is None or node.name() != "ToCopyBackward0":
        return False
    maker = node.next_functions[0][0]
    is_of_leaf = maker is not None and maker.name() == "torch::autograd::AccumulateGrad"
    return is_of_leaf and is_autocast(maker.variable)
