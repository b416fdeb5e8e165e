"""The row-norm kernels for rows that do not fit a tile: walked in blocks, and read twice."""

import triton
import triton.language as tl

from .activations import activate
from .row_norm_tiles import (
    add_residual,
    affine_gradient,
    finish,
    load_coefficient,
    load_operand,
    load_rows,
    load_statistics,
    seen_by_weight,
    store_input_gradients,
    store_rows,
    store_statistics,
)


@triton.jit
def long_row_norm_forward_kernel(
    norm, chosen, Y, RESIDUAL_OUT, tiles, GIVEN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """As `row_norm_forward_kernel`, for rows of any length."""
    # A tile never crosses a group, so that its rows share one row of weight and bias.
    group = (tl.program_id(0) // tiles).to(tl.int64)
    columns = norm.columns
    row = group * norm.rows_per_group + tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)[:, None]
    live = row < (group + 1) * norm.rows_per_group
    lane = tl.arange(0, BLOCK)[None, :]
    if GIVEN:
        mean, rstd = load_statistics(norm, row, live, ROWS)
    else:
        # Welford's update in every lane, with blocks for samples; then one merge of the lanes.
        lane_mean = tl.zeros((ROWS, BLOCK), tl.float32)
        lane_m2 = tl.zeros((ROWS, BLOCK), tl.float32)
        for start in range(0, columns, BLOCK):
            column = start + lane
            mask = live & (column < columns)
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
            apart = lane_mean - mean
            variance = tl.sum(lane_m2 + count * apart * apart, 1)[:, None] / columns
        rstd = 1.0 / tl.sqrt_rn(variance + norm.eps)
        store_statistics(norm, mean, rstd, row, live)
    # What was stored above is read again below, by other threads of this program perhaps.
    tl.debug_barrier()
    for start in range(0, columns, BLOCK):
        column = start + lane
        mask = live & (column < columns)
        if norm.residual.data is None:
            u = load_operand(norm, chosen, row, column, mask)
        else:
            u = load_rows(RESIDUAL_OUT, columns, row, column, mask)
        w = load_coefficient(norm.weight, group, columns, column, 1.0) + norm.weight_offset
        b = load_coefficient(norm.bias, group, columns, column, 0.0)
        finish(norm, chosen, u, mean, rstd, w, b, Y, row, column, mask)


@triton.jit
def add_to_partial(PARTIAL, offset, column, columns, value):
    where = PARTIAL + offset + column
    total = tl.load(where, mask=column < columns, other=0.0) + tl.sum(value, 0)[None, :]
    tl.store(where, total, mask=column < columns)


@triton.jit
def long_row_norm_backward_kernel(
    norm, chosen, grad_output, grad_sum, gradients, Y, programs, program_rows, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """As `row_norm_backward_kernel`, for rows of any length. The caller has zeroed the partial sums."""
    group = (tl.program_id(0) // programs).to(tl.int64)
    columns = norm.columns
    begin = group * norm.rows_per_group + tl.program_id(0) % programs * program_rows
    end = tl.minimum(begin + program_rows, (group + 1) * norm.rows_per_group)
    partial = tl.program_id(0).to(tl.int64) * columns
    lane = tl.arange(0, BLOCK)[None, :]
    for first in range(begin, end, ROWS):
        row = first + tl.arange(0, ROWS)[:, None]
        live = row < end
        mean, rstd = load_statistics(norm, row, live, ROWS)
        c1_lanes = tl.zeros((ROWS, BLOCK), tl.float32)
        c2_lanes = tl.zeros((ROWS, BLOCK), tl.float32)
        for start in range(0, columns, BLOCK):
            column = start + lane
            mask = live & (column < columns)
            w = load_coefficient(norm.weight, group, columns, column, 1.0) + norm.weight_offset
            b = load_coefficient(norm.bias, group, columns, column, 0.0)
            x_hat = tl.where(mask, (load_operand(norm, chosen, row, column, mask) - mean) * rstd, 0.0)
            seen = seen_by_weight(norm, chosen, x_hat)
            g = affine_gradient(norm, chosen, grad_output, seen, w, b, gradients.gate, row, column, mask)
            if Y is not None:
                store_rows(Y, columns, row, column, mask, activate(seen * w + b, chosen.activation))
            if gradients.weight is not None:
                add_to_partial(gradients.weight, partial, column, columns, g * seen)
            if gradients.bias is not None:
                add_to_partial(gradients.bias, partial, column, columns, g)
            wg = g * w
            c1_lanes += wg * x_hat
            if norm.mean is not None:
                c2_lanes += wg
        if gradients.input is not None:
            c1 = tl.sum(c1_lanes, 1)[:, None] / columns
            c2 = tl.sum(c2_lanes, 1)[:, None] / columns
            for start in range(0, columns, BLOCK):
                column = start + lane
                mask = live & (column < columns)
                w = load_coefficient(norm.weight, group, columns, column, 1.0) + norm.weight_offset
                b = load_coefficient(norm.bias, group, columns, column, 0.0)
                x_hat = tl.where(mask, (load_operand(norm, chosen, row, column, mask) - mean) * rstd, 0.0)
                seen = seen_by_weight(norm, chosen, x_hat)
                g = affine_gradient(norm, chosen, grad_output, seen, w, b, None, row, column, mask)
                du = (g * w - x_hat * c1 - c2) * rstd
                store_input_gradients(norm, chosen, du, grad_sum, gradients, row, start, column, mask, ROWS, BLOCK)
