"""The row-norm kernels for rows that fit a tile, and the launchers of all row-norm kernels.

A row is read once and kept in registers. A program works on tiles of ROWS rows by BLOCK columns. Code for operands that
are None is removed at compile time. Statistics and arithmetic are in float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..blocks import RowNorm, RowNormGradients
from .activations import activate
from .launch import (
    STRIP_TILE,
    backward_programs,
    backward_tile,
    forward_tile,
    launch,
    rows_of,
    stages_of,
    strip_programs,
    sums_fit,
)
from .long_row_norm import long_row_norm_backward_kernel, long_row_norm_forward_kernel, row_norm_strip_kernel
from .row_norm_tiles import (
    add_residual,
    affine_gradient,
    cast_x_hat,
    load_coefficient,
    load_operand,
    load_scale,
    load_statistics,
    masks,
    operands_of,
    store_input_gradients,
    store_output,
    store_rows,
    store_statistics,
)
from .sums import sum_partials


@triton.jit
def row_norm_forward_kernel(
    norm, chosen, Y, RESIDUAL_OUT, tiles, GIVEN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Compute Y = activation(x_hat * (W + offset) + B), and the row statistics unless they are GIVEN.

    `norm` and `chosen` are `Operands` and `Choices`. The grid has `tiles` programs for each group of rows.
    """
    # A tile never crosses a group, so that its rows share one row of weight and bias.
    group = (tl.program_id(0) // tiles).to(tl.int64)
    columns = norm.columns
    row = group * norm.rows_per_group + tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    row_mask, column_mask, mask = masks(norm, chosen, row, (group + 1) * norm.rows_per_group, column)
    if norm.residual.data is None:
        u = load_operand(norm, chosen, row, column, mask)
    else:
        u = add_residual(norm, RESIDUAL_OUT, row, 0, column, mask, ROWS, BLOCK)
    if GIVEN:
        mean, rstd = load_statistics(norm, row, row_mask, ROWS)
    else:
        if norm.mean is None:
            mean = tl.zeros((ROWS, 1), tl.float32)
            variance = tl.sum(u * u, 1)[:, None] / columns
        else:
            mean = tl.sum(u, 1)[:, None] / columns
            centered = tl.where(mask, u - mean, 0.0)
            variance = tl.sum(centered * centered, 1)[:, None] / columns
        rstd = tl.rsqrt(variance + norm.eps)
        store_statistics(norm, mean, rstd, row, row_mask)
    w = load_scale(norm, group, column, column_mask)
    b = load_coefficient(norm.bias, group, columns, column, column_mask, 0.0)
    store_output(norm, chosen, u, mean, rstd, w, b, Y, row, column, mask)


@triton.jit
def row_norm_backward_kernel(
    norm, chosen, grad_output, grad_sum, gradients, Y, programs, program_rows, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Compute the gradients of the block, and the output again unless Y is None.

    With g the gradient of x_hat * w + b, and c1 and c2 the means over a row of g * w * x_hat and of g * w:
    du = (g * w - x_hat * c1 - c2) * rstd; `backends.reference.row_norm_backward` has the derivation.

    Each of the `programs` programs of a group processes `program_rows` rows, in order. The gradients of weight and bias
    are float32 partial sums, one row of columns for each program, which the caller adds up.
    """
    group = (tl.program_id(0) // programs).to(tl.int64)
    columns = norm.columns
    begin = group * norm.rows_per_group + tl.program_id(0) % programs * program_rows
    end = tl.minimum(begin + program_rows, (group + 1) * norm.rows_per_group)
    partial = tl.program_id(0).to(tl.int64) * columns
    column = tl.arange(0, BLOCK)[None, :]
    column_mask = masks(norm, chosen, begin, end, column)[1]
    w = load_scale(norm, group, column, column_mask)
    b = load_coefficient(norm.bias, group, columns, column, column_mask, 0.0)
    dw = tl.zeros((ROWS, BLOCK), tl.float32)
    db = tl.zeros((ROWS, BLOCK), tl.float32)
    per_column = 1.0 / columns
    # Later rows are copied to shared memory while a row is processed.
    for first in tl.range(begin, end, ROWS, num_stages=chosen.stages):
        row = first + tl.arange(0, ROWS)[:, None]
        row_mask, column_mask, mask = masks(norm, chosen, row, end, column)
        mean, rstd = load_statistics(norm, row, row_mask, ROWS)
        x_hat = tl.where(mask, (load_operand(norm, chosen, row, column, mask) - mean) * rstd, 0.0)
        rounded = cast_x_hat(norm, chosen, x_hat)
        g = affine_gradient(norm, chosen, grad_output, rounded, w, b, gradients.gate, row, column, mask)
        if Y is not None:
            store_rows(Y, columns, row, column, mask, activate(rounded * w + b, chosen.activation))
        if gradients.weight is not None:
            dw += g * rounded
        if gradients.bias is not None:
            db += g
        if gradients.input is not None:
            wg = g * w
            du = wg - x_hat * (tl.sum(wg * x_hat, 1)[:, None] * per_column)
            if norm.mean is not None:
                du -= tl.sum(wg, 1)[:, None] * per_column
            store_input_gradients(norm, chosen, du * rstd, grad_sum, gradients, row, 0, column, mask, ROWS, BLOCK)
    if gradients.weight is not None:
        tl.store(gradients.weight + partial + column, tl.sum(dw, 0)[None, :], mask=column_mask)
    if gradients.bias is not None:
        tl.store(gradients.bias + partial + column, tl.sum(db, 0)[None, :], mask=column_mask)


def row_norm_forward(
    block: RowNorm, output: Tensor, residual_out: Tensor | None, given_statistics: bool = False
) -> None:
    """`backends.reference.row_norm_forward`."""
    tile = forward_tile(block.options.columns)
    norm, chosen, groups = operands_of(block, tile)
    tiles = triton.cdiv(norm.rows_per_group, tile.rows)
    kernel = row_norm_forward_kernel if tile.whole else long_row_norm_forward_kernel
    launch(
        kernel, groups * tiles, tile, block.input.device, norm, chosen, output, residual_out, tiles, given_statistics
    )


def row_norm_backward(
    block: RowNorm,
    grad_output: Tensor,
    grad_residual_out: Tensor | None,
    gradients: RowNormGradients,
    output: Tensor | None = None,
) -> None:
    """`backends.reference.row_norm_backward`."""
    columns, device = block.options.columns, block.input.device
    summed = gradients.weight is not None or gradients.bias is not None
    separate_sums = summed and not sums_fit(columns, block.gate is not None or output is not None)
    tile, read = backward_tile(columns), (block.input, block.gate, grad_output, grad_residual_out)
    tile = tile._replace(stages=stages_of(tile, read, device))
    norm, chosen, groups = operands_of(block, tile)
    programs, program_rows = backward_programs(device, norm.rows_per_group, tile)
    incoming = rows_of(grad_output), rows_of(grad_residual_out)
    if separate_sums:
        sums = gradients._replace(weight=None, bias=None)
    else:
        sums = partial_sums(gradients, groups, programs, columns)
    kernel = row_norm_backward_kernel if tile.whole else long_row_norm_backward_kernel
    launch(kernel, groups * programs, tile, device, norm, chosen, *incoming, sums, output, programs, program_rows)
    if separate_sums:
        tile, read = STRIP_TILE, (block.input, block.gate, grad_output)
        tile = tile._replace(stages=stages_of(tile, read, device))
        norm, chosen, groups = operands_of(block, tile)
        strips = triton.cdiv(columns, tile.block)
        programs, program_rows = strip_programs(device, norm.rows_per_group, groups * strips, tile)
        sums = partial_sums(gradients, groups, programs, columns)
        arguments = norm, chosen, incoming[0], sums.weight, sums.bias, strips, programs, program_rows
        launch(row_norm_strip_kernel, groups * programs * strips, tile, device, *arguments)
    sum_partials((sums.weight, sums.bias), (gradients.weight, gradients.bias))


def partial_sums(gradients: RowNormGradients, groups: int, programs: int, columns: int) -> RowNormGradients:
    """The gradients, with memory for each program's share of those of weight and bias."""
    weight, bias = (
        None if gradient is None else gradient.new_empty((groups, programs, columns), dtype=torch.float32)
        for gradient in (gradients.weight, gradients.bias)
    )
    return gradients._replace(weight=weight, bias=bias)
