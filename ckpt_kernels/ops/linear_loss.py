"""A linear layer and the loss of its output, row by row of logits that are never whole.

The rows are taken in chunks. Of each chunk the logits are made, their losses, and where gradients are wanted these
right away, by torch's own rules for the loss: then the logits are gone. Between the passes there are the gradients, and
the input for whoever asks twice. Two kinds of losses have their gradients made in the backward pass instead, for which
the first product runs again: those that are wanted row by row, whose gradients depend on what comes from above, and
those of float16, whose gradients would vanish without the factor that a gradient scaler brings.

Where somebody must see the ops one by one (torch.compile, torch.func, tensor subclasses, gradients of gradients) the
plain composition computes the same, with whole logits.
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

# The fewest rows that are worth a product of their own.
_FEWEST = 256


class Loss(NamedTuple):
    """What is computed of logits.

    `rows(logits, target)` is the loss of each row, which depends on no other row, and is 0 where the target is
    `ignore_index`; `dtype` that of the products, and `chunk` how many rows are taken at once.
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
    """So many rows that their logits take about what the input takes."""
    return max(_FEWEST, -(-rows * columns // max(classes, 1)))


def count_of(target: Tensor, dtype: torch.dtype, ignore_index: int, reduction: str) -> Tensor | None:
    """What the sum of the losses is divided by: nothing, None, for "none", else 1 or how many rows count."""
    dtype = torch.float64 if dtype == torch.float64 else torch.float32
    if reduction == "mean":
        return (target != ignore_index).sum().to(dtype)
    return torch.ones((), dtype=dtype, device=target.device) if reduction == "sum" else None


def _reduced(losses: Tensor, count: Tensor | None) -> Tensor:
    return losses if count is None else (losses.sum() / count).to(losses.dtype)


class _LinearLoss(torch.autograd.Function):
    """The losses of all rows, or, where there is a `count` to divide it by, their sum."""

    @staticmethod
    def forward(
        ctx: Any, loss: Loss, input: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, count: Tensor | None
    ) -> Tensor:
        ctx.loss = loss
        ctx.made_early = count is not None and loss.dtype != torch.float16
        needs = ctx.needs_input_grad[1:4] if ctx.made_early else (False,) * 3
        each = None if count is None else count.reciprocal()
        losses, found = _walk(loss, input, weight, bias, target, each, needs)
        ctx.save_for_backward(input, weight, bias, target, count, *found)
        return _reduced(losses, count)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        input, weight, bias, target, count, *found = ctx.saved_tensors
        needs = ctx.needs_input_grad[1:4]
        if by_composition((grad,)):

            def compute(*operands: Any) -> list[Tensor]:
                return [_composed(ctx.loss, *operands, target, count)]

            found = composed_gradients(compute, (input, weight, bias), needs, (grad,))
        elif ctx.made_early:
            # Only once: they are given away.
            ctx.made_early = False
            # Where no row counts, whoever divides the sum by their number makes `grad` infinite; torch's gradients of
            # such rows are 0 all the same.
            counts = (target != ctx.loss.ignore_index).any()
            grad = torch.where(counts, grad, torch.zeros_like(grad))
            # By `data`, which has a version counter of its own: whoever gets them may write to them, and a second
            # backward pass may still unpack the saved tensors.
            found = [None if gradient is None else gradient.data.mul_(grad) for gradient in found]
        else:
            each = grad if count is None else grad / count
            _, found = _walk(ctx.loss, input, weight, bias, target, each, needs)
        return None, *found, None, None


def _walk(
    loss: Loss,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    each: Tensor | None,
    needs: Sequence[bool],
) -> tuple[Tensor, _Gradients]:
    """The losses, and the gradients that are needed of the sum of these times `each`, one number for all or one a
    row."""
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
        if not any(needs) or each is None:
            losses.append(loss.rows(logits, target[begin:end]))
            continue
        some, grad = _with_gradient(loss, logits, target[begin:end], each[begin:end] if each.dim() else each)
        losses.append(some)
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


def _with_gradient(loss: Loss, logits: Tensor, target: Tensor, each: Tensor) -> tuple[Tensor, Tensor]:
    """The losses of a chunk, and the gradient of the logits."""
    # What is kept for the length of a chunk, nobody else's hooks are to see.
    with torch.enable_grad(), without_saved_tensor_hooks():
        losses = loss.rows(logits.requires_grad_(), target)
    (grad,) = torch.autograd.grad(losses, logits, each.to(losses.dtype).expand_as(losses))
    return losses.detach(), grad


def _chunks(rows: int, chunk: int) -> Iterator[tuple[int, int]]:
    """Where each begins and ends; one without rows where there are none."""
    for begin in range(0, max(rows, 1), chunk):
        yield begin, min(begin + chunk, rows)


def _as(gradient: Tensor | None, parameter: Tensor | None) -> Tensor | None:
    return None if gradient is None or parameter is None else gradient.to(parameter.dtype)


def _composed(
    loss: Loss, input: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, count: Tensor | None
) -> Tensor:
    dtype = loss.dtype
    with without_autocast(input):
        logits = linear_of_torch(input.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    losses = loss.rows(logits, target)
    return _reduced(losses, count)


def linear_loss(
    loss: Loss, input: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, count: Tensor | None
) -> Tensor:
    """The losses of `F.linear(input, weight, bias)`, one a row, or their sum divided by `count`.

    Args:
        loss: what is computed of the logits.
        input: (rows, in).
        weight, bias: (classes, in) and (classes).
        target: one a row.
        count: a number, as a tensor without dimensions; None for the losses themselves.
    """
    operands = (input, weight, bias, target, count)
    if torch.compiler.is_compiling() or not is_plain(operands) or is_transformed():
        return _composed(loss, *operands)
    if not torch.is_grad_enabled():
        losses, _ = _walk(loss, input, weight, bias, target, None, (False,) * 3)
        return _reduced(losses, count)
    return _LinearLoss.apply(loss, *operands)
