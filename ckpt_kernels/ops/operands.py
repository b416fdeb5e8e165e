"""Helpers of the ops: tensors as matrices of rows, memory for results, gradients in their dtypes."""

import functools
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch._prims_common import compute_elementwise_output_strides
from torch.autograd import forward_ad

from ..backends import reference


def as_rows(tensor: Tensor, columns: int) -> Tensor:
    """The tensor as (rows, columns) with contiguous rows: a view if strides allow it, else a copy."""
    if tensor.dim() != 2 or tensor.shape[1] != columns:
        # Not -1 rows: a transform over no batches has no elements, which would leave the number open.
        tensor = tensor.reshape(tensor.numel() // columns, columns)
    return tensor if columns == 1 or tensor.stride(1) == 1 else tensor.contiguous()


def strided_rows(tensor: Tensor, columns: int) -> Tensor:
    """The tensor as (rows, columns), or as (outer, middle, inner, columns) if the strides need that: rarely a copy.

    So the heads of a packed projection, transposed or not, are read in place. For the row norms, which read rows on
    three levels.
    """
    if tensor.is_contiguous() or tensor.dim() < 3 or tensor.shape[-1] != columns or tensor.stride(-1) != 1:
        return as_rows(tensor, columns)
    try:
        levels = _levels(tensor.shape, tensor.stride())
    except TypeError:  # sizes are symbolic under torch.compile, and no cache can hold them
        levels = _levels.__wrapped__(tensor.shape, tensor.stride())
    return as_rows(tensor, columns) if levels is None else tensor.as_strided(*levels)


@functools.lru_cache(maxsize=1024)
def _levels(shape: Sequence[int], strides: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """The sizes and strides of (outer, middle, inner, columns); None for rows on one level, or on more than three."""
    levels: list[list[int]] = []
    for size, stride in zip(shape[:-1], strides[:-1], strict=True):
        if levels and levels[-1][1] == size * stride:
            levels[-1] = [levels[-1][0] * size, stride]
        elif size != 1:
            levels.append([size, stride])
    if len(levels) < 2 or len(levels) > 3:
        return None
    levels = [[1, 0]] * (3 - len(levels)) + levels
    level_sizes, level_strides = zip(*levels, strict=True)
    return (*level_sizes, shape[-1]), (*level_strides, 1)


def as_matrices(like: Tensor, *tensors: Tensor | None, columns: int | None = None) -> list[Tensor | None]:
    """Tensors of one shape as matrices for elementwise kernels, in the order in which `like` lies in memory.

    `like` is dense. A tensor with the same strides becomes a view: one row, or rows of `columns`, which must then be
    the length of the innermost dimension. Otherwise rows are as long as the largest piece that is contiguous in every
    tensor, and a tensor without such rows is copied.
    """
    strides = like.stride()
    if all(t is None or t.stride() == strides for t in tensors):
        columns = like.numel() if columns is None else columns
        size, step = (like.numel() // columns, columns), (columns, 1)
        return [None if t is None else t.as_strided(size, step) for t in tensors]
    order = memory_order(strides)
    permuted = [None if t is None else t.permute(order) for t in tensors]
    if columns is None:
        columns = _shared_columns([t for t in permuted if t is not None])
    return [None if t is None else as_rows(t, columns) for t in permuted]


def layout_and_target(result: Tensor | None, shape: Sequence[int], dims: int) -> tuple[Tensor, Tensor | None]:
    """The tensor in which a dense result is computed if the last `dims` dimensions must keep their order.

    This is the result if the strides keep that order, else a contiguous tensor. The function returns the tensor twice:
    as the layout for `as_matrices`, and as the target of the kernel. If the result is not wanted, the target is None,
    and only the strides of the layout matter.
    """
    if result is None:
        return torch.empty(shape, device="meta"), None
    if not result.is_contiguous():
        order = memory_order(result.stride())
        if order[len(order) - dims :] != list(range(len(order) - dims, len(order))):
            result = contiguous(result)
    return result, result


def last_columns(tensor: Tensor) -> int:
    """The length of the last dimension."""
    return tensor.shape[-1] if tensor.dim() else 1


def memory_order(strides: Sequence[int]) -> list[int]:
    """The dimensions of a dense tensor from the outermost to the innermost in memory."""
    return sorted(range(len(strides)), key=strides.__getitem__, reverse=True)


def _shared_columns(tensors: Sequence[Tensor]) -> int:
    """The number of elements that are contiguous in every tensor whose innermost elements are adjacent."""
    shape = tensors[0].shape
    dims = [dim for dim in reversed(range(len(shape))) if shape[dim] != 1]
    tensors = [t for t in tensors if dims and t.stride(dims[0]) == 1]
    columns = 1
    for dim in dims:
        if any(t.stride(dim) != columns for t in tensors):
            break
        columns *= shape[dim]
    return columns


def vector(tensor: Tensor | None) -> Tensor | None:
    """The tensor, contiguous."""
    return None if tensor is None else tensor.contiguous()


def constant(tensor: Tensor | None) -> Tensor | None:
    """A copy without forward and backward derivatives."""
    if tensor is None:
        return None
    with torch.no_grad(), forward_ad._set_fwd_grad_enabled(False):
        return tensor.clone()


def contiguous(input: Tensor) -> Tensor:
    """Allocates a contiguous tensor of the input's shape, whatever the input's strides are."""
    return torch.empty_like(input, memory_format=torch.contiguous_format)


def is_in_order(tensor: Tensor) -> bool:
    """Whether the strides decrease from dimension to dimension, so that the result of an elementwise operation whose
    first operand this is, is contiguous."""
    strides = tensor.stride()
    ordered = all(outer > inner for outer, inner in itertools.pairwise((*strides, 0)))
    return ordered and all(size > 1 for size in tensor.shape)


def elementwise_empty(*operands: Tensor) -> Tensor:
    """Allocates the result of an elementwise op on operands of one shape, in the first's dtype.

    The strides are those of torch's operators: the first operand's if it is dense, else dense in the order of its
    strides. If these are ambiguous, because the operand is expanded, the next operand decides. Dimensions of one
    element get the usual strides of a contiguous or channels-last tensor, whatever the operands' strides are.
    """
    first = operands[0]
    if all(t.is_contiguous() for t in operands):
        return contiguous(first)
    if all(t.is_contiguous(memory_format=torch.channels_last) for t in operands):
        return torch.empty_like(first, memory_format=torch.channels_last)
    if all(t.stride() == first.stride() for t in operands):
        return torch.empty_like(first)
    if not torch.compiler.is_compiling() and is_in_order(first):
        return contiguous(first)
    strides = compute_elementwise_output_strides(*operands)
    return torch.empty_strided(first.shape, strides, dtype=first.dtype, device=first.device)


def reuse_or_allocate(given_away: Tensor, like: Tensor) -> Tensor:
    """Memory for a result like `like`: that of `given_away`, which no one else needs, if it fits; else new memory."""
    fits = given_away.is_contiguous() and given_away.dtype == like.dtype and given_away.shape == like.shape
    return given_away if fits else contiguous(like)


def with_elementwise_strides(input: Tensor, output: Tensor) -> Tensor:
    """The output if the strides are those of an elementwise result of the input; else a copy with such strides."""
    if input.is_contiguous() and output.is_contiguous():
        return output
    result = elementwise_empty(input)
    return output if output.stride() == result.stride() else result.copy_(output)


def wide_empty(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Allocates a coefficient's gradient in the compute dtype."""
    return None if tensor is None else torch.empty_like(tensor, dtype=dtype, memory_format=torch.contiguous_format)


def in_dtypes_of(operands: Sequence[Tensor | None], gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The gradients in the dtypes of their operands."""
    return [g if g is None or g.dtype is t.dtype else g.to(t.dtype) for g, t in zip(gradients, operands, strict=True)]


def zero(*gradients: Tensor | None) -> None:
    """Zeroes gradients of weights, for inputs without rows."""
    for gradient in gradients:
        if gradient is not None:
            gradient.zero_()


def column_sum(grad_output: Tensor, bias: Tensor) -> Tensor:
    """The gradient of a bias that is the last step of a block, which needs no tensor of the forward pass."""
    if bias.numel() == 0:
        return torch.zeros_like(bias)
    rows = as_rows(grad_output, bias.numel())
    return rows.sum(0, dtype=reference.compute_dtype(rows.dtype)).to(bias.dtype).reshape(bias.shape)
