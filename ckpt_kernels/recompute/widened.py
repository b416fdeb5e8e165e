"""Float32 copies of 16-bit tensors, as in `F.gelu(x.float())`. They are kept in 16 bits: casting them back loses
nothing."""

from typing import Any

import torch
from torch import Tensor

from .nodes import name_of
from .small_operands import fills_memory

_NARROW = (torch.bfloat16, torch.float16)


def narrow_copy(tensor: Tensor) -> Tensor | None:
    """The 16-bit copy of a whole tensor that was cast to float32 from 16 bits, and not written to since.

    None for any other tensor.
    """
    return tensor.detach().to(_dtype_before(tensor)) if _is_copy(tensor) and fills_memory(tensor) else None


def _is_copy(tensor: Tensor) -> bool:
    if tensor.dtype is not torch.float32 or type(tensor) is not Tensor or tensor._version:
        return False
    # A tangent would be lost.
    return torch.autograd.forward_ad._current_level < 0 and _dtype_before(tensor) in _NARROW


def _dtype_before(tensor: Tensor) -> torch.dtype | None:
    """The dtype that a tensor was cast from, if a cast made the tensor."""
    node: Any = tensor.grad_fn
    if node is None or name_of(node) != "ToCopyBackward0":
        return None
    maker, output = node.next_functions[0]
    return None if maker is None else maker._input_metadata[output].dtype


def widened(copy: Tensor) -> Tensor:
    """The values of a 16-bit copy in float32."""
    return copy.to(torch.float32)


def is_widened(input: Tensor) -> bool:
    """Whether a tensor is a float32 copy of a 16-bit tensor, which a block keeps for the gradient in 16 bits."""
    # A compiler cannot trace nodes. Without gradients torch reads no node either: to read that of one of several views
    # whose base was written to is an error.
    if input.dtype is not torch.float32 or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return input.grad_fn is not None and _is_copy(input)
