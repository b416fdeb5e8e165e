"""The bias_act kernels: dropout(activation(x + bias)), and how they are launched.

A program works on tiles of ROWS rows by BLOCK columns. The backward kernel takes a run of rows of one strip of columns,
so that it can sum the gradient of the bias over them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import activate, differentiate
from .glu import tile_of
from .launch import column_sum_tile, device_of, dropout_bits, element_tile, processors
from .row_norm_tiles import dropout_factor, load_coefficient, load_rows, store_rows


@triton.jit
def bias_act_forward_kernel(
    X, B, SEED, Y, rows, columns, x_stride, y_stride, column_tiles, threshold, scale,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, start, column, mask = tile_of(rows, columns, column_tiles, ROWS, BLOCK)
    b = load_coefficient(B, 0, columns, column, 0.0)
    y = activate(load_rows(X, x_stride, row, column, mask) + b, ACTIVATION)
    if SEED is not None:
        y = y * dropout_factor(SEED, row, start, threshold, scale, ROWS, BLOCK)
    store_rows(Y, y_stride, row, column, mask, y)


@triton.jit
def bias_act_backward_kernel(
    DY, X, B, SEED, DX, Y, DB, rows, columns, dy_stride, x_stride, dx_stride, y_stride, column_tiles, program_rows,
    threshold, scale, ACTIVATION: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """DB is partial sums, a row of columns for each run of rows, in float32, which the caller adds up."""
    share = (tl.program_id(0) // column_tiles).to(tl.int64)
    start = (tl.program_id(0) % column_tiles).to(tl.int64) * BLOCK
    column = start + tl.arange(0, BLOCK)[None, :]
    end = tl.minimum((share + 1) * program_rows, rows)
    b = load_coefficient(B, 0, columns, column, 0.0)
    db = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(share * program_rows, end, ROWS):
        row = first + tl.arange(0, ROWS)[:, None]
        mask = (row < end) & (column < columns)
        g = load_rows(DY, dy_stride, row, column, mask)
        z = load_rows(X, x_stride, row, column, mask) + b
        if Y is not None:
            y = activate(z, ACTIVATION)
        if SEED is not None:
            factor = dropout_factor(SEED, row, start, threshold, scale, ROWS, BLOCK)
            g = g * factor
            if Y is not None:
                y = y * factor
        if Y is not None:
            store_rows(Y, y_stride, row, column, mask, y)
        g = tl.where(mask, g * differentiate(z, ACTIVATION), 0.0)
        if DX is not None:
            store_rows(DX, dx_stride, row, column, mask, g)
        db += g
    if DB is not None:
        tl.store(DB + share * columns + column, tl.sum(db, 0)[None, :], mask=column < columns)


def bias_act_forward(
    input: Tensor, bias: Tensor | None, seed: Tensor | None, output: Tensor, activation: str, dropout_p: float
) -> None:
    """`backends.reference.bias_act` into output."""
    rows, columns = input.shape
    tile = element_tile(columns)
    column_tiles = triton.cdiv(columns, tile.block)
    with device_of(input):
        bias_act_forward_kernel[(triton.cdiv(rows, tile.rows) * column_tiles,)](
            input, bias, seed, output, rows, columns, input.stride(0), output.stride(0), column_tiles,
            *dropout_bits(dropout_p), activation, tile.rows, tile.block, num_warps=tile.warps,
        )  # fmt: skip


def bias_act_backward(
    grad_output: Tensor,
    input: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    grad_input: Tensor | None,
    grad_bias: Tensor | None,
    output: Tensor | None,
    activation: str,
    dropout_p: float,
) -> None:
    """The gradients of `bias_act`, and its output where there is room."""
    rows, columns = input.shape
    tile = column_sum_tile(columns)
    column_tiles = triton.cdiv(columns, tile.block)
    row_tiles = triton.cdiv(rows, tile.rows)
    # With sums to keep, no more runs of rows than fill the device; without, a tile a program.
    runs = row_tiles if grad_bias is None else min(row_tiles, triton.cdiv(8 * processors(input.device), column_tiles))
    program_rows = triton.cdiv(row_tiles, runs) * tile.rows
    runs = triton.cdiv(rows, program_rows)
    sums = None
    if grad_bias is not None:
        sums = torch.empty((runs, columns), dtype=torch.float32, device=input.device)
    with device_of(input):
        bias_act_backward_kernel[(runs * column_tiles,)](
            grad_output, input, bias, seed, grad_input, output, sums, rows, columns,
            grad_output.stride(0), input.stride(0), *(0 if t is None else t.stride(0) for t in (grad_input, output)),
            column_tiles, program_rows, *dropout_bits(dropout_p), activation, tile.rows, tile.block,
            num_warps=tile.warps,
        )  # fmt: skip
    if grad_bias is not None:
        torch.sum(sums, 0, out=grad_bias)
