"""The channel-norm kernels, and how they are launched; `backends.reference` says what each computes.

A matrix is (rows, columns). Where there are planes a row is a channel of a sample, with coefficients of its own;
else channels are last, and coefficients go by column. Either way a program works on tiles of ROWS rows by BLOCK
columns. `other` is the residual, or, BY_OUTPUT, the output.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .activations import activate, differentiate
from .launch import Tile, channel_tile, element_tile, launch
from .row_norm_tiles import load_rows, store_rows


class Operands(NamedTuple):
    """The input, `other`, and the coefficients: rows of `stride` numbers, as many as there are samples or one."""

    input: Tensor
    other: Tensor | None
    coefficients: Tensor
    stride: int
    columns: int


class Samples(NamedTuple):
    """How the rows of a matrix are those of samples, and how many channels there are."""

    rows: int
    channels: int


class Pieces(NamedTuple):
    """Which rows are summed together: of `size` rows of a sample `count` pieces of so many rows, the last perhaps of
    fewer; and how many tiles the columns are."""

    size: int
    count: int
    rows: int
    column_tiles: int


@triton.jit
def coefficient(operands, index: tl.constexpr, where, there):
    """One coefficient for each of `where`."""
    return tl.load(operands.coefficients + index * operands.stride + where, mask=there, other=0.0)


@triton.jit
def element_tile_of(
    columns, samples, PLANES: tl.constexpr, BY_SAMPLE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """This program's rows, columns, mask, and which coefficients go with them, as `where` and `there`.

    A tile never crosses a sample where channels are last, so that its rows share their coefficients.
    """
    column_tiles = tl.cdiv(columns, BLOCK)
    row_tiles = tl.cdiv(samples.rows, ROWS)
    sample = (tl.program_id(0) // (column_tiles * row_tiles)).to(tl.int64)
    tile = tl.program_id(0) % (column_tiles * row_tiles)
    row = sample * samples.rows + (tile // column_tiles) * ROWS + tl.arange(0, ROWS)[:, None]
    live = row < (sample + 1) * samples.rows
    column = (tile % column_tiles).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[None, :]
    if PLANES:
        where = row if BY_SAMPLE else row % samples.channels
        there = live
    else:
        where = sample * samples.channels + column if BY_SAMPLE else column
        there = column < columns
    return row, column, live & (column < columns), where, there


@triton.jit
def slope(operands, DY, row, column, mask, where, there, ACTIVATION: tl.constexpr, BY_OUTPUT: tl.constexpr):
    """g = grad_output * activation'(z), and x - mean. Where the mask is off, g is zero."""
    columns = operands.columns
    d = load_rows(operands.input, columns, row, column, mask) - coefficient(operands, 0, where, there)
    if BY_OUTPUT:
        z = load_rows(operands.other, columns, row, column, mask)
    else:
        z = d * coefficient(operands, 1, where, there) + coefficient(operands, 2, where, there)
        if operands.other is not None:
            z += load_rows(operands.other, columns, row, column, mask)
    return load_rows(DY, columns, row, column, mask) * differentiate(z, ACTIVATION), d


