"""Out-of-place forms of torch's in-place activations that save a clone of their input for backward.

The output can be recomputed from that clone. But where the input is a matrix product of more than two dimensions, which
is a view, the autograd graph does not show the clone's origin. Computed out of place, the activation saves the product
itself, and no more memory is kept.
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
    """Whether the module is one of these activations with `inplace=True`, unmodified."""
    if not isinstance(module, nn.Module) or original_of(module) not in _OUT_OF_PLACE:
        return False
    return module.__dict__.get("inplace") is True and is_unmodified_torch(module, "min_val", "max_val")


def out_of_place(module: Any, input: Tensor) -> Tensor | None:
    """The module's output, computed without a write to the input; None for modules that do not `writes_over`."""
    if not writes_over(module) or not is_called_plainly(module):
        return None
    return _OUT_OF_PLACE[original_of(module)](module, input)
