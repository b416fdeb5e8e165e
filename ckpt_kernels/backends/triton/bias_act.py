"""The bias_act kernels, dropout(activation(x + bias)), and their launchers.

A program works on tiles of ROWS rows by BLOCK columns. A program of the backward kernel processes a run of rows in one
strip of columns, and sums the gradient of the bias over these rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import activate, as_stored, differentiate
from .glu import shape_of, tile_of
from .launch import column_sum_tile, dropout_of, element_tile, launch, matrix_of, processors
from .row_norm_tiles import dropout_factor, load_coefficient, load_rows, store_rows
from .sums import sum_partials


@triton.jit
def bias_act_forward_kernel(x, B, dropout, y, shape, ACTIVATION: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row, start, column, mask = tile_of(shape, ROWS, BLOCK)
    z = load_rows(x.data, x.stride, row, column, mask) + load_coefficient(B, 0, 0, column, column < shape.columns, 0.0)
    result = activate(z, ACTIVATION)
    if dropout.seed is not None:
        result = result * dropout_factor(dropout, row, start, ROWS, BLOCK)
    store_rows(y.data, y.stride, row, column, mask, result)


@triton.jit
def bias_act_backward_kernel(
    dy, x, B, dropout, dx, y, DB, shape, program_rows,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """DB has float32 partial sums, one row of columns for each run of rows, which the caller adds up."""
    columns = shape.columns
    run = (tl.program_id(0) // shape.column_tiles).to(tl.int64)
    start = (tl.program_id(0) % shape.column_tiles).to(tl.int64) * BLOCK
    column = start + tl.arange(0, BLOCK)[None, :]
    end = tl.minimum((run + 1) * program_rows, shape.rows)
    b = load_coefficient(B, 0, 0, column, column < columns, 0.0)
    db = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(run * program_rows, end, ROWS):
        row = first + tl.arange(0, ROWS)[:, None]
        mask = (row < end) & (column < columns)
        g = load_rows(dy.data, dy.stride, row, column, mask)
        z = load_rows(x.data, x.stride, row, column, mask) + b
        if y.data is not None:
            result = activate(z, ACTIVATION)
        if dropout.seed is not None:
            factor = dropout_factor(dropout, row, start, ROWS, BLOCK)
            g = g * factor
            if y.data is not None:
                result = result * factor
        if y.data is not None:
            store_rows(y.data, y.stride, row, column, mask, result)
        g = tl.where(mask, g * differentiate(z, ACTIVATION), 0.0)
        if dx.data is not None:
            store_rows(dx.data, dx.stride, row, column, mask, g)
        db += g
    if DB is not None:
        tl.store(DB + run * columns + column, tl.sum(db, 0)[None, :], mask=column < columns)


def bias_act_forward(
    input: Tensor, bias: Tensor | None, seed: Tensor | None, output: Tensor, activation: str, dropout_p: float
) -> None:
    """Compute `backends.reference.bias_act` into output."""
    tile = element_tile(input.shape[1])
    shape = shape_of(input, tile)
    operands = (matrix_of(input), bias, dropout_of(seed, dropout_p), matrix_of(output), shape)
    programs = triton.cdiv(shape.rows, tile.rows) * shape.column_tiles
    activation = as_stored(activation, input, bias)
    launch(bias_act_forward_kernel, programs, tile, input.device, *operands, activation)


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
    """Compute `backends.reference.bias_act_backward`."""
    device, tile = input.device, column_sum_tile(input.shape[1])
    shape = shape_of(input, tile)
    row_tiles = triton.cdiv(shape.rows, tile.rows)
    # With sums, no more runs than fill the device, since each run has its own sums; without, one tile a program.
    runs = row_tiles if grad_bias is None else min(row_tiles, triton.cdiv(8 * processors(device), shape.column_tiles))
    program_rows = triton.cdiv(row_tiles, runs) * tile.rows
    runs = triton.cdiv(shape.rows, program_rows)
    sums = None
    if grad_bias is not None:
        sums = torch.empty((runs, shape.columns), dtype=torch.float32, device=device)
    operands = (matrix_of(grad_output), matrix_of(input), bias, dropout_of(seed, dropout_p))
    results = (matrix_of(grad_input), matrix_of(output), sums)
    programs, activation = runs * shape.column_tiles, as_stored(activation, input, bias)
    launch(bias_act_backward_kernel, programs, tile, device, *operands, *results, shape, program_rows, activation)
    if sums is not None:
        sum_partials((sums[None], None), (grad_bias, None))
