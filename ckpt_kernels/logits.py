"""Logits that are computed only on demand, and never whole if only a cross entropy reads them.

A `Logits` stands for the output of a linear layer. It has shape, dtype and device, and follows the ops between a
model's head and the loss: reshapes of the same rows, slices of rows, casts, factors and soft caps (see
`logit_functions`). A cross entropy of such logits processes the rows in chunks (see `ops.linear_loss`). Any other use,
by torch, by a method, by C code or by a custom autograd.Function, computes the whole tensor, and continues with that
tensor. Only these functions can be wrong; all others see a plain tensor.

Logits are created only where autograd records. Under `no_grad`, in the forward of an autograd.Function, and if no
operand of the head requires a gradient, the head returns a plain tensor.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from .logit_functions import Description, Product, outcome_of
from .ops.composition import composed_gradients
from .saved_tensor_hooks import without_saved_tensor_hooks


class _Family:
    """The logits of one call of a layer, and all logits derived from them."""

    def __init__(self, product: Product) -> None:
        self._operands = [t for t in product.operands if t is not None]
        self._states = [_state(t) for t in self._operands]
        self.members: list[weakref.ref[Logits]] = []
        # Whether a loss was computed in chunks, which gives these logits no gradient.
        self.has_chunked_loss = False

    def check(self) -> None:
        """Raises RuntimeError if an operand has been written to or freed since."""
        for tensor, state in zip(self._operands, self._states, strict=True):
            if _state(tensor) != state:
                raise RuntimeError(
                    "logits are asked for after what they are made of was changed: an operand of their linear layer, "
                    f"{tuple(tensor.shape)}, has been written to or released; expected them to be read before that, "
                    "or a model that is converted without `logits`"
                )

    def make(self) -> None:
        """Computes all living logits. Logits come before those derived from them, so that views share memory."""
        self.check()
        for reference in self.members:
            member = reference()
            if member is not None and member._made.value is None:
                # As in the call of the head, whatever the context of the reader: a checkpoint, `inference_mode`.
                with torch.inference_mode(False), torch.enable_grad(), without_saved_tensor_hooks():
                    member._made.set(member._make())


def _state(tensor: Tensor) -> tuple[int, int]:
    """The version and the size in memory, which show in-place writes and freed storages."""
    return tensor._version, tensor.untyped_storage().nbytes()


class _Made:
    """The tensor that logits stand for, once computed."""

    value: Tensor | None = None
    _version = 0

    def set(self, value: Tensor) -> None:
        """Stores the tensor and its version."""
        self.value, self._version = value, value._version

    def check(self) -> None:
        """Raises RuntimeError if the tensor was written to."""
        if self.value is not None and self.value._version != self._version:
            raise RuntimeError(_LOST_GRADIENT)


_LOST_GRADIENT = (
    "logits were written to, and read by an autograd.Function, or written to by one: the gradient of the write would "
    "be lost; expected the result of an operation that makes a tensor, such as logits.mul(2) for logits.mul_(2), or a "
    "model that is converted without `logits`"
)


class Logits(Tensor):
    """A tensor in the place of logits; see the module. The head that `convert(model, logits=...)` names returns one.

    Raises:
        RuntimeError: code asks logits for more than shape, dtype or device after the input, weight or bias of the head
            was written to or released; `retain_grad()` is called on logits whose loss was computed in chunks; the
            gradient of such a loss with respect to its logits is requested; logits that were written to are given to an
            autograd.Function, or an autograd.Function writes to logits.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Linear(16, 1000))
        >>> _ = ckpt_kernels.convert(model, logits="1")
        >>> logits = model(torch.randn(512, 16))
        >>> loss = torch.nn.functional.cross_entropy(logits.float(), torch.randint(1000, (512,)))
        >>> type(logits.softmax(-1)) is torch.Tensor  # made now
        True
    """

    _description: Description
    _family: _Family
    _make: Callable[[], Tensor]
    _made: _Made
    _node: Any  # the autograd node of the placeholder

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        if type(first) is Logits and first._made.value is None:
            if func in _METADATA_FUNCTIONS or (func is Tensor.register_hook and first._family.has_chunked_loss):
                return super().__torch_function__(func, types, args, kwargs)
            if func is Tensor.retain_grad and first._family.has_chunked_loss:
                raise RuntimeError("retain_grad() of logits whose loss was computed in chunks: they have no gradient")
            # The input may have been freed, so check before reading rows.
            first._family.check()
            outcome = outcome_of(func, first._description, args[1:], kwargs)
            if outcome is first._description:
                return first
            if isinstance(outcome, Description) and torch.is_grad_enabled():
                return _placeholder_for(outcome, first._family, lambda: func(_value_of(first), *args[1:], **kwargs))
            if callable(outcome):
                loss = outcome()
                first._family.has_chunked_loss = True
                return loss
        # torch itself reads and sets attributes, within calls.
        is_attribute = getattr(func, "__name__", "") in ("__get__", "__set__")
        args, kwargs = tree_map_only(Logits, _value_of if is_attribute else _recorded_value_of, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        # Calls that arrive here bypassed torch's functions. `_Placeholder` differentiates them.
        args, kwargs = tree_map_only(Logits, _value_of, (args, kwargs or {}))
        return func(*args, **kwargs)


def logits_of(input: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Logits:
    """The result of `F.linear(input, weight, bias)`, computed in `dtype` on demand.

    At least one operand must require a gradient, where gradients are recorded.
    """
    product = Product(_alias(input), _alias(weight), None if bias is None else _alias(bias), dtype)
    like = torch.empty((*input.shape[:-1], weight.shape[0]), dtype=dtype, device="meta")
    return _placeholder_for(Description(product, like), _Family(product), product.value)


def _alias(tensor: Tensor) -> Tensor:
    """An alias of the tensor that keeps `requires_grad` as it is now, whatever is set on the tensor later."""
    return tensor.view_as(tensor) if tensor.requires_grad else tensor.detach()


def _placeholder_for(description: Description, family: _Family, make: Callable[[], Tensor]) -> Logits:
    """Logits with an autograd node, and without memory."""
    made = _Made()
    logits = _Placeholder.apply(description, made, *description.product.operands)
    logits._description, logits._family, logits._make, logits._made = description, family, make, made
    logits._node = _node_of(logits)
    family.members.append(weakref.ref(logits))
    return logits


class _Placeholder(torch.autograd.Function):
    """A tensor without memory. A gradient for it continues as that of the product."""

    @staticmethod
    def forward(
        ctx: Any, description: Description, made: _Made, input: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        product, like = description
        ctx.made = made
        ctx.dtype, ctx.elementwise = product.dtype, product.elementwise
        ctx.save_for_backward(input, weight, bias)
        wrapper: Any = Tensor._make_wrapper_subclass
        return wrapper(Logits, like.shape, strides=like.stride(), dtype=like.dtype, device=input.device)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        def compute(input: Tensor, weight: Tensor, bias: Tensor | None) -> list[Tensor]:
            return [Product(input, weight, bias, ctx.dtype, ctx.elementwise).value()]

        ctx.made.check()
        return None, None, *composed_gradients(compute, ctx.saved_tensors, ctx.needs_input_grad[2:], (grad,))


def _recorded_value_of(logits: Logits) -> Tensor:
    """The tensor, if no autograd.Function has written to the logits."""
    # An autograd.Function that writes to its argument becomes the argument's node.
    if _node_of(logits) is not logits._node:
        raise RuntimeError(_LOST_GRADIENT)
    return _value_of(logits)


def _value_of(logits: Logits) -> Tensor:
    """The tensor that the logits stand for, computed if it does not exist yet."""
    if logits._made.value is None:
        logits._family.make()
    value = logits._made.value
    assert value is not None
    return value


def _node_of(logits: Logits) -> Any:
    """The autograd node of the logits themselves, and not of the tensor that they stand for."""
    with torch._C.DisableTorchFunctionSubclass():
        return logits.grad_fn


# Functions that read metadata of a tensor, and no elements.
_METADATA_FUNCTIONS = frozenset(
    (
        *(getattr(Tensor, name) for name in "size dim stride numel nelement ndimension __hash__".split()),
        *(getattr(Tensor, name) for name in "is_contiguous is_floating_point is_complex get_device".split()),
        *(
            getattr(Tensor, name).__get__
            for name in "shape dtype device layout ndim requires_grad grad_fn is_leaf is_cuda is_cpu is_meta".split()
        ),
    )
)
