"""The functions that can be applied to logits without computing them: those that models use between head and loss.

Each handler takes a `Description` of logits, the function and the other arguments. The handler returns the description
of the new logits, or a function that computes the loss, or None if the call has an unexpected form.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as functional
from torch import Tensor

from .ops.linear_loss import Loss, count_of, default_chunk, linear_loss
from .ops.products import linear_of_torch

Elementwise = Callable[[Tensor], Tensor]


class Product(NamedTuple):
    """The operands of a linear layer, the dtype of the computation, and elementwise functions applied to the result."""

    input: Tensor
    weight: Tensor
    bias: Tensor | None
    dtype: torch.dtype
    elementwise: tuple[Elementwise, ...] = ()

    @property
    def operands(self) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.input, self.weight, self.bias

    def value(self) -> Tensor:
        """The logits."""
        input, weight, bias = (None if t is None else t.to(self.dtype) for t in self.operands)
        assert input is not None and weight is not None
        with torch.autocast(input.device.type, enabled=False):
            return self.after(linear_of_torch(input, weight, bias))

    def after(self, logits: Tensor) -> Tensor:
        """Applies the elementwise functions."""
        for function in self.elementwise:
            logits = function(logits)
        return logits


class Description(NamedTuple):
    """Logits that are not computed: the product, and a meta tensor with the shape, strides and dtype of the logits."""

    product: Product
    like: Tensor

    def after(self, func: Any, args: tuple, kwargs: dict, input: Tensor, *elementwise: Elementwise) -> "Description":
        """The description after `func`, where `input` has the rows of the new logits."""
        product = self.product._replace(input=input, elementwise=(*self.product.elementwise, *elementwise))
        return Description(product, func(self.like, *args, **kwargs))


Outcome = Description | Callable[[], Tensor] | None


def outcome_of(func: Any, logits: Description, others: tuple, kwargs: dict[str, Any]) -> Outcome:
    """The outcome of `func(logits, *others, **kwargs)`; None if the function or the form of the call is not
    supported."""
    handler = _HANDLERS.get(func)
    if handler is None:
        return None
    try:
        call = inspect.signature(handler).bind(logits, func, *others, **kwargs)
    except TypeError:
        return None
    return handler(*call.args, **call.kwargs)


def _reshaped(logits: Description, func: Any, *args: Any, **kwargs: Any) -> Description | None:
    """A reshape of the same rows."""
    like = func(logits.like, *args, **kwargs)
    if like.dtype != logits.like.dtype or not like.dim() or like.shape[-1] != logits.like.shape[-1]:
        return None
    input = logits.product.input
    return logits.after(func, args, kwargs, input.reshape(*like.shape[:-1], input.shape[-1]))


def _sliced(logits: Description, func: Any, index: Any) -> Description | None:
    """Some of the rows, by numbers and slices."""
    entries = index if isinstance(index, tuple) else (index,)
    if not all(map(_is_basic, entries)):
        return None
    taken = sum(entry is not None and entry is not ... for entry in entries)
    if ... not in entries and taken < logits.like.dim():
        entries = (*entries, ...)
    # The last entry is for the last dimension, which must be taken whole.
    is_whole = entries[-1] == slice(None) or (entries[-1] is ... and taken < logits.like.dim())
    return logits.after(func, (index,), {}, logits.product.input[index]) if is_whole else None


def _is_basic(entry: Any) -> bool:
    if isinstance(entry, slice):
        return all(type(bound) in (int, type(None)) for bound in (entry.start, entry.stop, entry.step))
    return type(entry) is int or entry is None or entry is ...


def _contiguous(logits: Description, func: Any) -> Description:
    return logits if logits.like.is_contiguous() else logits.after(func, (), {}, logits.product.input)


def _cast(logits: Description, func: Any, dtype: Any = torch.float32) -> Description | None:
    """`float()`, or `to(dtype)`."""
    if type(dtype) is not torch.dtype or not dtype.is_floating_point:
        return None
    if dtype == logits.like.dtype:
        return logits
    args = () if func is Tensor.float else (dtype,)
    return logits.after(func, args, {}, logits.product.input, lambda tensor: tensor.to(dtype))


def _by_number(logits: Description, func: Any, number: Any) -> Description | None:
    """A product with a number, or a quotient by one."""
    if type(number) not in (int, float):
        return None
    return logits.after(func, (number,), {}, logits.product.input, lambda tensor: func(tensor, number))


def _tanh(logits: Description, func: Any) -> Description:
    return logits.after(func, (), {}, logits.product.input, func)


def _cross_entropy(
    logits: Description,
    func: Any,
    target: Any,
    weight: Any = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Callable[[], Tensor] | None:
    """The cross entropy of rows and their classes."""
    product, like = logits
    if size_average is not None or reduce is not None or weight is not None or not _are_classes(target, logits):
        return None
    # torch itself raises the errors for invalid arguments.
    if reduction not in ("mean", "sum", "none") or type(ignore_index) is not int:
        return None
    device = product.input.device.type
    autocast = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)

    def rows(chunk: Tensor, target: Tensor) -> Tensor:
        with torch.autocast(device, enabled=autocast[0], dtype=autocast[1]):
            return functional.cross_entropy(
                product.after(chunk),
                target,
                ignore_index=ignore_index,
                reduction="none",
                label_smoothing=label_smoothing,
            )

    def loss() -> Tensor:
        chunk = default_chunk(len(product.input), product.input.shape[1], like.shape[1])
        count = count_of(target, like.dtype, ignore_index, reduction)
        of_rows = Loss(rows, product.dtype, chunk, ignore_index)
        return linear_loss(of_rows, product.input, product.weight, product.bias, target, count)

    return loss


def _are_classes(target: Any, logits: Description) -> bool:
    """Whether the target has a class index for each row."""
    like = logits.like
    if type(target) is not Tensor or like.dim() != 2 or target.dtype != torch.int64:
        return False
    return target.shape == like.shape[:1] and target.device == logits.product.input.device


_HANDLERS: dict[Any, Callable[..., Outcome]] = {
    functional.cross_entropy: _cross_entropy,
    Tensor.__getitem__: _sliced,
    Tensor.contiguous: _contiguous,
    **dict.fromkeys((Tensor.view, Tensor.reshape, Tensor.flatten, torch.reshape, torch.flatten), _reshaped),
    **dict.fromkeys((Tensor.float, Tensor.to), _cast),
    **dict.fromkeys((Tensor.tanh, torch.tanh), _tanh),
    **dict.fromkeys((Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.mul), _by_number),
    **dict.fromkeys((Tensor.div, Tensor.__truediv__, torch.div), _by_number),
}
