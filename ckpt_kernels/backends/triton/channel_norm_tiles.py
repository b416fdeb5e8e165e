"""The inlined functions that the channel-norm kernels are composed of; `channel_norm` describes the layouts."""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .activations import differentiate
from .row_norm_tiles import load_rows


class Operands(NamedTuple):
    """The input, `other`, and the coefficients, each (samples or 1) * channels = `stride` numbers."""

    input: Tensor
    other: Tensor | None
    coefficients: Tensor
    stride: int
    columns: int


class Samples(NamedTuple):
    """The number of rows of a sample, and the number of channels."""

    rows: int
    channels: int


class Pieces(NamedTuple):
    """The rows that are summed together: `count` pieces of the `size` rows of a sample.

    A piece has `rows` rows, the last one maybe fewer. `column_tiles` is the number of tiles that cover the columns.
    """

    size: int
    count: int
    rows: int
    column_tiles: int


@triton.jit
def coefficient(operands, index: tl.constexpr, at, valid):
    """Load a coefficient at each position `at`."""
    return tl.load(operands.coefficients + index * operands.stride + at, mask=valid, other=0.0)


@triton.jit
def element_tile_of(
    columns, samples, PLANES: tl.constexpr, BY_SAMPLE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Return this program's rows, columns and mask, and the positions of the coefficients with their mask.

    With channels last a tile never crosses a sample, so that the rows of a tile share coefficients.
    """
    column_tiles = tl.cdiv(columns, BLOCK)
    row_tiles = tl.cdiv(samples.rows, ROWS)
    sample = (tl.program_id(0) // (column_tiles * row_tiles)).to(tl.int64)
    tile = tl.program_id(0) % (column_tiles * row_tiles)
    row = sample * samples.rows + (tile // column_tiles) * ROWS + tl.arange(0, ROWS)[:, None]
    row_mask = row < (sample + 1) * samples.rows
    column = (tile % column_tiles).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[None, :]
    if PLANES:
        at = row if BY_SAMPLE else row % samples.channels
        valid = row_mask
    else:
        at = sample * samples.channels + column if BY_SAMPLE else column
        valid = column < columns
    return row, column, row_mask & (column < columns), at, valid


@triton.jit
def slope(operands, DY, row, column, mask, at, valid, ACTIVATION: tl.constexpr, BY_OUTPUT: tl.constexpr):
    """Return g = grad_output * activation'(z), and x - mean; g is zero where the mask is off."""
    columns = operands.columns
    d = load_rows(operands.input, columns, row, column, mask) - coefficient(operands, 0, at, valid)
    if BY_OUTPUT:
        z = load_rows(operands.other, columns, row, column, mask)
    else:
        z = d * coefficient(operands, 1, at, valid) + coefficient(operands, 2, at, valid)
        if operands.other is not None:
            z += load_rows(operands.other, columns, row, column, mask)
    return load_rows(DY, columns, row, column, mask) * differentiate(z, ACTIVATION), d


@triton.jit
def piece_of(pieces):
    """Return this program's piece, with the piece's first row and end row."""
    piece = (tl.program_id(0) // pieces.column_tiles).to(tl.int64)
    begin = piece // pieces.count * pieces.size + piece % pieces.count * pieces.rows
    end = tl.minimum(begin + pieces.rows, (piece // pieces.count + 1) * pieces.size)
    return piece, begin, end
