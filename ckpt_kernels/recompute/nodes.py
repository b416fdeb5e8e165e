"""What a node of the autograd graph holds in the place of the tensors that it saves, and what is noted on it."""

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .recipes import Cell, Geometry
from .rules import Rule

# A node, and which of its outputs.
Edge = tuple[Any, int]
# Under which name a node holds what is noted of its operands: the number that stood for one, else None.
_NOTED = "ckpt_kernels"
NUMBERS = (int, float)


class Result(NamedTuple):
    """Who keeps the result of a node that saves its result, first of all the node itself."""

    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype
    keepers: list[tuple["weakref.ref[Cell]", Geometry]]


def packed_operands(node: Any, rule: Rule, edges: Sequence[Edge]) -> list[Any]:
    if rule.saved is None:
        return [None] * len(edges)
    return [None if name is None else packed(node, name) for name in rule.saved]


def result_cell(node: Any) -> Cell | None:
    """What a node that saves its result holds."""
    own = packed(node, "result")
    return own if isinstance(own, Cell) else None


def packed(node: Any, name: str) -> Any:
    """What a node holds in the place of a tensor: a cell, a number that stood for a tensor, or None for all else."""
    try:
        saved = getattr(node, f"_raw_saved_{name}")
        held = saved.data
        if isinstance(held, Cell):
            return held
        # A Python number, of which torch makes a tensor that it does not give to hooks.
        if saved.unpack_hook is None and isinstance(held, Tensor) and held.dim() == 0 and held.is_cpu:
            number = held.item()
            return number if isinstance(number, NUMBERS) and held._version == 0 else None
    except (AttributeError, RuntimeError):
        # A torch that does not show this, or a graph whose tensors are freed.
        pass
    return None


def packed_beside(node: Any, name: str) -> list[Cell | None]:
    """What a node holds that is no operand, with None for what it does not hold as a cell."""
    try:
        saved = getattr(node, f"_raw_saved_{name}")
        several = saved if isinstance(saved, tuple | list) else (saved,)
        return [s.data if s is not None and isinstance(s.data, Cell) else None for s in several]
    except (AttributeError, RuntimeError):
        return [None]


def is_as_made(tensor: Tensor) -> bool:
    """Whether nobody has written to a tensor. (A parameter is asked about when it is read again.)"""
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided and not tensor.is_inference()
    return plain and (tensor._version == 0 or tensor.is_leaf)


def note(node: Any, numbers: tuple[float | None, ...]) -> None:
    """That the operands of a node are as they were made."""
    node.metadata[_NOTED] = numbers


def noted(node: Any) -> tuple[float | None, ...]:
    """What `note` has said of a node; () where nothing is said."""
    return node.metadata.get(_NOTED, ())


def is_cast_by_autocast(node: Any) -> bool:
    """Whether a node's output is what autocast makes of a parameter."""
    if node is None or node.name() != "ToCopyBackward0":
        return False
    maker = node.next_functions[0][0]
    is_of_leaf = maker is not None and maker.name() == "torch::autograd::AccumulateGrad"
    return is_of_leaf and torch.is_autocast_enabled(maker.variable.device.type)
