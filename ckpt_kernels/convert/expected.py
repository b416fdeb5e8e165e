"""What a converted module is expected to keep for each row (a token, a pixel), before and after.

Counted with what reads the module's output, which keeps that for a gradient of its own, as a linear layer or a
convolution does. For whole models, with what attention and all else keeps, there is `memory.saved_bytes`.
"""

from typing import NamedTuple

import torch
from torch import nn

from .. import memory
from .norms import BatchNorm, GroupNorm, RowNorm, shadow_of


class Kept(NamedTuple):
    """Bytes a row, before and after."""

    before: int
    after: int

    def __add__(self, other: "Kept") -> "Kept":
        return Kept(self.before + other.before, self.after + other.after)

    def times(self, factor: int) -> "Kept":
        return Kept(self.before * factor, self.after * factor)


NOTHING = Kept(0, 0)


def of_norm(module: nn.Module, rule: object, recompute: str) -> Kept:
    """Of a norm: its input, what it keeps in between, and its output; after, its input, and at "block" its output."""
    if isinstance(rule, RowNorm):
        weight = getattr(module, rule.weight) if rule.weight else None
        shape = getattr(module, "normalized_shape", None) or (None if weight is None else weight.shape)
        if shape is None:
            return NOTHING
        columns, size = torch.Size(shape).numel(), _size_of(module)
        before = 2 * columns * size if isinstance(module, nn.LayerNorm) else _of_composite(module, rule)
        return Kept(before, (2 if recompute == "block" else 1) * columns * size)
    if isinstance(rule, BatchNorm | GroupNorm):
        channels = module.num_features if isinstance(rule, BatchNorm) else module.num_channels
        return Kept(2, 2 if recompute == "block" else 1).times(channels * _size_of(module))
    return NOTHING


def of_mlp(last: nn.Module, gated: bool, recompute: str) -> Kept:
    """Of what is between the products of an MLP, whose last product reads `last.in_features`."""
    inner = last.in_features if isinstance(last, nn.Linear) else last.weight.shape[0]
    before, after = (4, {"block": 3, "output": 2, "all": 0}) if gated else (2, {"block": 2, "output": 1, "all": 0})
    return Kept(before, after[recompute]).times(inner * _size_of(last))


def _size_of(module: nn.Module) -> int:
    return next((p.element_size() for p in module.parameters() if p.is_floating_point()), 4)


def _of_composite(module: nn.Module, rule: RowNorm, rows: int = 64) -> int:
    """Of a norm that is written in several ops: counted on a copy with random weights."""
    dtype = next((p.dtype for p in module.parameters()), torch.float32)
    shadow = shadow_of(module, dtype, torch.Generator().manual_seed(0))
    columns = next((p.numel() for p in shadow.parameters()), 48)
    input = torch.ones(1, rows, columns, dtype=dtype, requires_grad=True)
    reader = torch.ones(1, dtype=dtype, requires_grad=True)
    with torch.enable_grad():
        return memory.saved_bytes(lambda: shadow.forward(input) * reader) // rows
