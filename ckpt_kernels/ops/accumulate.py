"""Gradients of weights that are added up over parts of the rows, in one buffer."""

import torch
from torch import Tensor

_HALVES = (torch.bfloat16, torch.float16)


def buffer_for(weight: Tensor, products: torch.dtype) -> Tensor:
    """Zeros of the weight's shape, wide enough that adding up loses nothing: float32, or float64 for such products."""
    wide = torch.float32 if products in _HALVES else products
    return torch.zeros_like(weight, dtype=wide, memory_format=torch.contiguous_format)


def add_product(buffer: Tensor, grad: Tensor, input: Tensor) -> None:
    """Adds grad.T @ input, (rows, out) and (rows, in), to the buffer (out, in)."""
    if grad.dtype == buffer.dtype:
        buffer.addmm_(grad.t(), input)
    elif grad.is_cuda:
        buffer.add_(torch.mm(grad.t(), input, out_dtype=buffer.dtype))
    else:
        # torch multiplies halves into float32 on CUDA alone: a product of halves would be rounded before it is added.
        buffer.addmm_(grad.t().to(buffer.dtype), input.to(buffer.dtype))


def add_sum(buffer: Tensor, grad: Tensor) -> None:
    """Adds the sum of the rows."""
    buffer.add_(grad.sum(0, dtype=buffer.dtype))
