"""Accumulates gradients of weights over parts of the rows, in one buffer."""

import torch
from torch import Tensor

_HALF_DTYPES = (torch.bfloat16, torch.float16)


def buffer_for(weight: Tensor, product_dtype: torch.dtype) -> Tensor:
    """Zeros of the weight's shape, in a dtype that accumulates without loss: float32, or float64 for float64
    products."""
    dtype = torch.float32 if product_dtype in _HALF_DTYPES else product_dtype
    return torch.zeros_like(weight, dtype=dtype, memory_format=torch.contiguous_format)


def add_product(buffer: Tensor, grad: Tensor, input: Tensor) -> None:
    """Adds grad.T @ input, (rows, out) and (rows, in), to the buffer (out, in)."""
    if grad.dtype == buffer.dtype:
        buffer.addmm_(grad.t(), input)
    elif grad.is_cuda:
        buffer.add_(torch.mm(grad.t(), input, out_dtype=buffer.dtype))
    else:
        # Only on CUDA torch multiplies half-precision matrices into float32. A half-precision product would be rounded
        # before it is added.
        buffer.addmm_(grad.t().to(buffer.dtype), input.to(buffer.dtype))


def add_sum(buffer: Tensor, grad: Tensor) -> None:
    """Adds the sum of the rows to the buffer."""
    buffer.add_(grad.sum(0, dtype=buffer.dtype))
