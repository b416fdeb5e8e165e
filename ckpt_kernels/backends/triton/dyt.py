"""The DyT kernels, tanh(alpha * x) * weight + bias, and their launchers.

In the backward pass, with t = tanh(alpha * x), g the incoming gradient and s = g * w * (1 - t^2), the gradient of
alpha * x: dx = alpha * s, dalpha is the sum of s * x, and dw and db are the sums of g * t and of g over rows. A program
works on tiles of ROWS rows by BLOCK columns. A program of the backward kernel processes a run of rows in one strip of
columns, with partial sums in registers.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import activate, as_stored, differentiate
from .glu import shape_of, tile_of
from .launch import element_tile, launch, matrix_of, processors, sums_tile
from .row_norm_tiles import load_coefficient, load_rows, store_rows


class Sums(NamedTuple):
    """Float32 partial sums of the gradients, which the caller adds up.

    alpha has one number a program; weight and bias have a row of columns for each run of rows.
    """

    alpha: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


@triton.jit
def dyt_forward_kernel(
    x, ALPHA, W, B, y, shape, ACTIVATION: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row, _, column, mask = tile_of(shape, ROWS, BLOCK)
    alpha = tl.load(ALPHA).to(tl.float32)
    w = load_coefficient(W, 0, 0, column, column < shape.columns, 1.0)
    b = load_coefficient(B, 0, 0, column, column < shape.columns, 0.0)
    t = activate(alpha * load_rows(x.data, x.stride, row, column, mask), ACTIVATION)
    store_rows(y.data, y.stride, row, column, mask, t * w + b)


@triton.jit
def dyt_backward_kernel(
    dy, x, ALPHA, W, dx, sums, shape, program_rows, ACTIVATION: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Compute DX, and the partial sums of this program's run of rows; the module's docstring has the formulas."""
    columns = shape.columns
    run = (tl.program_id(0) // shape.column_tiles).to(tl.int64)
    column = (tl.program_id(0) % shape.column_tiles).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[None, :]
    end = tl.minimum((run + 1) * program_rows, shape.rows)
    alpha = tl.load(ALPHA).to(tl.float32)
    w = load_coefficient(W, 0, 0, column, column < columns, 1.0)
    dalpha = tl.zeros((ROWS, BLOCK), tl.float32)
    dw = tl.zeros((ROWS, BLOCK), tl.float32)
    db = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(run * program_rows, end, ROWS):
        row = first + tl.arange(0, ROWS)[:, None]
        mask = (row < end) & (column < columns)
        g = load_rows(dy.data, dy.stride, row, column, mask)
        u = load_rows(x.data, x.stride, row, column, mask)
        t = activate(alpha * u, ACTIVATION)
        # More accurate than 1 - t * t, which amplifies the rounding of t.
        s = g * w * differentiate(alpha * u, ACTIVATION)
        if dx.data is not None:
            store_rows(dx.data, dx.stride, row, column, mask, alpha * s)
        # Where the mask is off, g and x are 0, and so are all summands.
        dalpha += s * u
        dw += g * t
        db += g
    offset = run * columns + column
    if sums.alpha is not None:
        tl.store(sums.alpha + tl.program_id(0), tl.sum(dalpha))
    if sums.weight is not None:
        tl.store(sums.weight + offset, tl.sum(dw, 0)[None, :], mask=column < columns)
    if sums.bias is not None:
        tl.store(sums.bias + offset, tl.sum(db, 0)[None, :], mask=column < columns)


def dyt_forward(input: Tensor, alpha: Tensor, weight: Tensor | None, bias: Tensor | None, output: Tensor) -> None:
    """Compute `backends.reference.dyt` into output."""
    tile = element_tile(input.shape[1])
    shape = shape_of(input, tile)
    operands = (matrix_of(input), alpha, weight, bias, matrix_of(output), shape)
    programs = triton.cdiv(shape.rows, tile.rows) * shape.column_tiles
    activation = as_stored("tanh", input, alpha, weight, bias)
    launch(dyt_forward_kernel, programs, tile, input.device, *operands, activation)


def dyt_backward(
    grad_output: Tensor,
    input: Tensor,
    alpha: Tensor,
    weight: Tensor | None,
    grad_input: Tensor | None,
    grad_alpha: Tensor | None,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
) -> None:
    """Compute `backends.reference.dyt_backward`, with all sums in a fixed order."""
    device, tile = input.device, sums_tile(input.shape[1])
    shape = shape_of(input, tile)
    row_tiles = triton.cdiv(shape.rows, tile.rows)
    # No more runs than fill the device, since each run has its own partial sums.
    program_rows = triton.cdiv(row_tiles, triton.cdiv(8 * processors(device), shape.column_tiles)) * tile.rows
    runs = triton.cdiv(shape.rows, program_rows)
    programs = runs * shape.column_tiles
    gradients = (grad_alpha, grad_weight, grad_bias)
    sizes = (programs,), (runs, shape.columns), (runs, shape.columns)
    sums = Sums(
        *(
            None if gradient is None else torch.empty(size, dtype=torch.float32, device=device)
            for gradient, size in zip(gradients, sizes, strict=True)
        )
    )
    operands = (matrix_of(grad_output), matrix_of(input), alpha, weight, matrix_of(grad_input))
    activation = as_stored("tanh", input, alpha, weight)
    launch(dyt_backward_kernel, programs, tile, device, *operands, sums, shape, program_rows, activation)
    for gradient, partial in zip(gradients, sums, strict=True):
        if gradient is not None:
            torch.sum(partial, 0, out=gradient.view(partial.shape[1:]))