@triton.jit
def plane_moments_kernel(X, MEAN, SQUARES, rows, columns, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """About the mean of a row's first BLOCK elements, in one pass."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    lane = tl.arange(0, BLOCK)[None, :]
    live = row < rows
    first = load_rows(X, columns, row, lane, live & (lane < columns))
    center = tl.sum(first, 1)[:, None] / tl.minimum(columns, BLOCK)
    sums = tl.zeros((ROWS, BLOCK), tl.float32)
    squares = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, columns, BLOCK):
        mask = live & (start + lane < columns)
        d = tl.where(mask, load_rows(X, columns, row, start + lane, mask) - center, 0.0)
        sums += d
        squares += d * d
    total = tl.sum(sums, 1)[:, None]
    deviation = tl.sum(squares, 1)[:, None] - total * (total / columns)
    tl.store(MEAN + row, center + total / columns, mask=live)
    tl.store(SQUARES + row, tl.where(deviation < 0.0, 0.0, deviation), mask=live)


@triton.jit
def piece_of(pieces):
    """This program's piece, and its first row and the one after its last."""
    piece = (tl.program_id(0) // pieces.column_tiles).to(tl.int64)
    begin = piece // pieces.count * pieces.size + piece % pieces.count * pieces.rows
    end = tl.minimum(begin + pieces.rows, (piece // pieces.count + 1) * pieces.size)
    return piece, begin, end


@triton.jit
def row_moments_kernel(X, MEAN, SQUARES, columns, pieces, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """About the mean of a column's first ROWS elements in the piece, in one pass."""
    piece, begin, end = piece_of(pieces)
    column = (tl.program_id(0) % pieces.column_tiles).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[None, :]
    lane = tl.arange(0, ROWS)[:, None]
    first = load_rows(X, columns, begin + lane, column, (begin + lane < end) & (column < columns))
    center = tl.sum(first, 0)[None, :] / tl.minimum(end - begin, ROWS)
    sums = tl.zeros((ROWS, BLOCK), tl.float32)
    squares = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(begin, end, ROWS):
        mask = (start + lane < end) & (column < columns)
        d = tl.where(mask, load_rows(X, columns, start + lane, column, mask) - center, 0.0)
        sums += d
        squares += d * d
    count = (end - begin).to(tl.float32)
    total = tl.sum(sums, 0)[None, :]
    deviation = tl.sum(squares, 0)[None, :] - total * (total / count)
    where = piece * columns + column
    tl.store(MEAN + where, center + total / count, mask=column < columns)
    tl.store(SQUARES + where, tl.where(deviation < 0.0, 0.0, deviation), mask=column < columns)


@triton.jit
def channel_forward_kernel(
    operands, Y, samples, ACTIVATION: tl.constexpr, PLANES: tl.constexpr, BY_SAMPLE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    columns = operands.columns
    row, column, mask, where, there = element_tile_of(columns, samples, PLANES, BY_SAMPLE, ROWS, BLOCK)
    d = load_rows(operands.input, columns, row, column, mask) - coefficient(operands, 0, where, there)
    z = d * coefficient(operands, 1, where, there) + coefficient(operands, 2, where, there)
    if operands.other is not None:
        z += load_rows(operands.other, columns, row, column, mask)
    store_rows(Y, columns, row, column, mask, activate(z, ACTIVATION))


@triton.jit
def plane_sums_kernel(
    operands, DY, FIRST, SECOND, rows, channels, ACTIVATION: tl.constexpr, BY_OUTPUT: tl.constexpr,
    BY_SAMPLE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    live = row < rows
    where = row if BY_SAMPLE else row % channels
    first = tl.zeros((ROWS, BLOCK), tl.float32)
    second = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, operands.columns, BLOCK):
        column = start + tl.arange(0, BLOCK)[None, :]
        mask = live & (column < operands.columns)
        g, d = slope(operands, DY, row, column, mask, where, live, ACTIVATION, BY_OUTPUT)
        first += g
        second += g * d
    tl.store(FIRST + row, tl.sum(first, 1)[:, None], mask=live)
    tl.store(SECOND + row, tl.sum(second, 1)[:, None], mask=live)


@triton.jit
def row_sums_kernel(
    operands, DY, FIRST, SECOND, pieces, ACTIVATION: tl.constexpr, BY_OUTPUT: tl.constexpr, BY_SAMPLE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    columns = operands.columns
    piece, begin, end = piece_of(pieces)
    column = (tl.program_id(0) % pieces.column_tiles).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[None, :]
    there = column < columns
    where = piece // pieces.count * columns + column if BY_SAMPLE else column
    first = tl.zeros((ROWS, BLOCK), tl.float32)
    second = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(begin, end, ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        mask = (row < end) & there
        g, d = slope(operands, DY, row, column, mask, where, there, ACTIVATION, BY_OUTPUT)
        first += g
        second += g * d
    tl.store(FIRST + piece * columns + column, tl.sum(first, 0)[None, :], mask=there)
    tl.store(SECOND + piece * columns + column, tl.sum(second, 0)[None, :], mask=there)


@triton.jit
def channel_backward_kernel(
    operands, DY, DX, DOTHER, samples, ACTIVATION: tl.constexpr, BY_OUTPUT: tl.constexpr, PLANES: tl.constexpr,
    BY_SAMPLE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    columns = operands.columns
    row, column, mask, where, there = element_tile_of(columns, samples, PLANES, BY_SAMPLE, ROWS, BLOCK)
    g, d = slope(operands, DY, row, column, mask, where, there, ACTIVATION, BY_OUTPUT)
    if DOTHER is not None:
        store_rows(DOTHER, columns, row, column, mask, g)
    if DX is not None:
        shifted = d * coefficient(operands, 4, where, there) + coefficient(operands, 5, where, there)
        store_rows(DX, columns, row, column, mask, g * coefficient(operands, 3, where, there) + shifted)


def _operands(x: Tensor, other: Tensor | None, coefficients: Tensor) -> Operands:
    return Operands(x, other, coefficients, coefficients[0].numel(), x.shape[1])


def _by_sample(coefficients: Tensor) -> bool:
    return coefficients.shape[1] > 1


def _elements(matrix: Tensor, planes: bool, samples: int, channels: int) -> tuple[Samples, Tile, int]:
    """Samples as an element tile sees them, the tile, and how many programs that makes."""
    rows, columns = matrix.shape
    if planes:
        samples = 1
    tile = element_tile(columns)
    programs = samples * triton.cdiv(rows // samples, tile.rows) * triton.cdiv(columns, tile.block)
    return Samples(rows // samples, channels), tile, programs


def _pieces(matrix: Tensor, samples: int, count: int, piece_rows: int, tile: Tile) -> tuple[Pieces, int]:
    """And how many programs that makes."""
    rows, columns = matrix.shape
    column_tiles = triton.cdiv(columns, tile.block)
    return Pieces(rows // samples, count, piece_rows, column_tiles), samples * count * column_tiles


def channel_moments(x: Tensor, mean: Tensor, squares: Tensor, planes: bool, piece_rows: int) -> None:
    """Mean and sum of squared deviations of each piece of each channel of each sample."""
    rows, columns = x.shape
    tile = channel_tile(columns, planes)
    if planes:
        programs = triton.cdiv(rows, tile.rows)
        launch(plane_moments_kernel, programs, tile, x.device, x, mean, squares, rows, columns)
        return
    pieces, programs = _pieces(x, *mean.shape[:2], piece_rows, tile)
    launch(row_moments_kernel, programs, tile, x.device, x, mean, squares, columns, pieces)


def channel_forward(
    x: Tensor,
    residual: Tensor | None,
    coefficients: Tensor,
    output: Tensor,
    planes: bool,
    samples: int,
    activation: str,
) -> None:
    """activation((x - mean) * scale + bias + residual)."""
    samples, tile, programs = _elements(x, planes, samples, coefficients.shape[2])
    arguments = (_operands(x, residual, coefficients), output, samples, activation, planes, _by_sample(coefficients))
    launch(channel_forward_kernel, programs, tile, x.device, *arguments)


def channel_sums(
    grad_output: Tensor,
    x: Tensor,
    other: Tensor | None,
    coefficients: Tensor,
    first: Tensor,
    second: Tensor,
    planes: bool,
    piece_rows: int,
    activation: str,
    by_output: bool,
) -> None:
    """The sums of g and of g * (x - mean)."""
    rows, columns = x.shape
    tile = channel_tile(columns, planes)
    arguments = (_operands(x, other, coefficients), grad_output, first, second)
    choices = (activation, by_output, _by_sample(coefficients))
    if planes:
        sizes = (rows, coefficients.shape[2])
        launch(plane_sums_kernel, triton.cdiv(rows, tile.rows), tile, x.device, *arguments, *sizes, *choices)
        return
    pieces, programs = _pieces(x, *first.shape[:2], piece_rows, tile)
    launch(row_sums_kernel, programs, tile, x.device, *arguments, pieces, *choices)


def channel_backward(
    grad_output: Tensor,
    x: Tensor,
    other: Tensor | None,
    coefficients: Tensor,
    grad_input: Tensor | None,
    grad_residual: Tensor | None,
    planes: bool,
    samples: int,
    activation: str,
    by_output: bool,
) -> None:
    """grad_input = g * factor + (x - mean) * c1 + c2, and grad_residual = g."""
    samples, tile, programs = _elements(x, planes, samples, coefficients.shape[2])
    arguments = (_operands(x, other, coefficients), grad_output, grad_input, grad_residual, samples)
    choices = (activation, by_output, planes, _by_sample(coefficients))
    launch(channel_backward_kernel, programs, tile, x.device, *arguments, *choices)
