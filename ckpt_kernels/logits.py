"""Logits that are made when somebody looks at them, and never whole where only a cross entropy does.

A `Logits` stands for the output of a linear layer. It knows its shape, dtype and device, and takes along what models do
between their head and their loss: other shapes of the same rows, slices of rows, casts, factors and soft caps. A cross
entropy of it takes the rows in chunks (see `ops.linear_loss`). Whatever else is done with it, by torch, by a method, by
C code or by an autograd.Function of one's own, makes the tensor that it stands for and is done with that. So a list of
what is known is all that there is to be right about.
"""

import inspect
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as functional
from torch import Tensor
from torch.utils._pytree import tree_map_only

from .ops.linear_loss import Loss, count_of, default_chunk, linear_loss
from .ops.products import linear_of_torch

Step = Callable[[Tensor], Tensor]


class _Product(NamedTuple):
    """A linear layer's operands, the dtype that it computes in, and what is done with each element of the result."""

    input: Tensor
    weight: Tensor
    bias: Tensor | None
    dtype: torch.dtype
    steps: tuple[Step, ...] = ()

    def value(self) -> Tensor:
        tensors = (self.input, self.weight, self.bias)
        input, weight, bias = (None if t is None else t.to(self.dtype) for t in tensors)
        assert input is not None and weight is not None
        with torch.autocast(input.device.type, enabled=False):
            return self.after(linear_of_torch(input, weight, bias))

    def after(self, logits: Tensor) -> Tensor:
        for step in self.steps:
            logits = step(logits)
        return logits


class _Family:
    """The logits of one call of a layer, and all that was taken from them."""

    def __init__(self, product: _Product) -> None:
        self._operands = [t for t in (product.input, product.weight, product.bias) if t is not None]
        self._states = [_state(t) for t in self._operands]
        self.members: list[weakref.ref[Logits]] = []
        # Whether a loss was computed of them that gives them no gradient.
        self.is_read = False

    def check(self) -> None:
        """Whether they would still be what they were."""
        for tensor, state in zip(self._operands, self._states, strict=True):
            if _state(tensor) != state:
                raise RuntimeError(
                    "logits are asked for after what they are made of was changed: an operand of their linear layer, "
                    f"{tuple(tensor.shape)}, has been written to or released; expected them to be read before that, "
                    "or a model that is converted without `logits`"
                )

    def make(self) -> None:
        """Makes all who live, those first that others are taken from, so that views are views of the same memory."""
        self.check()
        for reference in self.members:
            member = reference()
            if member is not None and member._value is None:
                with torch.set_grad_enabled(member._has_graph):
                    member._value = member._made()


def _state(tensor: Tensor) -> tuple[int, int]:
    return tensor._version, tensor.untyped_storage().nbytes()


class Logits(Tensor):
    """A tensor in the place of logits; see the module. A head that `convert(model, logits=...)` has named returns it.

    Raises:
        RuntimeError: logits are looked at after what they are made of was written to; or `retain_grad()` is called on
            logits whose loss was computed in chunks.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Linear(16, 1000))
        >>> _ = ckpt_kernels.convert(model, logits="1")
        >>> logits = model(torch.randn(512, 16))
        >>> loss = torch.nn.functional.cross_entropy(logits.float(), torch.randint(1000, (512,)))
        >>> type(logits.softmax(-1)) is torch.Tensor  # made now
        True
    """

    _product: _Product
    _family: _Family
    _made: Callable[[], Tensor]
    _like: Tensor  # on meta: shape, strides and dtype
    _has_graph: bool
    _value: Tensor | None

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        if type(first) is Logits and first._value is None:
            if func in _TOLD or (func is Tensor.register_hook and first._family.is_read):
                return super().__torch_function__(func, types, args, kwargs)
            if func is Tensor.retain_grad and first._family.is_read:
                raise RuntimeError("retain_grad() of logits whose loss was computed in chunks: they have no gradient")
            found = _known(func, args, kwargs)
            if found is not None:
                return found
        return func(*_made(args), **_made(kwargs))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        # What comes here has passed torch's functions by; its derivative is that of `_Standing`.
        return func(*_made(args), **_made(kwargs or {}))


