"""An MLP that processes rows in tiles: the tensors between the products exist for one tile at a time.

Forward and backward pass use the same tiles. Gradients of weights are accumulated over the tiles in one buffer, and
given to autograd once, so that hooks on a parameter's gradient (DDP, FSDP, accumulation) see one complete gradient.
"""

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..recompute.hooks import top_hooks
from .accumulate import add_product, add_sum, buffer_for
from .composition import by_composition
from .linear import announce_product, linear_block_linear, record_if
from .linear_blocks import Block
from .linear_gradients import through_composition
from .products import as_matrix, grad_input_of, grad_of_shared_input, product_dtype, product_of, products_of
from .registration import is_plain, is_transformed
from .same_backend import same_backend_function


class _Thread(threading.local):
    # The number of tiles, and the saved-tensor hooks in which the number was set.
    tiles = 1
    hooks: Any = None


_thread = _Thread()


@contextlib.contextmanager
def in_tiles(tiles: int) -> Iterator[None]:
    """A context in which MLPs on this thread use this many tiles, unless a call gives the number.

    Within foreign saved-tensor hooks that begin inside, there is one tile: a checkpoint that begins here runs again
    elsewhere, and must save the same tensors.
    """
    outer = _thread.tiles, _thread.hooks
    _thread.tiles, _thread.hooks = tiles, top_hooks()
    try:
        yield
    finally:
        _thread.tiles, _thread.hooks = outer


def tiles_now() -> int:
    """The number of tiles for MLPs whose call does not give the number."""
    if _thread.tiles == 1 or torch.compiler.is_compiling():
        return _thread.tiles
    return _thread.tiles if top_hooks() == _thread.hooks else 1


