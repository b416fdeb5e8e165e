"""The channel-norm kernels and their launchers; `backends.reference` specifies the results of each.

A matrix is (rows, columns). With planes a row is a channel of a sample and has its own coefficients; otherwise channels
are last, and coefficients belong to columns. Either way a program works on tiles of ROWS rows by BLOCK columns. `other`
is the residual, or with BY_OUTPUT the output.
"""

import triton
import triton.language as tl
from torch import Tensor

from .activations import activate
from .channel_norm_tiles import Operands, Pieces, Samples, coefficient, element_tile_of, piece_of, slope
from .launch import Tile, channel_tile, element_tile, launch
from .row_norm_tiles import load_rows, store_rows


@triton.jit
def plane_moments_kernel(X, MEAN, SQUARES, rows, columns, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Compute the moments of rows in one pass, shifted by the mean of a row's first BLOCK elements."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    lane = tl.arange(0, BLOCK)[None, :]
    row_mask = row < rows
    first = load_rows(X, columns, row, lane, row_mask & (lane < columns))
    center = tl.sum(first, 1)[:, None] / tl.minimum(columns, BLOCK)
    sums = tl.zeros((ROWS, BLOCK), tl.float32)
    squares = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, columns, BLOCK):
        mask = row_mask & (start + lane < columns)
        d = tl.where(mask, load_rows(X, columns, row, start + lane, mask) - center, 0.0)
        sums += d
        squares += d * d
    total = tl.sum(sums, 1)[:, None]
    deviation = tl.sum(squares, 1)[:, None] - total * (total / columns)
    tl.store(MEAN + row, center + total / columns, mask=row_mask)
    tl.store(SQUARES + row, tl.where(deviation < 0.0, 0.0, deviation), mask=row_mask)


@triton.jit
def row_moments_kernel(X, MEAN, SQUARES, columns, pieces, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Compute the moments of columns in one pass, shifted by the mean of the first ROWS elements in the piece."""
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
    at = piece * columns + column
    tl.store(MEAN + at, center + total / count, mask=column < columns)
    tl.store(SQUARES + at, tl.where(deviation < 0.0, 0.0, deviation), mask=column < columns)


@triton.jit
def channel_forward_kernel(
    operands, Y, samples, ACTIVATION: tl.constexpr, PLANES: tl.constexpr, BY_SAMPLE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute Y = activation((x - mean) * scale + bias + other)."""
    columns = operands.columns
    row, column, mask, at, valid = element_tile_of(columns, samples, PLANES, BY_SAMPLE, ROWS, BLOCK)
    d = load_rows(operands.input, columns, row, column, mask) - coefficient(operands, 0, at, valid)
    z = d * coefficient(operands, 1, at, valid) + coefficient(operands, 2, at, valid)
    if operands.other is not None:
        z += load_rows(operands.other, columns, row, column, mask)
    store_rows(Y, columns, row, column, mask, activate(z, ACTIVATION))


@triton.jit
def plane_sums_kernel(
    operands, DY, FIRST, SECOND, rows, channels, ACTIVATION: tl.constexpr, BY_OUTPUT: tl.constexpr,
    BY_SAMPLE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum g and g * (x - mean) over each plane."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    row_mask = row < rows
    at = row if BY_SAMPLE else row % channels
    first = tl.zeros((ROWS, BLOCK), tl.float32)
    second = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, operands.columns, BLOCK):
        column = start + tl.arange(0, BLOCK)[None, :]
        mask = row_mask & (column < operands.columns)
        g, d = slope(operands, DY, row, column, mask, at, row_mask, ACTIVATION, BY_OUTPUT)
        first += g
        second += g * d
    tl.store(FIRST + row, tl.sum(first, 1)[:, None], mask=row_mask)
    tl.store(SECOND + row, tl.sum(second, 1)[:, None], mask=row_mask)


@triton.jit
def row_sums_kernel(
    operands, DY, FIRST, SECOND, pieces, ACTIVATION: tl.constexpr, BY_OUTPUT: tl.constexpr, BY_SAMPLE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum g and g * (x - mean) over each column of each piece of rows."""
    columns = operands.columns
    piece, begin, end = piece_of(pieces)
    column = (tl.program_id(0) % pieces.column_tiles).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[None, :]
    valid = column < columns
    at = piece // pieces.count * columns + column if BY_SAMPLE else column
    first = tl.zeros((ROWS, BLOCK), tl.float32)
    second = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(begin, end, ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        mask = (row < end) & valid
        g, d = slope(operands, DY, row, column, mask, at, valid, ACTIVATION, BY_OUTPUT)
        first += g
        second += g * d
    tl.store(FIRST + piece * columns + column, tl.sum(first, 0)[None, :], mask=valid)
    tl.store(SECOND + piece * columns + column, tl.sum(second, 0)[None, :], mask=valid)


@triton.jit
def channel_backward_kernel(
    operands, DY, DX, DOTHER, samples, ACTIVATION: tl.constexpr, BY_OUTPUT: tl.constexpr, PLANES: tl.constexpr,
    BY_SAMPLE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute DX = g * factor + (x - mean) * c1 + c2, and DOTHER = g."""
    columns = operands.columns
    row, column, mask, at, valid = element_tile_of(columns, samples, PLANES, BY_SAMPLE, ROWS, BLOCK)
    g, d = slope(operands, DY, row, column, mask, at, valid, ACTIVATION, BY_OUTPUT)
    if DOTHER is not None:
        store_rows(DOTHER, columns, row, column, mask, g)
    if DX is not None:
        shifted = d * coefficient(operands, 4, at, valid) + coefficient(operands, 5, at, valid)
        store_rows(DX, columns, row, column, mask, g * coefficient(operands, 3, at, valid) + shifted)


def _operands(x: Tensor, other: Tensor | None, coefficients: Tensor) -> Operands:
    return Operands(x, other, coefficients, coefficients[0].numel(), x.shape[1])


def _by_sample(coefficients: Tensor) -> bool:
    return coefficients.shape[1] > 1


def _elements(matrix: Tensor, planes: bool, samples: int, channels: int) -> tuple[Samples, Tile, int]:
    """Return the rows of a sample for element tiles, the tile, and the number of programs."""
    rows, columns = matrix.shape
    if planes:
        samples = 1
    tile = element_tile(columns)
    programs = samples * triton.cdiv(rows // samples, tile.rows) * triton.cdiv(columns, tile.block)
    return Samples(rows // samples, channels), tile, programs


def _pieces(matrix: Tensor, samples: int, count: int, piece_rows: int, tile: Tile) -> tuple[Pieces, int]:
    """Return the pieces, and the number of programs."""
    rows, columns = matrix.shape
    column_tiles = triton.cdiv(columns, tile.block)
    return Pieces(rows // samples, count, piece_rows, column_tiles), samples * count * column_tiles


def channel_moments(x: Tensor, mean: Tensor, squares: Tensor, planes: bool, piece_rows: int) -> None:
    """Compute mean and sum of squared deviations of each piece of each channel of each sample."""
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
    """Compute activation((x - mean) * scale + bias + residual)."""
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
    """Sum g and g * (x - mean)."""
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
    """Compute grad_input = g * factor + (x - mean) * c1 + c2, and grad_residual = g."""
    samples, tile, programs = _elements(x, planes, samples, coefficients.shape[2])
    arguments = (_operands(x, other, coefficients), grad_output, grad_input, grad_residual, samples)
    choices = (activation, by_output, planes, _by_sample(coefficients))
    launch(channel_backward_kernel, programs, tile, x.device, *arguments, *choices)
