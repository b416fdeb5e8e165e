"""The inlined functions that the rotary kernels are composed of.

A tile is ROWS whole heads. A `head` is three float32 tiles: the first and the second elements of the pairs, each
(ROWS, BLOCK / 2), and the columns that pass without rotation, or one column of zeros if all are rotated. `at` are
pointers, (ROWS, 1), to the first elements of heads; `row_mask` is the mask of the heads.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..blocks import Rotary
from .launch import Tile
from .row_norm_tiles import load_at


class Levels(NamedTuple):
    """The number of heads, and the sizes of the two inner levels of three."""

    rows: int
    middle: int
    inner: int


class Strided(NamedTuple):
    """A tensor with a row for each head, and the strides on the three levels; a broadcast level has stride 0."""

    data: torch.Tensor | None
    outer: int
    middle: int
    inner: int


class Norm(NamedTuple):
    """The parameters of the norm."""

    weight: torch.Tensor | None
    bias: torch.Tensor | None
    weight_offset: float
    eps: float


class Choices(NamedTuple):
    """The compile-time arguments. Heads have few sizes, and the compiler derives access widths from constant sizes.

    `passing` is the number of passing columns, rounded up to a power of two, or 0. `paired` tables have one entry for
    both elements of a pair. `even` says that tiles cover the heads exactly; `many`, that the heads need 64-bit indices.
    """

    columns: tl.constexpr
    rotary_dim: tl.constexpr
    start: tl.constexpr
    passing: tl.constexpr
    interleaved: tl.constexpr
    interleaved_output: tl.constexpr
    paired: tl.constexpr
    norm: tl.constexpr
    cast_before_weight: tl.constexpr
    even: tl.constexpr
    many: tl.constexpr


class Operands(NamedTuple):
    """The kernel arguments for a `Rotary`, and the order of levels for `strided`."""

    levels: Levels
    cos: Strided
    sin: Strided
    norm: Norm
    chosen: Choices
    order: tuple[int, ...]


def strided(rows: torch.Tensor | None, order: tuple[int, ...]) -> Strided:
    if rows is None:
        return Strided(None, 0, 0, 0)
    return Strided(rows, *(0 if rows.shape[level] == 1 else rows.stride(level) for level in order))


def operands_of(block: Rotary, heads: torch.Tensor, tile: Tile) -> Operands:
    """Return the kernel arguments; `heads` is a tensor of the block's shape."""
    options, (*sizes, columns) = block.options, heads.shape
    # Levels over which the tables are broadcast become the innermost, so that the heads of a tile share table entries.
    order = tuple(sorted(range(3), key=lambda level: block.cos.shape[level] == block.sin.shape[level] == 1))
    levels = Levels(heads.numel() // columns, sizes[order[1]], sizes[order[2]])
    passing = columns - options.rotary_dim
    block_passing = triton.next_power_of_2(passing) if passing else 0
    even = options.rotary_dim == tile.block and passing == block_passing and levels.rows % tile.rows == 0
    paired = block.cos.shape[-1] != options.rotary_dim
    sizes_of_heads = columns, options.rotary_dim, options.start, block_passing
    layouts = options.interleaved, options.interleaved_output, paired
    chosen = *sizes_of_heads, *layouts, options.norm, options.cast_before_weight, even, levels.rows >= 1 << 30
    norm = Norm(block.weight, block.bias, options.weight_offset, options.eps)
    return Operands(
        levels, strided(block.cos, order), strided(block.sin, order), norm, Choices(*map(tl.constexpr, chosen)), order
    )


@triton.jit
def first_row(chosen, program_rows):
    """Return the first row of this program."""
    program = tl.program_id(0)
    if chosen.many:
        program = program.to(tl.int64)
    return program * program_rows


@triton.jit
def positions(levels, chosen, first, end, ROWS: tl.constexpr):
    """Return the positions of a tile's rows on the three levels, and the mask of the rows before `end`."""
    row = first + tl.arange(0, ROWS)[:, None]
    if chosen.even:
        row_mask = tl.full(row.shape, 1, tl.int1)
    else:
        row_mask = row < end
    above = row // levels.inner
    outer = above // levels.middle
    return (
        outer.to(tl.int64),
        (above - outer * levels.middle).to(tl.int64),
        (row - above * levels.inner).to(tl.int64),
    ), row_mask


@triton.jit
def pointers(rows, position):
    return rows.data + (position[0] * rows.outer + position[1] * rows.middle + position[2] * rows.inner)


@triton.jit
def within(row_mask, column, count, chosen):
    """Return the mask of a tile's elements; a constant if tiles cover the heads exactly."""
    if chosen.even:
        mask = tl.full((row_mask.shape[0], column.shape[1]), 1, tl.int1)
    else:
        mask = row_mask & (column < count)
    return mask


@triton.jit
def passing_columns(chosen):
    """Return the passing columns, and the number of each among them, for `within`."""
    count = tl.arange(0, chosen.passing)[None, :]
    if chosen.start == 0:
        column = count + chosen.rotary_dim
    elif chosen.start + chosen.rotary_dim == chosen.columns:
        column = count
    else:
        column = tl.where(count < chosen.start, count, count + chosen.rotary_dim)
    return column, count


@triton.jit
def load_pairs(at, row_mask, chosen, INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr):
    """Return the first and second elements of the pairs at `at`."""
    if INTERLEAVED:
        column = tl.arange(0, BLOCK)[None, :]
        both = load_at(at + column, within(row_mask, column, chosen.rotary_dim, chosen))
        first, second = tl.split(tl.reshape(both, (at.shape[0], BLOCK // 2, 2)))
    else:
        column = tl.arange(0, BLOCK // 2)[None, :]
        mask = within(row_mask, column, chosen.rotary_dim // 2, chosen)
        first = load_at(at + column, mask)
        second = load_at(at + (column + chosen.rotary_dim // 2), mask)
    return first, second


@triton.jit
def load_head(at, row_mask, chosen, INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr):
    """Return the head at `at`."""
    first, second = load_pairs(at + chosen.start, row_mask, chosen, INTERLEAVED, BLOCK)
    if chosen.passing == 0:
        rest = tl.zeros(at.shape, tl.float32)
    else:
        column, count = passing_columns(chosen)
        rest = load_at(at + column, within(row_mask, count, chosen.columns - chosen.rotary_dim, chosen))
    return first, second, rest


@triton.jit
def store_head(at, row_mask, chosen, head, INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr):
    """Store a head at `at`, rounded to the dtype of the memory."""
    dtype = at.dtype.element_ty
    start = at + chosen.start
    if INTERLEAVED:
        column = tl.arange(0, BLOCK)[None, :]
        both = tl.reshape(tl.join(head[0], head[1]), (at.shape[0], BLOCK)).to(dtype)
        tl.store(start + column, both, mask=within(row_mask, column, chosen.rotary_dim, chosen))
    else:
        column = tl.arange(0, BLOCK // 2)[None, :]
        mask = within(row_mask, column, chosen.rotary_dim // 2, chosen)
        tl.store(start + column, head[0].to(dtype), mask=mask)
        tl.store(start + (column + chosen.rotary_dim // 2), head[1].to(dtype), mask=mask)
    if chosen.passing != 0:
        column, count = passing_columns(chosen)
        mask = within(row_mask, count, chosen.columns - chosen.rotary_dim, chosen)
        tl.store(at + column, head[2].to(dtype), mask=mask)


@triton.jit
def load_weight(W, offset, default, chosen, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Return W + offset for ROWS heads; `default` if W is None.

    With the ROWS of the tile, W is loaded in the tile's layout and needs no conversion through shared memory.
    """
    if W is None:
        one = tl.full((1, 1), default, tl.float32)
        weight = (one, one, one)
    else:
        at, row_mask = W + tl.zeros((ROWS, 1), tl.int32), tl.full((ROWS, 1), 1, tl.int1)
        first, second, rest = load_head(at, row_mask, chosen, chosen.interleaved, BLOCK)
        weight = (first + offset, second + offset, rest + offset)
    return weight


@triton.jit
def load_table(table, position, row_mask, chosen, BLOCK: tl.constexpr):
    """Return the table entries for the first and the second elements of pairs."""
    at = pointers(table, position)
    if chosen.paired:
        column = tl.arange(0, BLOCK // 2)[None, :]
        first = load_at(at + column, within(row_mask, column, chosen.rotary_dim // 2, chosen))
        second = first
    else:
        first, second = load_pairs(at, row_mask, chosen, chosen.interleaved_output, BLOCK)
    return first, second


@triton.jit
def rotate(head, cos, sin, position, row_mask, chosen, TRANSPOSED: tl.constexpr, BLOCK: tl.constexpr):
    """Rotate the pairs of a head by the angles of the tables; with TRANSPOSED, by the transpose."""
    cos1, cos2 = load_table(cos, position, row_mask, chosen, BLOCK)
    sin1, sin2 = load_table(sin, position, row_mask, chosen, BLOCK)
    if TRANSPOSED:
        first, second = head[0] * cos1 + head[1] * sin2, head[1] * cos2 - head[0] * sin1
    else:
        first, second = head[0] * cos1 - head[1] * sin1, head[1] * cos2 + head[0] * sin2
    return first, second, head[2]


@triton.jit
def scaled(head, by):
    return head[0] * by[0], head[1] * by[1], head[2] * by[2]


@triton.jit
def added(head, other):
    return head[0] + other[0], head[1] + other[1], head[2] + other[2]


@triton.jit
def mean_of(head, chosen):
    """Return the mean over each head, (ROWS, 1)."""
    return (tl.sum(head[0] + head[1], 1) + tl.sum(head[2], 1))[:, None] / chosen.columns


@triton.jit
def centered(head, row_mask, chosen, BLOCK: tl.constexpr):
    """Subtract the mean; masked elements stay 0."""
    mean = mean_of(head, chosen)
    pairs = within(row_mask, tl.arange(0, BLOCK // 2)[None, :], chosen.rotary_dim // 2, chosen)
    first, second = tl.where(pairs, head[0] - mean, 0.0), tl.where(pairs, head[1] - mean, 0.0)
    if chosen.passing == 0:
        rest = head[2]
    else:
        count = tl.arange(0, chosen.passing)[None, :]
        rest = tl.where(within(row_mask, count, chosen.columns - chosen.rotary_dim, chosen), head[2] - mean, 0.0)
    return first, second, rest


@triton.jit
def normalized(head, norm, row_mask, chosen, BLOCK: tl.constexpr):
    """Return x_hat, with masked elements 0, and rstd."""
    if chosen.norm == "layer":
        head = centered(head, row_mask, chosen, BLOCK)
    # Masked heads have variance 0, so rstd would be large.
    rstd = tl.where(row_mask, tl.rsqrt(mean_of(scaled(head, head), chosen) + norm.eps), 0.0)
    return scaled(head, (rstd, rstd, rstd)), rstd


@triton.jit
def cast_x_hat(x_hat, dtype: tl.constexpr, chosen):
    """Return x_hat, rounded to the input's dtype with `cast_before_weight`."""
    if chosen.cast_before_weight:
        x_hat = (
            x_hat[0].to(dtype).to(tl.float32),
            x_hat[1].to(dtype).to(tl.float32),
            x_hat[2].to(dtype).to(tl.float32),
        )
    return x_hat
