"""The pieces that the rotary kernels are composed from.

A tile is ROWS whole heads. A `head` is three float32 tiles: the first elements of its pairs and the second ones, each
(ROWS, BLOCK / 2), and the columns that pass, or one column of zeros where none do. `at` are pointers (ROWS, 1) to where
heads begin, `live` says which heads there are.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..blocks import Rotary
from .launch import Tile
from .row_norm_tiles import load_at


class Levels(NamedTuple):
    """How many heads there are, and how many follow each other on the two inner levels of three."""

    rows: int
    middle: int
    inner: int


class Strided(NamedTuple):
    """What has a row for each head, and its strides on the three levels: 0 where the rows are the same."""

    data: torch.Tensor | None
    outer: int
    middle: int
    inner: int


class Norm(NamedTuple):
    """What a norm has beside its input."""

    weight: torch.Tensor | None
    bias: torch.Tensor | None
    weight_offset: float
    eps: float


class Choices(NamedTuple):
    """What is compiled for: heads are of few sizes, and from sizes that are known follows how wide accesses may be.

    `passing` is the columns that pass, up to a power of two, or 0. `paired` tables have an entry for both elements of a
    pair. `even` if tiles fill the heads exactly, `many` if 32 bits do not count the heads.
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
    """A `Rotary` as the kernels take it, and the order of levels that `strided` wants."""

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
    """Of heads of the block's shape."""
    options, (*sizes, columns) = block.options, heads.shape
    # Levels on which tables are the same are the innermost, so that the heads of a tile share their entries.
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
    """Of this program's rows."""
    program = tl.program_id(0)
    if chosen.many:
        program = program.to(tl.int64)
    return program * program_rows


@triton.jit
def places(levels, chosen, first, end, ROWS: tl.constexpr):
    """Where the rows of a tile are on the three levels, and which there are, those from `end` on being others'."""
    row = first + tl.arange(0, ROWS)[:, None]
    if chosen.even:
        live = tl.full(row.shape, 1, tl.int1)
    else:
        live = row < end
    above = row // levels.inner
    outer = above // levels.middle
    return (
        outer.to(tl.int64),
        (above - outer * levels.middle).to(tl.int64),
        (row - above * levels.inner).to(tl.int64),
    ), live


@triton.jit
def pointers(rows, place):
    return rows.data + (place[0] * rows.outer + place[1] * rows.middle + place[2] * rows.inner)


@triton.jit
def within(live, column, count, chosen):
    """Which elements of a tile there are. Where tiles fill the heads exactly the compiler knows that all are."""
    if chosen.even:
        mask = tl.full((live.shape[0], column.shape[1]), 1, tl.int1)
    else:
        mask = live & (column < count)
    return mask


@triton.jit
def passing_columns(chosen):
    """Which columns pass, and which in their row each is, for `within`."""
    count = tl.arange(0, chosen.passing)[None, :]
    if chosen.start == 0:
        column = count + chosen.rotary_dim
    elif chosen.start + chosen.rotary_dim == chosen.columns:
        column = count
    else:
        column = tl.where(count < chosen.start, count, count + chosen.rotary_dim)
    return column, count


