"""The gradients of a block's operands, and of the products that read the block's output.

The block's gradient kernel, which has the block's input in registers anyway, writes the output again.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .composition import composed_gradients
from .linear_blocks import Block
from .products import cast, grad_bias_of, grad_input_of, grad_of_shared_input, grad_weight_of, product_of


def block_product_gradients(
    block: Block,
    grad: Tensor | None,
    operands: Sequence[Tensor | None],
    weight: Tensor,
    rest: tuple[Tensor, ...],
    needs: Sequence[bool],
    bias_dtype: torch.dtype | None,
) -> list[Tensor | None]:
    """`block_linear_gradients` of one product."""
    if grad is None:
        return [None] * len(needs)
    *operand_needs, weight_needs, bias_needs = needs
    grads, output = [None] * len(operands), None
    if True in operand_needs:
        # In the output's dtype, which differs from the products' under autocast.
        grad_output = cast(grad_input_of(grad, weight), operands[0].dtype)
        grads, output = block.backward(grad_output, operands, rest, operand_needs, weight_needs)
        grads = [g if n else None for g, n in zip(grads, operand_needs, strict=True)]
    elif weight_needs:
        output = recomputed_output(block, operands)
    grads.append(grad_weight_of(grad, output, weight.dtype) if weight_needs else None)
    grads.append(grad_bias_of(grad, bias_dtype) if bias_needs else None)
    return grads


def recomputed_output(block: Block, operands: Sequence[Tensor | None]) -> Tensor:
    """Recomputes the block's output from unpacked operands.

    Hooks may unpack lazily negated tensors, which the blocks for small calls do not expect.
    """
    return block.forward([None if t is None else t.resolve_neg() for t in operands])[0]


def split_roles(tensors: Sequence[Any], count: int) -> tuple[Sequence[Any], Sequence[Any], Sequence[Any]]:
    """Splits a sequence into those of the block's operands, the weights and the biases of `count` products."""
    first = len(tensors) - 2 * count
    return tensors[:first], tensors[first : first + count], tensors[first + count :]


def block_linear_gradients(
    block: Block,
    grads: Sequence[Tensor | None],
    operands: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    rest: tuple[Tensor, ...],
    needs: Sequence[bool],
    dtypes: Sequence[torch.dtype | None],
) -> list[Tensor | None]:
    """The gradients of operands, weights and biases. The block's gradient kernel writes the output again."""
    operand_needs, weight_needs, bias_needs = split_roles(needs, len(weights))
    _, _, bias_dtypes = split_roles(dtypes, len(weights))
    pairs = [(g, w) for g, w in zip(grads, weights, strict=True) if g is not None]
    rewrite = any(g is not None and n for g, n in zip(grads, weight_needs, strict=True))
    if not pairs:
        return [None] * len(needs)
    results, output = [None] * len(operands), None
    if any(operand_needs):
        # In the output's dtype, which differs from the products' under autocast.
        grad_output = grad_of_shared_input(pairs, operands[0].dtype)
        results, output = block.backward(grad_output, operands, rest, operand_needs, rewrite)
        results = [g if n else None for g, n in zip(results, operand_needs, strict=True)]
    elif rewrite:
        output = recomputed_output(block, operands)
    for grad, weight, need in zip(grads, weights, weight_needs, strict=True):
        results.append(grad_weight_of(grad, output, weight.dtype) if need and grad is not None else None)
    for grad, need, kind in zip(grads, bias_needs, bias_dtypes, strict=True):
        results.append(grad_bias_of(grad, kind) if need and grad is not None else None)
    return results


def composition_of(block: Block) -> Callable[[Sequence[Tensor | None], Sequence[Tensor], torch.dtype], list[Tensor]]:
    """The composition of a block and its products, as separate torch ops."""

    def products(operands: Sequence[Tensor | None], weights: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
        output = block.composed(operands)
        return [product_of(output, w, None, dtype) for w in weights]

    return products


def through_composition(
    compose: Callable[[Sequence[Tensor | None], Sequence[Tensor], torch.dtype], list[Tensor]],
    grads: Sequence[Tensor | None],
    operands: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    needs: Sequence[bool],
    dtypes: Sequence[torch.dtype | None],
) -> list[Tensor | None]:
    """The same gradients by separate torch ops, as a graph for second derivatives.

    Biases are added, so their gradients need no second derivative.
    """
    operand_needs, weight_needs, bias_needs = split_roles(needs, len(weights))
    _, _, bias_dtypes = split_roles(dtypes, len(weights))
    dtype = next((g.dtype for g in grads if g is not None), operands[0].dtype)

    def products(*tensors: Tensor | None) -> list[Tensor]:
        return compose(tensors[: len(operands)], tensors[len(operands) :], dtype)

    result = composed_gradients(products, (*operands, *weights), (*operand_needs, *weight_needs), grads)
    for grad, need, kind in zip(grads, bias_needs, bias_dtypes, strict=True):
        result.append(grad_bias_of(grad, kind) if need and grad is not None else None)
    return result
