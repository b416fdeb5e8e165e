"""Reads the content that an autograd node holds for each saved tensor, and writes notes to nodes."""

import threading
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..autocast import is_autocast
from . import fast_path
from .cells import Absent, Cell, version_watch
from .hooks import seekers
from .recipes import Geometry, Layout
from .rules import Rule
from .small_operands import SmallOperand

# A node, and the number of one of its outputs.
Edge = tuple[Any, int]
# The name of the node that accumulates the gradient of a leaf.
LEAF = "torch::autograd::AccumulateGrad"
# The key of a note in a node's metadata, with an entry for each operand: the value of a number, the `SmallOperand` of a
# small tensor, else None. `csrc/thin/graph.cpp` reads notes too.
_NOTED = "ckpt_kernels"
# The key of a `Watched`.
_WATCHED = "ckpt_kernels watched"
# The key of the cast copy of a bias.
_COPIED = "ckpt_kernels copied"
NUMBERS = (int, float)
# The sequence number of the next node that this thread makes.
next_number = torch._C._autograd._get_sequence_nr
Note = tuple[float | SmallOperand | None, ...]


class Result(NamedTuple):
    """The result of a node that saves the result, with all cells that keep that tensor, the node's own cell first."""

    layout: Layout
    keepers: list[tuple["weakref.ref[Cell]", Geometry]]


class Watched(NamedTuple):
    """An output of a node that had no in-place write when its watch began: the number of the output, the version watch,
    and weak references to the storage and the tensor object."""

    number: int
    watch: Tensor
    storage: Any
    output: "weakref.ref[Tensor]"


def name_of(node: Any) -> str:
    """The name of a node, which tells the op that the node differentiates.

    The method is that of the node's class. The node of an `autograd.Function` is the `ctx` that a model may give any
    attributes, such as a `name`; torch's properties, such as `metadata`, cannot be set.
    """
    return type(node).name(node)


def packed_operands(node: Any, rule: Rule, edges: Sequence[Edge]) -> list[Any]:
    """The contents of a node for the operands that its rule names."""
    if rule.saved is None:
        return [None] * len(edges)
    return [None if name is None else packed(node, name) for name in rule.saved]


def result_cell(node: Any, name: str = "result") -> Cell | None:
    """The cell of a node that saves the node's result, under this name."""
    content = packed(node, name)
    return content if isinstance(content, Cell) else None


def packed(node: Any, name: str) -> Any:
    """The content that a node holds for the saved tensor `name`: a cell, a number that torch wrapped in a tensor, else
    None."""
    try:
        saved = getattr(node, f"_raw_saved_{name}")
        data = saved.data
        if isinstance(data, Cell):
            return data
        # torch wraps an operand that is a Python number in a tensor that hooks do not see.
        if saved.unpack_hook is None and isinstance(data, Tensor) and data.dim() == 0 and data.is_cpu:
            number = data.item()
            return number if isinstance(number, NUMBERS) and data._version == 0 else None
    except (AttributeError, RuntimeError):
        # This torch does not show saved tensors, or the graph's tensors are freed.
        pass
    return None


def results_of_function(node: Any) -> dict[int, Cell]:
    """The cells in which the node of an `autograd.Function` saves outputs of the function, by their numbers.

    torch itself identifies them: among the tensors that a node saves, the function's outputs have that node as
    `grad_fn`.
    """
    try:
        cells = [saved.data for saved in node._raw_saved_tensors]
        if not all(cell is None or isinstance(cell, Cell) for cell in cells):
            return {}
        seekers.append(threading.get_ident())
        try:
            tensors = node.saved_tensors
        finally:
            seekers.remove(threading.get_ident())
    except (AttributeError, RuntimeError):
        # This torch does not show saved tensors, or the graph's tensors are freed.
        return {}
    pairs = [(tensor, cell) for tensor, cell in zip(tensors, cells, strict=True) if cell is not None]
    return {tensor.output_nr: cell for tensor, cell in pairs if tensor.grad_fn is node}


def packed_extras(node: Any, name: str) -> list[Cell | Absent | None]:
    """The cells of saved tensors that are no operands with edges; `Absent` for a missing tensor, None for other
    contents."""
    try:
        saved = getattr(node, f"_raw_saved_{name}")
        several = saved if isinstance(saved, tuple | list) else (saved,)
        return [_cell_or_absent(s) for s in several]
    except (AttributeError, RuntimeError):
        return [None]


def _cell_or_absent(saved: Any) -> Cell | Absent | None:
    """The cell that a saved tensor is packed in; `Absent` for a missing tensor, None for other contents."""
    data = None if saved is None else saved.data
    if data is None and saved is not None and saved.unpack_hook is None:
        return Absent()
    return data if isinstance(data, Cell) else None


def is_unwritten(tensor: Tensor) -> bool:
    """Whether a tensor has had no in-place write. The version of a parameter, and so of a view of a parameter, is
    compared later, when the parameter is read."""
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided and not tensor.is_inference()
    return plain and (tensor._version == 0 or tensor.is_leaf or type(tensor._base) is nn.Parameter)


def is_made_since(node: Any, first: int) -> bool:
    """Whether this thread has made a node since the node numbered `first`.

    Each thread counts its own nodes. A number that this thread has not reached shows that another thread made the node.
    """
    return first <= type(node)._sequence_nr(node) < next_number()


def note(node: Any, operands: Note) -> None:
    """Notes on a node that the operands have had no in-place write."""
    node.metadata[_NOTED] = operands


def noted(node: Any) -> Note:
    """The note on a node; () if there is none."""
    return node.metadata.get(_NOTED, ())


def note_copy(node: Any, operand: Tensor) -> Tensor:
    """Notes on the node of a cast a copy of the operand, cast again. Returns the copy."""
    output = node._input_metadata[0]
    node.metadata[_COPIED] = operand.to(output.device, output.dtype)
    return node.metadata[_COPIED]


def noted_copy(node: Any) -> Tensor | None:
    """The copy on the node of a cast; None if there is none."""
    return node.metadata.get(_COPIED)


def watch(tensor: Tensor) -> None:
    """Lets the node of an unwritten tensor show later in-place writes to the tensor."""
    counter = version_watch(tensor)
    if counter is not None:
        node: Any = tensor.grad_fn
        storage = fast_path.storage_reference(tensor)
        node.metadata[_WATCHED] = Watched(tensor.output_nr, counter, storage, weakref.ref(tensor))


def watched(node: Any, output: int) -> Watched | None:
    """The watch on a node's output; None without one."""
    found = node.metadata.get(_WATCHED)
    return found if found is not None and found.number == output else None


def is_watched(node: Any, output: int) -> bool:
    """Whether a node's output is watched, and has had no in-place write."""
    found = watched(node, output)
    return found is not None and found.watch._version == 0


def is_cast_by_autocast(node: Any) -> bool:
    """Whether a node's output is the copy of a parameter that autocast cast."""
    if node is None or name_of(node) != "ToCopyBackward0":
        return False
    leaf_node = node.next_functions[0][0]
    is_of_leaf = leaf_node is not None and name_of(leaf_node) == LEAF
    return is_of_leaf and is_autocast(leaf_node.variable)
