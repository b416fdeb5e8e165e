"""The channel-norm kernels, and how they are launched; `backends.reference` says what each computes.

A matrix is (rows, columns). Where there are planes a row is a channel of a sample, with coefficients of its own;
else channels are last, and coefficients go by column. Either way a program works on tiles of ROWS rows by BLOCK
columns. OTHER is the residual, or, BY_OUTPUT, the output.
"""

import triton
import triton.language as tl
from torch import Tensor

from .activations import activate, differentiate
from .launch import Tile, channel_tile, device_of, element_tile
from .row_norm_tiles import load_rows, store_rows


@triton.jit
def coefficient(C, index: tl.constexpr, stride, where, there):
    """One coefficient for each of `where`, out of rows of `stride`."""
    return tl.load(C + index * stride + where, mask=there, other=0.0)


@triton.jit
def element_tile_of(
    rows, columns, sample_rows, channels, PLANES: tl.constexpr, BY_SAMPLE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """This program's rows, columns, mask, and which coefficients go with them, as `where` and `there`.

    A tile never crosses a sample where channels are last, so that its rows share their coefficients.
    """
    column_tiles = tl.cdiv(columns, BLOCK)
    row_tiles = tl.cdiv(sample_rows, ROWS)
    sample = (tl.program_id(0) // (column_tiles * row_tiles)).to(tl.int64)
    tile = tl.program_id(0) % (column_tiles * row_tiles)
    row = sample * sample_rows + (tile // column_tiles) * ROWS + tl.arange(0, ROWS)[:, None]
    live = row < (sample + 1) * sample_rows
    column = (tile % column_tiles).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[None, :]
    if PLANES:
        where = row if BY_SAMPLE else row % channels
        there = live
    else:
        where = sample * channels + column if BY_SAMPLE else column
        there = column < columns
    return row, column, live & (column < columns), where, there


@triton.jit
def slope(
    DY, X, OTHER, C, stride, columns, row, column, mask, where, there,
    ACTIVATION: tl.constexpr, BY_OUTPUT: tl.constexpr,
):  # fmt: skip
    """g = grad_output * activation'(z), and x - mean. Where the mask is off, g is zero."""
    d = load_rows(X, columns, row, column, mask) - coefficient(C, 0, stride, where, there)
    if BY_OUTPUT:
        z = load_rows(OTHER, columns, row, column, mask)
    else:
        z = d * coefficient(C, 1, stride, where, there) + coefficient(C, 2, stride, where, there)
        if OTHER is not None:
            z += load_rows(OTHER, columns, row, column, mask)
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
def piece_of(size, pieces, piece_rows, column_tiles):
    """This program's piece, and its first row and the one after its last."""
    piece = (tl.program_id(0) // column_tiles).to(tl.int64)
    begin = piece // pieces * size + piece % pieces * piece_rows
    end = tl.minimum(begin + piece_rows, (piece // pieces + 1) * size)
    return piece, begin, end


@triton.jit
def row_moments_kernel(
    X, MEAN, SQUARES, size, columns, pieces, piece_rows, column_tiles, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """About the mean of a column's first ROWS elements in the piece, in one pass."""
    piece, begin, end = piece_of(size, pieces, piece_rows, column_tiles)
    column = (tl.program_id(0) % column_tiles).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[None, :]
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
    X, OTHER, C, Y, stride, rows, columns, sample_rows, channels,
    ACTIVATION: tl.constexpr, PLANES: tl.constexpr, BY_SAMPLE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, column, mask, where, there = element_tile_of(
        rows, columns, sample_rows, channels, PLANES, BY_SAMPLE, ROWS, BLOCK
    )
    d = load_rows(X, columns, row, column, mask) - coefficient(C, 0, stride, where, there)
    z = d * coefficient(C, 1, stride, where, there) + coefficient(C, 2, stride, where, there)
    if OTHER is not None:
        z += load_rows(OTHER, columns, row, column, mask)
    store_rows(Y, columns, row, column, mask, activate(z, ACTIVATION))


@triton.jit
def plane_sums_kernel(
    DY, X, OTHER, C, FIRST, SECOND, stride, rows, columns, channels,
    ACTIVATION: tl.constexpr, BY_SAMPLE: tl.constexpr, BY_OUTPUT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    live = row < rows
    where = row if BY_SAMPLE else row % channels
    first = tl.zeros((ROWS, BLOCK), tl.float32)
    second = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)[None, :]
        mask = live & (column < columns)
        g, d = slope(
            DY, X, OTHER, C, stride, columns, row, column, mask, where, live, ACTIVATION, BY_OUTPUT
        )  # fmt: skip
        first += g
        second += g * d
    tl.store(FIRST + row, tl.sum(first, 1)[:, None], mask=live)
    tl.store(SECOND + row, tl.sum(second, 1)[:, None], mask=live)


@triton.jit
def row_sums_kernel(
    DY, X, OTHER, C, FIRST, SECOND, stride, size, columns, pieces, piece_rows, column_tiles,
    ACTIVATION: tl.constexpr, BY_SAMPLE: tl.constexpr, BY_OUTPUT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    piece, begin, end = piece_of(size, pieces, piece_rows, column_tiles)
    column = (tl.program_id(0) % column_tiles).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[None, :]
    there = column < columns
    where = piece // pieces * columns + column if BY_SAMPLE else column
    first = tl.zeros((ROWS, BLOCK), tl.float32)
    second = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(begin, end, ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        mask = (row < end) & there
        g, d = slope(
            DY, X, OTHER, C, stride, columns, row, column, mask, where, there, ACTIVATION, BY_OUTPUT
        )  # fmt: skip
        first += g
        second += g * d
    tl.store(FIRST + piece * columns + column, tl.sum(first, 0)[None, :], mask=there)
    tl.store(SECOND + piece * columns + column, tl.sum(second, 0)[None, :], mask=there)


@triton.jit
def channel_backward_kernel(
    DY, X, OTHER, C, DX, DOTHER, stride, rows, columns, sample_rows, channels,
    ACTIVATION: tl.constexpr, BY_OUTPUT: tl.constexpr, PLANES: tl.constexpr, BY_SAMPLE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, column, mask, where, there = element_tile_of(
        rows, columns, sample_rows, channels, PLANES, BY_SAMPLE, ROWS, BLOCK
    )
    g, d = slope(
        DY, X, OTHER, C, stride, columns, row, column, mask, where, there, ACTIVATION, BY_OUTPUT
    )  # fmt: skip
    if DOTHER is not None:
        store_rows(DOTHER, columns, row, column, mask, g)
    if DX is not None:
        tilted = d * coefficient(C, 4, stride, where, there) + coefficient(C, 5, stride, where, there)
        store_rows(DX, columns, row, column, mask, g * coefficient(C, 3, stride, where, there) + tilted)


def _samples(matrix: Tensor, planes: bool, samples: int) -> tuple[int, int, Tile, int]:
    """Samples and rows of each as an element tile sees them, the tile, and how many programs that makes."""
    rows, columns = matrix.shape
    if planes:
        samples = 1
    tile = element_tile(columns)
    programs = samples * triton.cdiv(rows // samples, tile.rows) * triton.cdiv(columns, tile.block)
    return samples, rows // samples, tile, programs


def _stride(coefficients: Tensor) -> int:
    return coefficients.shape[1] * coefficients.shape[2]


def channel_moments(x: Tensor, mean: Tensor, squares: Tensor, planes: bool, piece_rows: int) -> None:
    """Mean and sum of squared deviations of each piece of each channel of each sample."""
    rows, columns = x.shape
    tile = channel_tile(columns, planes)
    with device_of(x):
        if planes:
            plane_moments_kernel[(triton.cdiv(rows, tile.rows),)](
                x, mean, squares, rows, columns, tile.rows, tile.block, num_warps=tile.warps
            )
            return
        samples, pieces, _ = mean.shape
        column_tiles = triton.cdiv(columns, tile.block)
        row_moments_kernel[(samples * pieces * column_tiles,)](
            x, mean, squares, rows // samples, columns, pieces, piece_rows, column_tiles, tile.rows, tile.block,
            num_warps=tile.warps,
        )  # fmt: skip


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
    _, sample_rows, tile, programs = _samples(x, planes, samples)
    with device_of(x):
        channel_forward_kernel[(programs,)](
            x, residual, coefficients, output, _stride(coefficients), *x.shape, sample_rows, coefficients.shape[2],
            activation, planes, coefficients.shape[1] > 1, tile.rows, tile.block, num_warps=tile.warps,
        )  # fmt: skip


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
    operands = (grad_output, x, other, coefficients, first, second, _stride(coefficients))
    options = (activation, coefficients.shape[1] > 1, by_output, tile.rows, tile.block)
    with device_of(x):
        if planes:
            plane_sums_kernel[(triton.cdiv(rows, tile.rows),)](
                *operands, rows, columns, coefficients.shape[2], *options, num_warps=tile.warps
            )
            return
        samples, pieces, _ = first.shape
        column_tiles = triton.cdiv(columns, tile.block)
        row_sums_kernel[(samples * pieces * column_tiles,)](
            *operands, rows // samples, columns, pieces, piece_rows, column_tiles, *options, num_warps=tile.warps
        )


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
    """grad_input = g * factor + (x - mean) * tilt + shift, and grad_residual = g."""
    _, sample_rows, tile, programs = _samples(x, planes, samples)
    with device_of(x):
        channel_backward_kernel[(programs,)](
            grad_output, x, other, coefficients, grad_input, grad_residual, _stride(coefficients), *x.shape,
            sample_rows, coefficients.shape[2], activation, by_output, planes, coefficients.shape[1] > 1,
            tile.rows, tile.block, num_warps=tile.warps,
        )  # fmt: skip
