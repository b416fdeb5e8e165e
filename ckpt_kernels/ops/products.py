"""torch's matrix products of linear layers and their gradients, in the dtypes that autocast asks for."""

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..autocast import is_autocast, without_autocast

# torch's own function, even if F.linear is replaced later: the backward passes here are for this function.
linear_of_torch = F.linear


def product_dtype(input: Tensor) -> torch.dtype:
    """The compute dtype of a Linear that reads `input`: autocast's dtype, or the input's own."""
    if is_autocast(input) and input.dtype != torch.float64:
        return torch.get_autocast_dtype(input.device.type)
    return input.dtype


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor.to(dtype)`, without the call if the dtype is right: the call costs as much as a small product."""
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


def product_of(input: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """F.linear, computed in `dtype`."""
    operands = (cast(input, dtype), cast(weight, dtype), None if bias is None else cast(bias, dtype))
    if not is_autocast(input):
        return linear_of_torch(*operands)
    with without_autocast(input):
        return linear_of_torch(*operands)


def as_non_view(output: Tensor) -> Tensor:
    """The same memory as a tensor that is no view.

    F.linear may return a view of a matrix, and the result of an autograd.Function may be written to in place only if it
    is no view.
    """
    return output if output._base is None else torch.ops.aten._unsafe_view.default(output, output.shape)


def as_matrix(tensor: Tensor) -> Tensor:
    """The rows of the tensor, `(rows, columns)`."""
    if tensor.dim() == 2:
        return tensor
    return tensor.flatten(0, -2) if tensor.dim() > 2 else tensor.unsqueeze(0)


def as_saved(input: Tensor) -> Tensor:
    """The input of a linear layer as F.linear saves it: itself, or a copy if the rows do not form a matrix.

    Without the copy, a slice of a sequence would keep the memory of the whole sequence, and the model must not write to
    the input later.
    """
    if input.dim() < 3 or input.is_contiguous() or _is_matrix(input):
        return input
    return input.contiguous()


def _is_matrix(tensor: Tensor) -> bool:
    """Whether the leading dimensions can be viewed as one."""
    sizes = [(size, stride) for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True) if size != 1]
    return all(outer == size * inner for (_, outer), (size, inner) in itertools.pairwise(sizes))


def grad_input_of(grad: Tensor, weight: Tensor) -> Tensor:
    """The gradient of the input, `(*, in)`, in the dtype of `grad`."""
    product = as_matrix(grad) @ cast(weight, grad.dtype)
    return product if grad.dim() == 2 else product.reshape(*grad.shape[:-1], weight.shape[1])


def grad_weight_of(grad: Tensor, input: Tensor, weight_dtype: torch.dtype) -> Tensor:
    """The gradient of the weight, `(out, in)`."""
    return cast(as_matrix(grad).t() @ cast(as_matrix(input), grad.dtype), weight_dtype)


def grad_bias_of(grad: Tensor, bias_dtype: torch.dtype) -> Tensor:
    """The gradient of the bias, `(out)`."""
    return cast(grad.sum(tuple(range(grad.dim() - 1))) if grad.dim() > 1 else grad, bias_dtype)


def products_of(input: Tensor, first_parameters: Sequence[Tensor | None], dtype: torch.dtype) -> list[Tensor]:
    """The products of the input by (weight, bias, weight, bias, ...)."""
    return [product_of(input, w, b, dtype) for w, b in zip(first_parameters[::2], first_parameters[1::2], strict=True)]


def grad_of_shared_input(pairs: Sequence[tuple[Tensor, Tensor]], dtype: torch.dtype) -> Tensor:
    """The gradient of the input of several products, added in autograd's order: the last product's first."""
    parts = [cast(grad_input_of(g, w), dtype) for g, w in reversed(pairs)]
    total = parts[0]
    for part in parts[1:]:
        total = total.add_(part)
    return total
