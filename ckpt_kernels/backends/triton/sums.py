"""The kernel that adds up partial sums of the gradients of weight and bias, both in one launch and in a fixed order.

A program sums all rows of a strip of columns of one group.
"""

import triton
import triton.language as tl
from torch import Tensor

from .launch import Tile, launch

# 32 columns of float32 fill a memory transaction, and each thread has 16 elements in flight.
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
    """Sum PARTS, (groups, rows, columns), over rows into total, (groups, columns)."""
    lane = tl.arange(0, ROWS)[:, None]
    sums = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, rows, ROWS):
        mask = (start + lane < rows) & (column < columns)
        sums += tl.load(PARTS + (group * rows + start + lane) * columns + column, mask=mask, other=0.0)
    value = tl.sum(sums, 0)[None, :].to(total.dtype.element_ty)
    tl.store(total + group * columns + column, value, mask=column < columns)


def sum_partials(parts: tuple[Tensor | None, Tensor | None], totals: tuple[Tensor | None, Tensor | None]) -> None:
    """Sum each part, (groups, rows, columns) in float32, over rows into the total of the same position.

    A total has groups * columns elements. Either part may be None.
    """
    present = next((part for part in parts if part is not None), None)
    if present is None:
        return
    groups, rows, columns = present.shape
    strips = triton.cdiv(columns, _TILE.block)
    launch(column_sums_kernel, groups * strips, _TILE, present.device, *parts, *totals, rows, columns, strips)