@triton.jit
def load_pairs(at, live, chosen, INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr):
    """The first and second elements of the pairs that lie from there on."""
    if INTERLEAVED:
        column = tl.arange(0, BLOCK)[None, :]
        both = load_at(at + column, within(live, column, chosen.rotary_dim, chosen))
        first, second = tl.split(tl.reshape(both, (at.shape[0], BLOCK // 2, 2)))
    else:
        column = tl.arange(0, BLOCK // 2)[None, :]
        mask = within(live, column, chosen.rotary_dim // 2, chosen)
        first = load_at(at + column, mask)
        second = load_at(at + (column + chosen.rotary_dim // 2), mask)
    return first, second


@triton.jit
def load_head(at, live, chosen, INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr):
    first, second = load_pairs(at + chosen.start, live, chosen, INTERLEAVED, BLOCK)
    if chosen.passing == 0:
        rest = tl.zeros(at.shape, tl.float32)
    else:
        column, count = passing_columns(chosen)
        rest = load_at(at + column, within(live, count, chosen.columns - chosen.rotary_dim, chosen))
    return first, second, rest


@triton.jit
def store_head(at, live, chosen, head, INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr):
    dtype = at.dtype.element_ty
    start = at + chosen.start
    if INTERLEAVED:
        column = tl.arange(0, BLOCK)[None, :]
        both = tl.reshape(tl.join(head[0], head[1]), (at.shape[0], BLOCK)).to(dtype)
        tl.store(start + column, both, mask=within(live, column, chosen.rotary_dim, chosen))
    else:
        column = tl.arange(0, BLOCK // 2)[None, :]
        mask = within(live, column, chosen.rotary_dim // 2, chosen)
        tl.store(start + column, head[0].to(dtype), mask=mask)
        tl.store(start + (column + chosen.rotary_dim // 2), head[1].to(dtype), mask=mask)
    if chosen.passing != 0:
        column, count = passing_columns(chosen)
        mask = within(live, count, chosen.columns - chosen.rotary_dim, chosen)
        tl.store(at + column, head[2].to(dtype), mask=mask)


@triton.jit
def load_weight(W, offset, default, chosen, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """W + offset for ROWS heads; `default` where there is none.

    For as many as a tile has, it is read in the tile's layout, without a way through shared memory.
    """
    if W is None:
        one = tl.full((1, 1), default, tl.float32)
        weight = (one, one, one)
    else:
        at, live = W + tl.zeros((ROWS, 1), tl.int32), tl.full((ROWS, 1), 1, tl.int1)
        first, second, rest = load_head(at, live, chosen, chosen.interleaved, BLOCK)
        weight = (first + offset, second + offset, rest + offset)
    return weight


@triton.jit
def load_table(table, place, live, chosen, BLOCK: tl.constexpr):
    """The entries for first and second elements."""
    at = pointers(table, place)
    if chosen.paired:
        column = tl.arange(0, BLOCK // 2)[None, :]
        first = load_at(at + column, within(live, column, chosen.rotary_dim // 2, chosen))
        second = first
    else:
        first, second = load_pairs(at, live, chosen, chosen.interleaved_output, BLOCK)
    return first, second


@triton.jit
def turned(head, cos, sin, place, live, chosen, BACK: tl.constexpr, BLOCK: tl.constexpr):
    """The head with its pairs turned by the tables' angles; or, BACK, by the transpose of that."""
    cos1, cos2 = load_table(cos, place, live, chosen, BLOCK)
    sin1, sin2 = load_table(sin, place, live, chosen, BLOCK)
    if BACK:
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
    """Over each head, (ROWS, 1)."""
    return (tl.sum(head[0] + head[1], 1) + tl.sum(head[2], 1))[:, None] / chosen.columns


@triton.jit
def centered(head, live, chosen, BLOCK: tl.constexpr):
    """Minus the mean; 0 stays where nothing is."""
    mean = mean_of(head, chosen)
    pairs = within(live, tl.arange(0, BLOCK // 2)[None, :], chosen.rotary_dim // 2, chosen)
    first, second = tl.where(pairs, head[0] - mean, 0.0), tl.where(pairs, head[1] - mean, 0.0)
    if chosen.passing == 0:
        rest = head[2]
    else:
        count = tl.arange(0, chosen.passing)[None, :]
        rest = tl.where(within(live, count, chosen.columns - chosen.rotary_dim, chosen), head[2] - mean, 0.0)
    return first, second, rest


@triton.jit
def normalized(head, norm, live, chosen, BLOCK: tl.constexpr):
    """x_hat, which is 0 where nothing is, and rstd."""
    if chosen.norm == "layer":
        head = centered(head, live, chosen, BLOCK)
    # Of a head that is not there the variance is 0.
    rstd = tl.where(live, tl.rsqrt(mean_of(scaled(head, head), chosen) + norm.eps), 0.0)
    return scaled(head, (rstd, rstd, rstd)), rstd


@triton.jit
def seen_by_weight(x_hat, dtype: tl.constexpr, chosen):
    """x_hat, rounded to the input's dtype where the norm does so."""
    if chosen.cast_before_weight:
        x_hat = (
            x_hat[0].to(dtype).to(tl.float32),
            x_hat[1].to(dtype).to(tl.float32),
            x_hat[2].to(dtype).to(tl.float32),
        )
    return x_hat
