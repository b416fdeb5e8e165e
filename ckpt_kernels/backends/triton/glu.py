"""The glu kernels: activation(gate) * value, element by element, with limits for both, and how they are launched.

A program works on a tile of ROWS rows by BLOCK columns. Where gate and value take turns in memory (TURNS), 2 * BLOCK
elements are read at once and taken apart.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .activations import activate, as_stored, differentiate
from .launch import Matrix, Tile, element_tile, launch, matrix_of
from .row_norm_tiles import load_rows, store_rows


class Shape(NamedTuple):
    """The shape of a matrix, and the number of tiles that cover the columns."""

    rows: int
    columns: int
    column_tiles: int


def shape_of(matrix: Tensor, tile: Tile) -> Shape:
    return Shape(*matrix.shape, triton.cdiv(matrix.shape[1], tile.block))


@triton.jit
def tile_of(shape, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Return this program's rows (ROWS, 1), first column, columns (1, BLOCK), and the mask of the tile."""
    row = (tl.program_id(0) // shape.column_tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    start = (tl.program_id(0) % shape.column_tiles).to(tl.int64) * BLOCK
    column = start + tl.arange(0, BLOCK)[None, :]
    return row, start, column, (row < shape.rows) & (column < shape.columns)


@triton.jit
def both_of(shape, row, start, BLOCK: tl.constexpr):
    """Return the columns of interleaved gate and value, and the mask of the tile."""
    column = 2 * start + tl.arange(0, 2 * BLOCK)[None, :]
    return column, (row < shape.rows) & (column < 2 * shape.columns)


@triton.jit
def load_gate_and_value(
    gate, value, shape, row, start, column, mask, TURNS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    if TURNS:
        both, there = both_of(shape, row, start, BLOCK)
        first, second = tl.split(tl.reshape(load_rows(gate.data, gate.stride, row, both, there), (ROWS, BLOCK, 2)))
    else:
        first = load_rows(gate.data, gate.stride, row, column, mask)
        second = load_rows(value.data, value.stride, row, column, mask)
    return first, second


@triton.jit
def limited(u, v, LIMIT: tl.constexpr, OFFSET: tl.constexpr):
    """Gate and value as they are computed with. NaN stays NaN."""
    if LIMIT is not None:
        u = tl.where(u > LIMIT, LIMIT, u)
        v = tl.where(v > LIMIT, LIMIT, tl.where(v < -LIMIT, -LIMIT, v))
    if OFFSET != 0:
        v += OFFSET
    return u, v


@triton.jit
def glu_forward_kernel(
    gate, value, y, shape,
    ACTIVATION: tl.constexpr, LIMIT: tl.constexpr, OFFSET: tl.constexpr,
    TURNS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, start, column, mask = tile_of(shape, ROWS, BLOCK)
    given_u, given_v = load_gate_and_value(gate, value, shape, row, start, column, mask, TURNS, ROWS, BLOCK)
    u, v = limited(given_u, given_v, LIMIT, OFFSET)
    store_rows(y.data, y.stride, row, column, mask, activate(u, ACTIVATION) * v)


@triton.jit
def glu_backward_kernel(
    dy, gate, value, dgate, dvalue, y, shape,
    ACTIVATION: tl.constexpr, LIMIT: tl.constexpr, OFFSET: tl.constexpr,
    TURNS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, start, column, mask = tile_of(shape, ROWS, BLOCK)
    given_u, given_v = load_gate_and_value(gate, value, shape, row, start, column, mask, TURNS, ROWS, BLOCK)
    u, v = limited(given_u, given_v, LIMIT, OFFSET)
    g = load_rows(dy.data, dy.stride, row, column, mask)
    du = g * v * differentiate(u, ACTIVATION)
    factor = activate(u, ACTIVATION)
    dv = g * factor
    if LIMIT is not None:
        # At the limit itself the gradient goes through (see `ops.glu.Options.of_gradients`).
        du = tl.where(given_u > LIMIT, 0.0, du)
        dv = tl.where(tl.abs(given_v) > LIMIT, 0.0, dv)
    if y.data is not None:
        store_rows(y.data, y.stride, row, column, mask, factor * v)
    if TURNS:
        both, there = both_of(shape, row, start, BLOCK)
        store_rows(dgate.data, dgate.stride, row, both, there, tl.reshape(tl.join(du, dv), (ROWS, 2 * BLOCK)))
    else:
        if dgate.data is not None:
            store_rows(dgate.data, dgate.stride, row, column, mask, du)
        if dvalue.data is not None:
            store_rows(dvalue.data, dvalue.stride, row, column, mask, dv)


def _take_turns(gate: Tensor) -> bool:
    """Whether gate and value alternate in memory: they are every other element of their rows."""
    return gate.shape[1] > 1 and gate.stride(1) == 2


def glu_forward(
    gate: Tensor, value: Tensor, output: Tensor, activation: str, limit: float = math.inf, offset: float = 0.0
) -> None:
    """`backends.reference.glu` into output."""
    _launch(glu_forward_kernel, gate, map(matrix_of, (gate, value, output)), activation, limit, offset)


def glu_backward(
    grad_output: Tensor,
    gate: Tensor,
    value: Tensor,
    grad_gate: Tensor | None,
    grad_value: Tensor | None,
    output: Tensor | None,
    activation: str,
    limit: float = math.inf,
    offset: float = 0.0,
) -> None:
    """The gradients of `glu`, and its output where there is memory for it."""
    operands = map(matrix_of, (grad_output, gate, value, grad_gate, grad_value, output))
    _launch(glu_backward_kernel, gate, operands, activation, limit, offset)


def _launch(
    kernel: triton.JITFunction,
    gate: Tensor,
    operands: Iterable[Matrix],
    activation: str,
    limit: float,
    offset: float,
) -> None:
    tile = element_tile(gate.shape[1])
    shape = shape_of(gate, tile)
    given = tuple(operands)
    activation = as_stored(activation, *(matrix.data for matrix in given))
    programs = triton.cdiv(shape.rows, tile.rows) * shape.column_tiles
    choices = (activation, limit if limit < math.inf else None, offset, _take_turns(gate))
    launch(kernel, programs, tile, gate.device, *given, shape, *choices)
