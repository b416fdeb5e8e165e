"""Linear layers that read a block, where only the block's input is kept.

A Linear keeps its input for the gradient of the weight. Here that input is a block's output. The block's gradient
kernel, which has the block's input in registers anyway, writes the output again, so no pass over memory is added.
Matrix products are torch's. Weights are kept themselves, never the copies that autocast casts. A weight that needs no
gradient costs no computation and no memory.

If something must see single ops (torch.compile, torch.func, tensor subclasses), the plain composition computes the
same.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import recompute
from ..autocast import is_autocast
from .composition import by_composition, is_fused
from .linear_blocks import Block
from .linear_gradients import (
    block_linear_gradients,
    block_product_gradients,
    composition_of,
    split_roles,
    through_composition,
)
from .products import (
    as_non_view,
    as_saved,
    grad_bias_of,
    grad_input_of,
    grad_of_shared_input,
    grad_weight_of,
    linear_of_torch,
    product_dtype,
    product_of,
    products_of,
)
from .same_backend import same_backend_function


class _Linear(torch.autograd.Function):
    """F.linear that keeps the operands themselves, and not the copies that autocast casts."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        wants_input, wants_weight = ctx.needs_input_grad[:2]
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.input_dtype, ctx.weight_dtype = input.dtype, weight.dtype
        ctx.save_for_backward(input if wants_weight else None, weight if wants_input else None)
        return as_non_view(product_of(input, weight, bias, dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        input, weight = ctx.saved_tensors
        grad_input = grad_weight = grad_bias = None
        if weight is not None:
            grad_input = grad_input_of(grad, weight).to(ctx.input_dtype)
        if input is not None:
            grad_weight = grad_weight_of(grad, input, ctx.weight_dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = grad_bias_of(grad, ctx.bias_dtype)
        return grad_input, grad_weight, grad_bias, None


def _apply_of(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """The function's `apply` without the check for torch.func's transforms, which `is_fused` has done."""
    return super(torch.autograd.Function, function).apply


def linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear. Under autocast, keeps input and weight themselves instead of cast copies."""
    if not is_autocast(input) or not is_fused(input, weight, bias):
        return linear_of_torch(input, weight, bias)
    return _apply_of(_Linear)(as_saved(input), weight, bias, product_dtype(input))


# A block, and the products that read its output


@same_backend_function
class _BlockProduct(torch.autograd.Function):
    """A product of a block's output, which keeps the block's operands and not the output."""

    @staticmethod
    def forward(ctx: Any, block: Block, dtype: torch.dtype, *tensors: Tensor | None) -> Tensor:
        *operands, weight, bias = tensors
        output, rest = block.forward(operands)
        ctx.block, ctx.bias_dtype = block, None if bias is None else bias.dtype
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*operands, weight, *rest)
        return as_non_view(product_of(output, weight, bias, dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple:
        needs = ctx.needs_input_grad[2:]
        count = len(needs) - 2
        # Read only once: unpacking may compute.
        saved = ctx.saved_tensors
        operands, weight, rest = saved[:count], saved[count], saved[count + 1 :]
        if by_composition((grad,)):
            dtypes = [None if t is None else t.dtype for t in (*operands, weight)]
            dtypes.append(ctx.bias_dtype)
            grads = through_composition(composition_of(ctx.block), (grad,), operands, (weight,), needs, dtypes)
        else:
            grads = block_product_gradients(ctx.block, grad, operands, weight, rest, needs, ctx.bias_dtype)
        return None, None, *grads


@same_backend_function
class _BlockLinear(torch.autograd.Function):
    """Several products of a block's output, which keep the block's operands and not the output."""

    @staticmethod
    def forward(ctx: Any, block: Block, count: int, dtype: torch.dtype, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        operands, weights, biases = split_roles(tensors, count)
        output, rest = block.forward(operands)
        ctx.block, ctx.count, ctx.dtypes = block, count, [None if t is None else t.dtype for t in tensors]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*operands, *weights, *rest)
        return tuple(as_non_view(product_of(output, w, b, dtype)) for w, b in zip(weights, biases, strict=True))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple:
        needs = ctx.needs_input_grad[3:]
        first = len(needs) - 2 * ctx.count
        # Read only once: unpacking may compute.
        saved = ctx.saved_tensors
        operands, weights, rest = saved[:first], saved[first : first + ctx.count], saved[first + ctx.count :]
        if by_composition(grads):
            gradients = through_composition(composition_of(ctx.block), grads, operands, weights, needs, ctx.dtypes)
        else:
            gradients = block_linear_gradients(ctx.block, grads, operands, weights, rest, needs, ctx.dtypes)
        return None, None, None, *gradients


def block_linear(
    block: Block, operands: Sequence[Tensor | None], weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    """The block's output times each weight, plus bias. Keeps the operands; see the module."""
    if not is_fused(*operands, *weights, *biases):
        return composed_linear(block, operands, weights, biases)
    return fused_block_linear(block, operands, weights, biases)


def fused_block_linear(
    block: Block, operands: Sequence[Tensor | None], weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    """`block_linear` for callers that have checked `is_fused` for all tensors."""
    # If no operand needs a gradient, keeping the output takes the least memory.
    if not any([t is not None and t.requires_grad for t in operands]):
        return composed_linear(block, operands, weights, biases)
    dtype = product_dtype(operands[0])
    if len(weights) > 1:
        return _apply_of(_BlockLinear)(block, len(weights), dtype, *operands, *weights, *biases)
    (weight,), (bias,) = weights, biases
    if not recompute.thread.active:
        return (_apply_of(_BlockProduct)(block, dtype, *operands, weight, bias),)

    def product(weight: Tensor, bias: Tensor | None, *operands: Tensor | None) -> Tensor:
        return product_of(block.forward(operands)[0], weight, bias, dtype)

    is_announced = announce_product(product, weight, bias, *operands)
    return (record_if(_apply_of(_BlockProduct)(block, dtype, *operands, weight, bias), is_announced),)


def announce_product(product: Callable[..., Tensor], *tensors: Tensor | None) -> bool:
    """Announces a last product, which runs again within a layer if a norm reads the result."""
    return bool(recompute.thread.active) and recompute.announce_in_layer(
        (lambda *again: as_non_view(product(*again)), tensors)
    )


def record_if(output: Tensor, is_announced: bool) -> Tensor:
    """Records the output if its product was announced."""
    if is_announced:
        recompute.record(output)
    return output


def composed_linear(
    block: Block, operands: Sequence[Tensor | None], weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    """The same as separate ops: the block as an op, and F.linear, which keeps the output."""
    output = block.composed(operands)
    return tuple(linear_of_torch(output, w, b) for w, b in zip(weights, biases, strict=True))


# One or two products, a block that reads them, and a product of the block's output


@same_backend_function
class _LinearBlockLinear(torch.autograd.Function):
    """One or two products of the input, a block of these, and a product of the block's output. Only the input is kept.

    The first products run again in the backward pass. The last does not, because its result is not needed.
    """

    @staticmethod
    def forward(ctx: Any, block: Block, dtype: torch.dtype, input: Tensor, *tensors: Tensor | None) -> Tensor:
        *first_parameters, weight, bias = tensors
        operands = products_of(input, first_parameters, dtype)
        output, _ = block.forward(operands)
        ctx.block, ctx.dtype = block, dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(input, *first_parameters, weight)
        return as_non_view(product_of(output, weight, bias, dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        input, *first_parameters, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad[2:]
        grad_bias = grad_bias_of(grad, ctx.bias_dtype) if needs[-1] else None
        if by_composition((grad,)):
            tensors = [input, *first_parameters, weight]

            def compose(operands: Sequence[Tensor | None], weights: Sequence[Tensor], dtype: torch.dtype):
                inner = products_of(operands[0], operands[1:], dtype)
                return [product_of(ctx.block.composed(inner), weights[0], None, dtype)]

            dtypes = [None if t is None else t.dtype for t in (*tensors, None)]
            grads = through_composition(compose, (grad,), tensors[:-1], tensors[-1:], (*needs[:-1], False), dtypes)
            return None, None, *grads[:-1], grad_bias
        wants_input, *first_needs = needs[:-2]
        operands = products_of(input, first_parameters, ctx.dtype)
        inner_needs = [wants_input or any(first_needs[i : i + 2]) for i in range(0, len(first_parameters), 2)]
        dtypes = [*(t.dtype for t in operands), weight.dtype, None]
        wanted = (*inner_needs, needs[-2], False)
        inner = block_linear_gradients(ctx.block, (grad,), operands, (weight,), (), wanted, dtypes)
        del operands
        grads: list[Tensor | None] = []
        pairs = []
        for index, (w, b) in enumerate(zip(first_parameters[::2], first_parameters[1::2], strict=True)):
            g = inner[index]
            pairs.append((g, w))
            grads.append(grad_weight_of(g, input, w.dtype) if first_needs[2 * index] else None)
            grads.append(grad_bias_of(g, b.dtype) if first_needs[2 * index + 1] else None)
        grad_input = grad_of_shared_input(pairs, input.dtype) if wants_input else None
        return None, None, grad_input, *grads, inner[len(inner_needs)], grad_bias


def linear_block_linear(
    block: Block,
    input: Tensor,
    first_parameters: Sequence[Tensor | None],
    weight: Tensor,
    bias: Tensor | None,
    recompute: str,
) -> Tensor:
    """block(first products of the input) times weight, plus bias; `first_parameters` is weight, bias, and so on.

    `recompute` says which tensors are kept: "block" keeps all, "output" the first products, "all" only the input.
    """
    if recompute == "all" and is_fused(input, *first_parameters, weight, bias):
        dtype = product_dtype(input)
        input = as_saved(input)

        def product(weight: Tensor, bias: Tensor | None, input: Tensor, *first_parameters: Tensor | None) -> Tensor:
            return product_of(block.forward(products_of(input, first_parameters, dtype))[0], weight, bias, dtype)

        is_announced = announce_product(product, weight, bias, input, *first_parameters)
        return record_if(
            _apply_of(_LinearBlockLinear)(block, dtype, input, *first_parameters, weight, bias), is_announced
        )
    product = linear if is_autocast(input) else linear_of_torch
    operands = [product(input, w, b) for w, b in zip(first_parameters[::2], first_parameters[1::2], strict=True)]
    compute = composed_linear if recompute == "block" else block_linear
    return compute(block, operands, (weight,), (bias,))[0]
