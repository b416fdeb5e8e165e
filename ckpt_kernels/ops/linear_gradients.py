"""The gradients of a block's operands, and of the products that read the block's output.

The output comes out of the block's gradient kernel, which has the block's input in registers anyway.
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
    found, output = [None] * len(operands), None
    if True in operand_needs:
        # The output's dtype, which under autocast is not the products'.
        grad_output = cast(grad_input_of(grad, weight), operands[0].dtype)
        found, output = block.backward(grad_output, operands, rest, operand_needs, weight_needs)
        found = [g if n else None for g, n in zip(found, operand_needs, strict=True)]
    elif weight_needs:
        output = recomputed_output(block, operands)
    found.append(grad_weight_of(grad, output, weight.dtype) if weight_needs else None)
    found.append(grad_bias_of(grad, bias_dtype) if bias_needs else None)
    return found


def recomputed_output(block: Block, operands: Sequence[Tensor | None]) -> Tensor:
    """The block's output, of unpacked operands: whoever unpacked them may have negated them lazily, which a block for
    small calls takes to be ruled out."""
    return block.forward([None if t is None else t.resolve_neg() for t in operands])[0]


def split_roles(tensors: Sequence[Any], count: int) -> tuple[Sequence[Any], Sequence[Any], Sequence[Any]]:
    """The block's operands, the weights and the biases of `count` products."""
    first = len(tensors) - 2 * count
    return tensors[:first], tensors[first : first + count], tensors[first + count :]


def block_linear_gradients(
    block: Block,
    grads: Sequence[Tensor | None],
    operands: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    rest: tuple[Tensor, ...],
    needs: Sequence[bool],
    kinds: Sequence[torch.dtype | None],
) -> list[Tensor | None]:
    """The gradients of operands, weights and biases; the block's output comes out of its gradient kernel."""
    operand_needs, weight_needs, bias_needs = split_roles(needs, len(weights))
    _, _, bias_kinds = split_roles(kinds, len(weights))
    there = [(g, w) for g, w in zip(grads, weights, strict=True) if g is not None]
    rewrite = any(g is not None and n for g, n in zip(grads, weight_needs, strict=True))
    if not there:
        return [None] * len(needs)
    found, output = [None] * len(operands), None
    if any(operand_needs):
        # The output's dtype, which under autocast is not the products'.
        grad_output = grad_of_shared_input(there, operands[0].dtype)
        found, output = block.backward(grad_output, operands, rest, operand_needs, rewrite)
        found = [g if n else None for g, n in zip(found, operand_needs, strict=True)]
    elif rewrite:
        output = recomputed_output(block, operands)
    for grad, weight, need in zip(grads, weights, weight_needs, strict=True):
        found.append(grad_weight_of(grad, output, weight.dtype) if need and grad is not None else None)
    for grad, need, kind in zip(grads, bias_needs, bias_kinds, strict=True):
        found.append(grad_bias_of(grad, kind) if need and grad is not None else None)
    return found


def composition_of(block: Block) -> Callable[[Sequence[Tensor | None], Sequence[Tensor], torch.dtype], list[Tensor]]:
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
    kinds: Sequence[torch.dtype | None],
) -> list[Tensor | None]:
    """The same by operators that torch sees, as a graph for gradients of gradients: those of the composition. Biases
    add, and have none there."""
    operand_needs, weight_needs, bias_needs = split_roles(needs, len(weights))
    _, _, bias_kinds = split_roles(kinds, len(weights))
    dtype = next((g.dtype for g in grads if g is not None), operands[0].dtype)

    def products(*tensors: Tensor | None) -> list[Tensor]:
        return compose(tensors[: len(operands)], tensors[len(operands) :], dtype)

    result = composed_gradients(products, (*operands, *weights), (*operand_needs, *weight_needs), grads)
    for grad, need, kind in zip(grads, bias_needs, bias_kinds, strict=True):
        result.append(grad_bias_of(grad, kind) if need and grad is not None else None)
    return result
