"""An MLP that takes its rows in tiles: what is between its products exists for one tile at a time.

Forward and backward pass walk over the same tiles. Gradients of weights are added up over them in one buffer and given
to autograd once, so that whoever waits for a parameter's gradient (DDP, FSDP, accumulation) gets it once and whole.
"""

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .accumulate import add_product, add_sum, buffer_for
from .composition import by_composition
from .linear import announce_product, linear_block_linear, record_if
from .linear_blocks import Block
from .linear_gradients import through_composition
from .products import as_matrix, grad_input_of, grad_of_shared_input, product_dtype, product_of, products_of
from .registration import is_plain, is_transformed
from .same_backend import same_backend_function


class _Thread(threading.local):
    tiles = 1


_thread = _Thread()


@contextlib.contextmanager
def in_tiles(tiles: int) -> Iterator[None]:
    """MLPs that are called within, on this thread, and are not told how many tiles to take, take so many."""
    before, _thread.tiles = _thread.tiles, tiles
    try:
        yield
    finally:
        _thread.tiles = before


def tiles_now() -> int:
    """How many tiles MLPs take that are not told."""
    return _thread.tiles


def _bounds(rows: int, tiles: int) -> list[tuple[int, int]]:
    """Where each tile begins and ends: at most so many, none of them empty, but one of no rows."""
    size = max(1, -(-rows // tiles))
    return [(begin, min(begin + size, rows)) for begin in range(0, max(rows, 1), size)]


@same_backend_function
class _TiledMLP(torch.autograd.Function):
    """block(products of the input) times a weight, in as many tiles as there are blocks."""

    @staticmethod
    def forward(
        ctx: Any, blocks: Sequence[Block], dtype: torch.dtype, keeps: bool, input: Tensor, *tensors: Tensor | None
    ) -> Tensor:
        *firsts, weight, bias = tensors
        assert weight is not None
        kept = products_of(input, firsts, dtype) if keeps else []
        output = _output(blocks, dtype, input, firsts, weight, bias, kept)
        ctx.blocks, ctx.bounds, ctx.dtype = blocks, _bounds(len(input), len(blocks)), dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(input, *firsts, weight, *kept)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        needs = ctx.needs_input_grad[3:]
        input, *rest = ctx.saved_tensors
        firsts, weight, kept = rest[: len(needs) - 3], rest[len(needs) - 3], rest[len(needs) - 2 :]
        if by_composition((grad,)):
            found = _composed_gradients(ctx, grad, input, firsts, weight, needs)
        else:
            found = _gradients(ctx, grad, input, firsts, weight, kept, needs)
        return None, None, None, *found


def _output(
    blocks: Sequence[Block],
    dtype: torch.dtype,
    input: Tensor,
    firsts: Sequence[Tensor | None],
    weight: Tensor,
    bias: Tensor | None,
    kept: Sequence[Tensor],
) -> Tensor:
    """Of the first products that are `kept`, or that are made where none are."""
    output = input.new_empty((len(input), weight.shape[0]), dtype=dtype)
    for block, (begin, end) in zip(blocks, _bounds(len(input), len(blocks)), strict=False):
        operands = [p[begin:end] for p in kept] if kept else products_of(input[begin:end], firsts, dtype)
        inner, _ = block.forward(operands)
        del operands
        output[begin:end] = product_of(inner, weight, bias, dtype)
    return output


def _gradients(
    ctx: Any,
    grad: Tensor,
    input: Tensor,
    firsts: Sequence[Tensor | None],
    weight: Tensor,
    kept: Sequence[Tensor],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Of the input, weights and biases of the first products, the last weight and its bias."""
    wants_input, *first_needs, wants_weight, wants_bias = needs
    of_product = [wants_input or any(first_needs[i : i + 2]) for i in range(0, len(firsts), 2)]
    grad_input = torch.empty_like(input, memory_format=torch.contiguous_format) if wants_input else None
    buffers = [
        buffer_for(t, ctx.dtype) if t is not None and n else None
        for t, n in zip((*firsts, weight), (*first_needs, wants_weight), strict=True)
    ]
    for block, (begin, end) in zip(ctx.blocks, ctx.bounds, strict=False):
        part, above = input[begin:end], grad[begin:end]
        operands = [p[begin:end] for p in kept] if kept else products_of(part, firsts, ctx.dtype)
        inner, found = None, [None] * len(operands)
        if any(of_product):
            below = grad_input_of(above, weight).to(operands[0].dtype)
            found, inner = block.backward(below, operands, (), of_product, wants_weight)
            del below
        elif wants_weight:
            inner, _ = block.forward(operands)
        del operands
        if buffers[-1] is not None:
            add_product(buffers[-1], above, inner.to(above.dtype))
        del inner
        for i, gradient in enumerate(found):
            of_weight, of_bias = buffers[2 * i : 2 * i + 2]
            if of_weight is not None:
                add_product(of_weight, gradient, part.to(gradient.dtype))
            if of_bias is not None:
                add_sum(of_bias, gradient)
        if grad_input is not None:
            there = [(g, w) for g, w in zip(found, firsts[::2], strict=True)]
            grad_input[begin:end] = grad_of_shared_input(there, input.dtype)
        del found
    grad_bias = grad.sum(0).to(ctx.bias_dtype) if wants_bias else None
    parameters = (*firsts, weight)
    gradients = [None if b is None else b.to(p.dtype) for b, p in zip(buffers, parameters, strict=True)]
    return [grad_input, *gradients, grad_bias]


def _composed_gradients(
    ctx: Any, grad: Tensor, input: Tensor, firsts: Sequence[Tensor | None], weight: Tensor, needs: Sequence[bool]
) -> list[Tensor | None]:
    """The same by operators that torch sees, as a graph for gradients of gradients."""

    def compose(operands: Sequence[Tensor | None], weights: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
        input, *firsts = operands
        assert input is not None
        parts = [
            product_of(block.composed(products_of(input[begin:end], firsts, dtype)), weights[0], None, dtype)
            for block, (begin, end) in zip(ctx.blocks, ctx.bounds, strict=False)
        ]
        return [torch.cat(parts)]

    operands = (input, *firsts)
    kinds = [None if t is None else t.dtype for t in (*operands, weight)]
    return through_composition(compose, (grad,), operands, (weight,), needs, [*kinds, ctx.bias_dtype])


def tiled_mlp(
    blocks: Sequence[Block],
    input: Tensor,
    firsts: Sequence[Tensor | None],
    weight: Tensor,
    bias: Tensor | None,
    recompute: str,
) -> Tensor:
    """`linear_block_linear` in as many tiles of rows as there are blocks.

    Where somebody must see the ops one by one (torch.compile, torch.func), all rows are one tile.
    """
    if torch.compiler.is_compiling() or is_transformed() or not is_plain((input, *firsts, weight, bias)):
        return linear_block_linear(blocks[0], input, firsts, weight, bias, recompute)
    matrix, dtype = as_matrix(input), product_dtype(input)
    shape = (*input.shape[:-1], weight.shape[0])
    if not torch.is_grad_enabled():
        return _output(blocks, dtype, matrix, firsts, weight, bias, ()).reshape(shape)

    def product(weight: Tensor, bias: Tensor | None, input: Tensor, *firsts: Tensor | None) -> Tensor:
        return _output(blocks, dtype, input, firsts, weight, bias, ())

    keeps = recompute != "all"
    is_announced = not keeps and announce_product(product, weight, bias, matrix, *firsts)
    output = _TiledMLP.apply(tuple(blocks), dtype, keeps, matrix, *firsts, weight, bias)
    return record_if(output, is_announced).reshape(shape)
