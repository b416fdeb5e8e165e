"""torch's activations that write over their input and keep a clone of that: what they compute out of place.

The clone is what the output can be made from again, but of a product of more than two dimensions, which is a view, no
graph shows that. Out of place the product takes the clone's place, and no more is kept.
"""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..operands import is_called_plainly
from ..swap import original_of
from .pointwise import is_unmodified_torch

_NUMBERS = (int, float)
_OUT_OF_PLACE: dict[type[nn.Module], Callable[[Any, Tensor], Tensor | None]] = {
    nn.Hardsigmoid: lambda module, input: F.hardsigmoid(input),
    nn.Hardtanh: lambda module, input: _hardtanh(input, module.min_val, module.max_val),
    nn.ReLU6: lambda module, input: F.relu6(input),
}


def _hardtanh(input: Tensor, least: Any, most: Any) -> Tensor | None:
    return F.hardtanh(input, least, most) if type(least) in _NUMBERS and type(most) in _NUMBERS else None


def writes_over(module: Any) -> bool:
    """Whether it is one of these, as torch has it."""
    if not isinstance(module, nn.Module) or original_of(module) not in _OUT_OF_PLACE:
        return False
    return module.__dict__.get("inplace") is True and is_unmodified_torch(module, "min_val", "max_val")


def out_of_place(module: Any, input: Tensor) -> Tensor | None:
    """What such a module computes of its input, which stays as it is; None for any other."""
    if not writes_over(module) or not is_called_plainly(module):
        return None
    return _OUT_OF_PLACE[original_of(module)](module, input)
