"""The kernel that adds up programs' shares of the gradients of weight and bias: both in one launch, in a fixed order.

A program takes a strip of columns of one group, all rows of it.
"""

import triton
import triton.language as tl
from torch import Tensor

from .launch import Tile, launch

# 32 columns of float32 fill a memory transaction; 16 elements a thread are in flight at once.
_TILE = Tile(128, 32, 8, False)


@triton.jit
def column_sums_kernel(FIRST, SECOND, first, second, rows, columns, strips, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    group = (tl.program_id(0) // strips).to(tl.int64)
    column = tl.program_id(0) % strips * BLOCK + tl.arange(0, BLOCK)[None, :]
    if FIRST is not None:
        column_sums(FIRST, first, group, rows, columns, column, ROWS, BLOCK)
    if SECOND is not None:
        column_sums(SECOND, second, group, rows, columns, column, ROWS, BLOCK)


@triton.jit
def column_sums(PARTS, total, group, rows, columns, column, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Of (groups, rows, columns) into (groups, columns)."""
    lane = tl.arange(0, ROWS)[:, None]
    sums = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, rows, ROWS):
        mask = (start + lane < rows) & (column < columns)
        sums += tl.load(PARTS + (group * rows + start + lane) * columns + column, mask=mask, other=0.0)
    value = tl.sum(sums, 0)[None, :].to(total.dtype.element_ty)
    tl.store(total + group * columns + column, value, mask=column < columns)


def add_up(parts: tuple[Tensor | None, Tensor | None], totals: tuple[Tensor | None, Tensor | None]) -> None:
    """The sums over the middle dimension of parts, (groups, rows, columns) in float32, into totals of (groups, columns)
    or as many elements; either of the two may be None."""
    given = next((part for part in parts if part is not None), None)
    if given is None:
        return
    groups, rows, columns = given.shape
    strips = triton.cdiv(columns, _TILE.block)
    launch(column_sums_kernel, groups * strips, _TILE, given.device, *parts, *totals, rows, columns, strips)