def _bounds(rows: int, tiles: int) -> list[tuple[int, int]]:
    """The first and last row of each tile: at most `tiles`, none empty, or one empty tile if there are no rows."""
    size = max(1, -(-rows // tiles))
    return [(begin, min(begin + size, rows)) for begin in range(0, max(rows, 1), size)]


@same_backend_function
class _TiledMLP(torch.autograd.Function):
    """block(products of the input) times a weight, with one tile for each block."""

    @staticmethod
    def forward(
        ctx: Any,
        blocks: Sequence[Block],
        dtype: torch.dtype,
        keeps_products: bool,
        input: Tensor,
        *tensors: Tensor | None,
    ) -> Tensor:
        *first_parameters, weight, bias = tensors
        assert weight is not None
        kept = products_of(input, first_parameters, dtype) if keeps_products else []
        output = _output(blocks, dtype, input, first_parameters, weight, bias, kept)
        ctx.blocks, ctx.bounds, ctx.dtype = blocks, _bounds(len(input), len(blocks)), dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(input, *first_parameters, weight, *kept)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        needs = ctx.needs_input_grad[3:]
        input, *rest = ctx.saved_tensors
        first_parameters, weight, kept = rest[: len(needs) - 3], rest[len(needs) - 3], rest[len(needs) - 2 :]
        if by_composition((grad,)):
            gradients = _composed_gradients(ctx, grad, input, first_parameters, weight, needs)
        else:
            gradients = _gradients(ctx, grad, input, first_parameters, weight, kept, needs)
        return None, None, None, *gradients


def _output(
    blocks: Sequence[Block],
    dtype: torch.dtype,
    input: Tensor,
    first_parameters: Sequence[Tensor | None],
    weight: Tensor,
    bias: Tensor | None,
    kept: Sequence[Tensor],
) -> Tensor:
    """The output, from the `kept` first products, or from new ones if none are kept."""
    output = input.new_empty((len(input), weight.shape[0]), dtype=dtype)
    for block, (begin, end) in zip(blocks, _bounds(len(input), len(blocks)), strict=False):
        operands = [p[begin:end] for p in kept] if kept else products_of(input[begin:end], first_parameters, dtype)
        inner, _ = block.forward(operands)
        del operands
        output[begin:end] = product_of(inner, weight, bias, dtype)
    return output


def _gradients(
    ctx: Any,
    grad: Tensor,
    input: Tensor,
    first_parameters: Sequence[Tensor | None],
    weight: Tensor,
    kept: Sequence[Tensor],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients of the input, of the first products' weights and biases, of the last weight and of its bias."""
    wants_input, *first_needs, wants_weight, wants_bias = needs
    product_needs = [wants_input or any(first_needs[i : i + 2]) for i in range(0, len(first_parameters), 2)]
    grad_input = torch.empty_like(input, memory_format=torch.contiguous_format) if wants_input else None
    buffers = [
        buffer_for(t, ctx.dtype) if t is not None and n else None
        for t, n in zip((*first_parameters, weight), (*first_needs, wants_weight), strict=True)
    ]
    for block, (begin, end) in zip(ctx.blocks, ctx.bounds, strict=False):
        part, grad_part = input[begin:end], grad[begin:end]
        operands = [p[begin:end] for p in kept] if kept else products_of(part, first_parameters, ctx.dtype)
        inner, grads = None, [None] * len(operands)
        if any(product_needs):
            inner_grad = grad_input_of(grad_part, weight).to(operands[0].dtype)
            grads, inner = block.backward(inner_grad, operands, (), product_needs, wants_weight)
            del inner_grad
        elif wants_weight:
            inner, _ = block.forward(operands)
        del operands
        if buffers[-1] is not None:
            add_product(buffers[-1], grad_part, inner.to(grad_part.dtype))
        del inner
        for i, gradient in enumerate(grads):
            of_weight, of_bias = buffers[2 * i : 2 * i + 2]
            if of_weight is not None:
                add_product(of_weight, gradient, part.to(gradient.dtype))
            if of_bias is not None:
                add_sum(of_bias, gradient)
        if grad_input is not None:
            pairs = [(g, w) for g, w in zip(grads, first_parameters[::2], strict=True)]
            grad_input[begin:end] = grad_of_shared_input(pairs, input.dtype)
        del grads
    grad_bias = grad.sum(0).to(ctx.bias_dtype) if wants_bias else None
    parameters = (*first_parameters, weight)
    gradients = [None if b is None else b.to(p.dtype) for b, p in zip(buffers, parameters, strict=True)]
    return [grad_input, *gradients, grad_bias]


def _composed_gradients(
    ctx: Any,
    grad: Tensor,
    input: Tensor,
    first_parameters: Sequence[Tensor | None],
    weight: Tensor,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """The same by separate torch ops, as a graph for second derivatives."""

    def compose(operands: Sequence[Tensor | None], weights: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
        input, *first_parameters = operands
        assert input is not None
        parts = [
            product_of(block.composed(products_of(input[begin:end], first_parameters, dtype)), weights[0], None, dtype)
            for block, (begin, end) in zip(ctx.blocks, ctx.bounds, strict=False)
        ]
        return [torch.cat(parts)]

    operands = (input, *first_parameters)
    dtypes = [None if t is None else t.dtype for t in (*operands, weight)]
    return through_composition(compose, (grad,), operands, (weight,), needs, [*dtypes, ctx.bias_dtype])


def tiled_mlp(
    blocks: Sequence[Block],
    input: Tensor,
    first_parameters: Sequence[Tensor | None],
    weight: Tensor,
    bias: Tensor | None,
    recompute: str,
) -> Tensor:
    """`linear_block_linear`, with one tile of rows for each block.

    If something must see single ops (torch.compile, torch.func), all rows are one tile.
    """
    if torch.compiler.is_compiling() or is_transformed() or not is_plain((input, *first_parameters, weight, bias)):
        return linear_block_linear(blocks[0], input, first_parameters, weight, bias, recompute)
    matrix, dtype = as_matrix(input), product_dtype(input)
    shape = (*input.shape[:-1], weight.shape[0])
    if not torch.is_grad_enabled():
        return _output(blocks, dtype, matrix, first_parameters, weight, bias, ()).reshape(shape)

    def product(weight: Tensor, bias: Tensor | None, input: Tensor, *first_parameters: Tensor | None) -> Tensor:
        return _output(blocks, dtype, input, first_parameters, weight, bias, ())

    keeps_products = recompute != "all"
    is_announced = not keeps_products and announce_product(product, weight, bias, matrix, *first_parameters)
    output = _TiledMLP.apply(tuple(blocks), dtype, keeps_products, matrix, *first_parameters, weight, bias)
    return record_if(output, is_announced).reshape(shape)
