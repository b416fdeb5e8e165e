"""The row-norm kernels for rows that do not fit a tile: they read rows twice, in blocks or in strips of columns."""

import triton
import triton.language as tl

from .activations import activate
from .row_norm_tiles import (
    add_residual,
    affine_gradient,
    cast_x_hat,
    load_coefficient,
    load_operand,
    load_rows,
    load_scale,
    load_statistics,
    masks,
    store_input_gradients,
    store_output,
    store_rows,
    store_statistics,
)


@triton.jit
def long_row_norm_forward_kernel(
    norm, chosen, Y, RESIDUAL_OUT, tiles, GIVEN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Compute the same as `row_norm_forward_kernel`, for rows of any length."""
    # A tile never crosses a group, so that its rows share one row of weight and bias.
    group = (tl.program_id(0) // tiles).to(tl.int64)
    columns = norm.columns
    row = group * norm.rows_per_group + tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)[:, None]
    end = (group + 1) * norm.rows_per_group
    lane = tl.arange(0, BLOCK)[None, :]
    row_mask = masks(norm, chosen, row, end, lane)[0]
    if GIVEN:
        mean, rstd = load_statistics(norm, row, row_mask, ROWS)
    else:
        # Each lane updates its statistics by Welford's method, one element a block; then the lanes are merged.
        lane_mean = tl.zeros((ROWS, BLOCK), tl.float32)
        lane_m2 = tl.zeros((ROWS, BLOCK), tl.float32)
        for start in range(0, columns, BLOCK):
            column = start + lane
            row_mask, column_mask, mask = masks(norm, chosen, row, end, column)
            if norm.residual.data is None:
                u = load_operand(norm, chosen, row, column, mask)
            else:
                u = add_residual(norm, RESIDUAL_OUT, row, start, column, mask, ROWS, BLOCK)
            if norm.mean is None:
                lane_m2 += u * u
            else:
                delta = tl.where(mask, u - lane_mean, 0.0)
                lane_mean += delta / (start // BLOCK + 1)
                lane_m2 += delta * tl.where(mask, u - lane_mean, 0.0)
        if norm.mean is None:
            mean = tl.zeros((ROWS, 1), tl.float32)
            variance = tl.sum(lane_m2, 1)[:, None] / columns
        else:
            count = ((columns - lane + BLOCK - 1) // BLOCK).to(tl.float32)
            mean = tl.sum(lane_mean * count, 1)[:, None] / columns
            deviation = lane_mean - mean
            variance = tl.sum(lane_m2 + count * deviation * deviation, 1)[:, None] / columns
        rstd = tl.rsqrt(variance + norm.eps)
        store_statistics(norm, mean, rstd, row, row_mask)
    # The loop below reads values stored above, possibly by other threads of this program.
    tl.debug_barrier()
    for start in range(0, columns, BLOCK):
        column = start + lane
        row_mask, column_mask, mask = masks(norm, chosen, row, end, column)
        if norm.residual.data is None:
            u = load_operand(norm, chosen, row, column, mask)
        else:
            u = load_rows(RESIDUAL_OUT, columns, row, column, mask)
        w = load_scale(norm, group, column, column_mask)
        b = load_coefficient(norm.bias, group, columns, column, column_mask, 0.0)
        store_output(norm, chosen, u, mean, rstd, w, b, Y, row, column, mask)


@triton.jit
def long_row_norm_backward_kernel(
    norm, chosen, grad_output, grad_sum, gradients, Y, programs, program_rows, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Compute the same as `row_norm_backward_kernel`, for rows of any length, without gradients of weight and bias."""
    group = (tl.program_id(0) // programs).to(tl.int64)
    columns = norm.columns
    begin = group * norm.rows_per_group + tl.program_id(0) % programs * program_rows
    end = tl.minimum(begin + program_rows, (group + 1) * norm.rows_per_group)
    lane = tl.arange(0, BLOCK)[None, :]
    for first in range(begin, end, ROWS):
        row = first + tl.arange(0, ROWS)[:, None]
        row_mask = masks(norm, chosen, row, end, lane)[0]
        mean, rstd = load_statistics(norm, row, row_mask, ROWS)
        c1_lanes = tl.zeros((ROWS, BLOCK), tl.float32)
        c2_lanes = tl.zeros((ROWS, BLOCK), tl.float32)
        for start in range(0, columns, BLOCK):
            column = start + lane
            row_mask, column_mask, mask = masks(norm, chosen, row, end, column)
            w = load_scale(norm, group, column, column_mask)
            b = load_coefficient(norm.bias, group, columns, column, column_mask, 0.0)
            x_hat = tl.where(mask, (load_operand(norm, chosen, row, column, mask) - mean) * rstd, 0.0)
            rounded = cast_x_hat(norm, chosen, x_hat)
            g = affine_gradient(norm, chosen, grad_output, rounded, w, b, gradients.gate, row, column, mask)
            if Y is not None:
                store_rows(Y, columns, row, column, mask, activate(rounded * w + b, chosen.activation))
            wg = g * w
            c1_lanes += wg * x_hat
            if norm.mean is not None:
                c2_lanes += wg
        if gradients.input is not None:
            c1 = tl.sum(c1_lanes, 1)[:, None] / columns
            c2 = tl.sum(c2_lanes, 1)[:, None] / columns
            for start in range(0, columns, BLOCK):
                column = start + lane
                row_mask, column_mask, mask = masks(norm, chosen, row, end, column)
                w = load_scale(norm, group, column, column_mask)
                b = load_coefficient(norm.bias, group, columns, column, column_mask, 0.0)
                x_hat = tl.where(mask, (load_operand(norm, chosen, row, column, mask) - mean) * rstd, 0.0)
                rounded = cast_x_hat(norm, chosen, x_hat)
                g = affine_gradient(norm, chosen, grad_output, rounded, w, b, None, row, column, mask)
                du = (g * w - x_hat * c1 - c2) * rstd
                store_input_gradients(norm, chosen, du, grad_sum, gradients, row, start, column, mask, ROWS, BLOCK)


@triton.jit
def row_norm_strip_kernel(
    norm, chosen, grad_output, DW, DB, strips, programs, program_rows, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Compute partial sums of the gradients of weight and bias for rows too long for `row_norm_backward_kernel`.

    A program processes a strip of BLOCK columns of `program_rows` rows, in order, with sums in registers. The operands
    are read a second time, but no sums over rows of the matrix are needed.
    """
    part = tl.program_id(0) // strips
    group = (part // programs).to(tl.int64)
    columns = norm.columns
    begin = group * norm.rows_per_group + part % programs * program_rows
    end = tl.minimum(begin + program_rows, (group + 1) * norm.rows_per_group)
    column = (tl.program_id(0) % strips).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[None, :]
    column_mask = masks(norm, chosen, begin, end, column)[1]
    w = load_scale(norm, group, column, column_mask)
    b = load_coefficient(norm.bias, group, columns, column, column_mask, 0.0)
    dw = tl.zeros((ROWS, BLOCK), tl.float32)
    db = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in tl.range(begin, end, ROWS, num_stages=chosen.stages):
        row = first + tl.arange(0, ROWS)[:, None]
        row_mask, column_mask, mask = masks(norm, chosen, row, end, column)
        mean, rstd = load_statistics(norm, row, row_mask, ROWS)
        x_hat = tl.where(mask, (load_operand(norm, chosen, row, column, mask) - mean) * rstd, 0.0)
        rounded = cast_x_hat(norm, chosen, x_hat)
        g = affine_gradient(norm, chosen, grad_output, rounded, w, b, None, row, column, mask)
        if DW is not None:
            dw += g * rounded
        if DB is not None:
            db += g
    offset = part.to(tl.int64) * columns + column
    if DW is not None:
        tl.store(DW + offset, tl.sum(dw, 0)[None, :], mask=column_mask)
    if DB is not None:
        tl.store(DB + offset, tl.sum(db, 0)[None, :], mask=column_mask)
