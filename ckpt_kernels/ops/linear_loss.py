"""A linear layer and the loss of its output, computed in chunks of rows, so that the logits are never whole.

For each chunk the logits are computed, then their losses, and if gradients are needed, these too, by torch's own rules
for the loss. Then the logits are freed. Between the passes the gradients are kept, and the input for a second backward
pass. Two kinds of losses compute gradients in the backward pass instead, where the product runs again: losses per row,
whose gradients depend on the incoming gradient, and losses in float16, whose gradients would underflow without the
factor of a gradient scaler.

If something must see single ops (torch.compile, torch.func, tensor subclasses, second derivatives), the plain
composition computes the same with whole logits.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..autocast import without_autocast
from ..saved_tensor_hooks import without_saved_tensor_hooks
from .accumulate import add_product, add_sum, buffer_for
from .composition import by_composition, composed_gradients
from .products import linear_of_torch
from .registration import is_plain, is_transformed

# The fewest rows that are worth a separate matrix product.
_FEWEST = 256


class Loss(NamedTuple):
    """The loss that is computed from logits.

    `rows(logits, target)` is the loss of each row, which depends on no other row, and is 0 if the target is
    `ignore_index`. `dtype` is that of the products. `chunk` is the number of rows in a chunk.
    """

    rows: Callable[[Tensor, Tensor], Tensor]
    dtype: torch.dtype
    chunk: int
    ignore_index: int


class _Gradients(NamedTuple):
    input: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def default_chunk(rows: int, columns: int, classes: int) -> int:
    """The number of rows whose logits take about as much memory as the whole input."""
    return max(_FEWEST, -(-rows * columns // max(classes, 1)))


def count_of(target: Tensor, dtype: torch.dtype, ignore_index: int, reduction: str) -> Tensor | None:
    """The divisor of the sum of the losses: None for "none", 1 for "sum", the number of counted rows for "mean"."""
    dtype = torch.float64 if dtype == torch.float64 else torch.float32
    if reduction == "mean":
        return (target != ignore_index).sum().to(dtype)
    return torch.ones((), dtype=dtype, device=target.device) if reduction == "sum" else None


def _reduced(losses: Tensor, count: Tensor | None) -> Tensor:
    return losses if count is None else (losses.sum() / count).to(losses.dtype)


class _LinearLoss(torch.autograd.Function):
    """The losses of all rows; with a `count`, their sum divided by `count`."""

    @staticmethod
    def forward(
        ctx: Any, loss: Loss, input: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, count: Tensor | None
    ) -> Tensor:
        ctx.loss = loss
        ctx.made_early = count is not None and loss.dtype != torch.float16
        needs = ctx.needs_input_grad[1:4] if ctx.made_early else (False,) * 3
        scale = None if count is None else count.reciprocal()
        losses, grads = _walk(loss, input, weight, bias, target, scale, needs)
        ctx.save_for_backward(input, weight, bias, target, count, *grads)
        return _reduced(losses, count)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        input, weight, bias, target, count, *grads = ctx.saved_tensors
        needs = ctx.needs_input_grad[1:4]
        if by_composition((grad,)):

            def compute(*operands: Any) -> list[Tensor]:
                return [_composed(ctx.loss, *operands, target, count)]

            grads = composed_gradients(compute, (input, weight, bias), needs, (grad,))
        elif ctx.made_early:
            # Only once, because the gradients are given away.
            ctx.made_early = False
            # If no row counts, dividing by the number of rows makes `grad` infinite, yet torch's gradients of such rows
            # are 0.
            counts = (target != ctx.loss.ignore_index).any()
            grad = torch.where(counts, grad, torch.zeros_like(grad))
            # Write through `data`, which has a separate version counter: the receiver may write to the gradients, and a
            # second backward pass may still unpack the saved tensors.
            grads = [None if gradient is None else gradient.data.mul_(grad) for gradient in grads]
        else:
            scale = grad if count is None else grad / count
            _, grads = _walk(ctx.loss, input, weight, bias, target, scale, needs)
        return None, *grads, None, None


def _walk(
    loss: Loss,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    scale: Tensor | None,
    needs: Sequence[bool],
) -> tuple[Tensor, _Gradients]:
    """The losses, and the gradients that are needed, of the sum of the losses times `scale` (one number, or one for
    each row)."""
    wants_input, wants_weight, wants_bias = needs
    dtype = loss.dtype
    product_weight, product_bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    grad_input = torch.empty_like(input, memory_format=torch.contiguous_format) if wants_input else None
    grad_weight = buffer_for(weight, dtype) if wants_weight else None
    grad_bias = buffer_for(bias, dtype) if bias is not None and wants_bias else None
    losses = []
    for begin, end in _chunks(len(input), loss.chunk):
        part = input[begin:end].to(dtype)
        with without_autocast(input):
            logits = linear_of_torch(part, product_weight, product_bias)
        if not any(needs) or scale is None:
            losses.append(loss.rows(logits, target[begin:end]))
            continue
        chunk_losses, grad = _with_gradient(loss, logits, target[begin:end], scale[begin:end] if scale.dim() else scale)
        losses.append(chunk_losses)
        del logits
        with without_autocast(input):
            if grad_input is not None:
                grad_input[begin:end] = grad @ product_weight
            if grad_weight is not None:
                add_product(grad_weight, grad, part)
            if grad_bias is not None:
                add_sum(grad_bias, grad)
        del grad
    gradients = _Gradients(grad_input, _as(grad_weight, weight), _as(grad_bias, bias))
    return losses[0] if len(losses) == 1 else torch.cat(losses), gradients


def _with_gradient(loss: Loss, logits: Tensor, target: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The losses of a chunk, and the gradient of the logits."""
    # Outer hooks must not see the tensors that are kept during a chunk.
    with torch.enable_grad(), without_saved_tensor_hooks():
        losses = loss.rows(logits.requires_grad_(), target)
    (grad,) = torch.autograd.grad(losses, logits, scale.to(losses.dtype).expand_as(losses))
    return losses.detach(), grad


def _chunks(rows: int, chunk: int) -> Iterator[tuple[int, int]]:
    """The first and last row of each chunk; one empty chunk if there are no rows."""
    for begin in range(0, max(rows, 1), chunk):
        yield begin, min(begin + chunk, rows)


def _as(gradient: Tensor | None, parameter: Tensor | None) -> Tensor | None:
    """The gradient in the dtype of its parameter."""
    return None if gradient is None or parameter is None else gradient.to(parameter.dtype)


def _composed(
    loss: Loss, input: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, count: Tensor | None
) -> Tensor:
    """The same by separate torch ops, with whole logits."""
    dtype = loss.dtype
    with without_autocast(input):
        logits = linear_of_torch(input.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    losses = loss.rows(logits, target)
    return _reduced(losses, count)


def linear_loss(
    loss: Loss, input: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, count: Tensor | None
) -> Tensor:
    """The losses of `F.linear(input, weight, bias)`, one for each row, or their sum divided by `count`.

    Args:
        loss: the loss of logits.
        input: (rows, in).
        weight, bias: (classes, in) and (classes).
        target: one for each row.
        count: the divisor, as a tensor without dimensions; None for the losses of the rows.
    """
    operands = (input, weight, bias, target, count)
    if torch.compiler.is_compiling() or not is_plain(operands) or is_transformed():
        return _composed(loss, *operands)
    if not torch.is_grad_enabled():
        losses, _ = _walk(loss, input, weight, bias, target, None, (False,) * 3)
        return _reduced(losses, count)
    return _LinearLoss.apply(loss, *operands)