def logits_of(input: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Logits:
    """What `F.linear(input, weight, bias)` would be, computed in `dtype`, to be made when it is looked at."""
    product = _Product(input, weight, bias, dtype)
    like = torch.empty((*input.shape[:-1], weight.shape[0]), dtype=dtype, device="meta")
    return _standing(product, _Family(product), product.value, like)


def _standing(product: _Product, family: _Family, made: Callable[[], Tensor], like: Tensor) -> Logits:
    logits = _Standing.apply(product, like, product.input, product.weight, product.bias)
    logits._product, logits._family, logits._made, logits._like = product, family, made, like
    logits._has_graph, logits._value = torch.is_grad_enabled(), None
    family.members.append(weakref.ref(logits))
    return logits


class _Standing(torch.autograd.Function):
    """A tensor without memory, whose gradient, if somebody has one for it, goes on as the product's does."""

    @staticmethod
    def forward(
        ctx: Any, product: _Product, like: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        ctx.dtype, ctx.steps = product.dtype, product.steps
        ctx.save_for_backward(input, weight, bias)
        make: Any = Tensor._make_wrapper_subclass
        return make(Logits, like.shape, strides=like.stride(), dtype=like.dtype, device=input.device)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        needs = ctx.needs_input_grad[2:]
        pairs = list(zip(ctx.saved_tensors, needs, strict=True))
        with torch.enable_grad():
            # Through a view of each, because the derivatives asked for are partial.
            input, weight, bias = operands = [t.view_as(t) if n else t for t, n in pairs]
            value = _Product(input, weight, bias, ctx.dtype, ctx.steps).value()
        wanted = [t for t, n in zip(operands, needs, strict=True) if n]
        found = iter(torch.autograd.grad(value, wanted, grad, create_graph=torch.is_grad_enabled()))
        return None, None, *(next(found) if n else None for n in needs)


def _known(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """What `func` gives without a look at the logits; None where it is not known, or called as it is not known."""
    step = _STEPS.get(func)
    if step is None:
        return None
    logits, *others = args
    try:
        call = inspect.signature(step).bind(logits, func, *others, **kwargs)
    except TypeError:
        return None
    return step(*call.args, **call.kwargs)


def _made(tree: Any) -> Any:
    return tree_map_only(Logits, _value_of, tree)


def _value_of(logits: Logits) -> Tensor:
    if logits._value is None:
        logits._family.make()
    value = logits._value
    assert value is not None
    return value


# What is known: each gives a result, or None for whatever is not as it is expected to be


def _derived(logits: Logits, func: Any, args: tuple, kwargs: dict, input: Tensor, *steps: Step) -> Logits:
    """The logits after `func`, of these rows."""
    like = func(logits._like, *args, **kwargs)
    product = logits._product._replace(input=input, steps=(*logits._product.steps, *steps))
    return _standing(product, logits._family, lambda: func(_value_of(logits), *args, **kwargs), like)


def _reshaped(logits: Logits, func: Any, *args: Any, **kwargs: Any) -> Logits | None:
    """Another shape of the same rows."""
    like = func(logits._like, *args, **kwargs)
    if like.dtype != logits._like.dtype or not like.dim() or like.shape[-1] != logits._like.shape[-1]:
        return None
    input = logits._product.input
    return _derived(logits, func, args, kwargs, input.reshape(*like.shape[:-1], input.shape[-1]))


def _sliced(logits: Logits, func: Any, index: Any) -> Logits | None:
    """Some of the rows, by numbers and slices."""
    entries = index if isinstance(index, tuple) else (index,)
    if not all(map(_is_basic, entries)):
        return None
    taken = sum(entry is not None and entry is not ... for entry in entries)
    if ... not in entries and taken < logits._like.dim():
        entries = (*entries, ...)
    # The last entry is for the last dimension, of which all is to be there.
    is_whole = entries[-1] == slice(None) or (entries[-1] is ... and taken < logits._like.dim())
    return _derived(logits, func, (index,), {}, logits._product.input[index]) if is_whole else None


def _is_basic(entry: Any) -> bool:
    if isinstance(entry, slice):
        return all(type(bound) in (int, type(None)) for bound in (entry.start, entry.stop, entry.step))
    return type(entry) is int or entry is None or entry is ...


def _contiguous(logits: Logits, func: Any) -> Logits:
    return logits if logits._like.is_contiguous() else _derived(logits, func, (), {}, logits._product.input)


def _cast(logits: Logits, func: Any, dtype: Any = torch.float32) -> Logits | None:
    """`float()`, or `to(dtype)`."""
    if type(dtype) is not torch.dtype or not dtype.is_floating_point:
        return None
    if dtype == logits._like.dtype:
        return logits
    args = () if func is Tensor.float else (dtype,)
    return _derived(logits, func, args, {}, logits._product.input, lambda tensor: tensor.to(dtype))


def _by_number(logits: Logits, func: Any, number: Any) -> Logits | None:
    if type(number) not in (int, float):
        return None
    return _derived(logits, func, (number,), {}, logits._product.input, lambda tensor: func(tensor, number))


def _elementwise(logits: Logits, func: Any) -> Logits:
    return _derived(logits, func, (), {}, logits._product.input, func)


def _cross_entropy(
    logits: Logits,
    func: Any,
    target: Any,
    weight: Any = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor | None:
    """Of rows and their classes."""
    like, product = logits._like, logits._product
    if size_average is not None or reduce is not None or weight is not None or not _are_classes(target, logits):
        return None
    if reduction not in ("mean", "sum", "none"):
        return None
    logits._family.check()
    logits._family.is_read = True
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

    loss = Loss(rows, product.dtype, default_chunk(len(product.input), product.input.shape[1], like.shape[1]))
    count = count_of(target, like.dtype, ignore_index, reduction)
    return linear_loss(loss, product.input, product.weight, product.bias, target, count)


def _are_classes(target: Any, logits: Logits) -> bool:
    """Whether there is the number of a class for each row."""
    like = logits._like
    if type(target) is not Tensor or like.dim() != 2 or target.dtype != torch.int64:
        return False
    return target.shape == like.shape[:1] and target.device == logits._product.input.device


_STEPS: dict[Any, Callable[..., Any]] = {
    functional.cross_entropy: _cross_entropy,
    Tensor.__getitem__: _sliced,
    Tensor.contiguous: _contiguous,
    **dict.fromkeys((Tensor.view, Tensor.reshape, Tensor.flatten, torch.reshape, torch.flatten), _reshaped),
    **dict.fromkeys((Tensor.float, Tensor.to), _cast),
    **dict.fromkeys((Tensor.tanh, torch.tanh), _elementwise),
    **dict.fromkeys((Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.mul), _by_number),
    **dict.fromkeys((Tensor.div, Tensor.__truediv__, torch.div), _by_number),
}
# What a tensor tells without a look at its elements.
_TOLD = frozenset(
    (
        *(getattr(Tensor, name) for name in "size dim stride numel nelement ndimension __hash__".split()),
        *(getattr(Tensor, name) for name in "is_contiguous is_floating_point is_complex get_device".split()),
        *(
            getattr(Tensor, name).__get__
            for name in "shape dtype device layout ndim requires_grad grad_fn is_leaf is_cuda is_cpu is_meta".split()
        ),
    )
)
