"""The row-norm kernels for rows that do not fit a tile: walked in blocks, and read twice."""

import triton
import triton.language as tl

from .activations import activate
from .row_norm_tiles import (
    add_residual,
    finish,
    load_coefficient,
    load_operand,
    load_rows,
    load_statistics,
    norm_gradient,
    store_input_gradients,
    store_rows,
    store_statistics,
)


@triton.jit
def long_row_norm_forward_kernel(
    X, RESIDUAL, GATE, W, B, SEED, Y, RESIDUAL_OUT, MEAN, RSTD,
    columns, x_places, residual_places, gate_places, rows_per_group, tiles,
    eps, weight_offset, threshold, scale,
    PRE_ACTIVATION: tl.constexpr, ACTIVATION: tl.constexpr, GATE_FIRST: tl.constexpr, CAST: tl.constexpr,
    GIVEN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """As `row_norm_forward_kernel`, for rows of any length."""
    # A tile never crosses a group, so that its rows share one row of weight and bias.
    group = (tl.program_id(0) // tiles).to(tl.int64)
    first = group * rows_per_group + tl.program_id(0) % tiles * ROWS
    row = first + tl.arange(0, ROWS)[:, None]
    live = row < (group + 1) * rows_per_group
    lane = tl.arange(0, BLOCK)[None, :]
    if GIVEN:
        mean, rstd = load_statistics(MEAN, RSTD, row, live, ROWS)
    else:
        # Welford's update in every lane, with blocks for samples; then one merge of the lanes.
        lane_mean = tl.zeros((ROWS, BLOCK), tl.float32)
        lane_m2 = tl.zeros((ROWS, BLOCK), tl.float32)
        for start in range(0, columns, BLOCK):
            column = start + lane
            mask = live & (column < columns)
            if RESIDUAL is None:
                u = load_operand(
                    X, x_places, GATE, gate_places, row, column, mask, PRE_ACTIVATION, ACTIVATION, GATE_FIRST
                )  # fmt: skip
            else:
                u = add_residual(
                    X, x_places, RESIDUAL, residual_places, RESIDUAL_OUT, SEED, row, start, column, mask, columns,
                    threshold, scale, ROWS, BLOCK,
                )  # fmt: skip
            if MEAN is None:
                lane_m2 += u * u
            else:
                delta = tl.where(mask, u - lane_mean, 0.0)
                lane_mean += delta / (start // BLOCK + 1)
                lane_m2 += delta * tl.where(mask, u - lane_mean, 0.0)
        if MEAN is None:
            mean = tl.zeros((ROWS, 1), tl.float32)
            variance = tl.sum(lane_m2, 1)[:, None] / columns
        else:
            count = ((columns - lane + BLOCK - 1) // BLOCK).to(tl.float32)
            mean = tl.sum(lane_mean * count, 1)[:, None] / columns
            apart = lane_mean - mean
            variance = tl.sum(lane_m2 + count * apart * apart, 1)[:, None] / columns
        rstd = 1.0 / tl.sqrt_rn(variance + eps)
        store_statistics(MEAN, RSTD, mean, rstd, row, live)
    # What was stored above is read again below, by other threads of this program perhaps.
    tl.debug_barrier()
    for start in range(0, columns, BLOCK):
        column = start + lane
        mask = live & (column < columns)
        if RESIDUAL is None:
            u = load_operand(X, x_places, GATE, gate_places, row, column, mask, PRE_ACTIVATION, ACTIVATION, GATE_FIRST)
        else:
            u = load_rows(RESIDUAL_OUT, columns, row, column, mask)
        w = load_coefficient(W, group, columns, column, 1.0) + weight_offset
        b = load_coefficient(B, group, columns, column, 0.0)
        finish(u, mean, rstd, w, b, GATE, gate_places, Y, row, column, mask, columns, ACTIVATION, GATE_FIRST, CAST)


@triton.jit
def add_to_partial(PARTIAL, offset, column, columns, value):
    where = PARTIAL + offset + column
    total = tl.load(where, mask=column < columns, other=0.0) + tl.sum(value, 0)[None, :]
    tl.store(where, total, mask=column < columns)


@triton.jit
def long_row_norm_backward_kernel(
    DY, DH, X, GATE, W, B, SEED, MEAN, RSTD, DX, DRESIDUAL, DGATE, Y, DW, DB,
    columns, dy_places, dh_places, x_places, gate_places, rows_per_group, programs, program_rows,
    weight_offset, threshold, scale,
    PRE_ACTIVATION: tl.constexpr, ACTIVATION: tl.constexpr, GATE_FIRST: tl.constexpr, CAST: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """As `row_norm_backward_kernel`, for rows of any length. The caller has zeroed the partial sums."""
    group = (tl.program_id(0) // programs).to(tl.int64)
    begin = group * rows_per_group + tl.program_id(0) % programs * program_rows
    end = tl.minimum(begin + program_rows, (group + 1) * rows_per_group)
    partial = tl.program_id(0).to(tl.int64) * columns
    lane = tl.arange(0, BLOCK)[None, :]
    for first in range(begin, end, ROWS):
        row = first + tl.arange(0, ROWS)[:, None]
        live = row < end
        mean, rstd = load_statistics(MEAN, RSTD, row, live, ROWS)
        tilt_lanes = tl.zeros((ROWS, BLOCK), tl.float32)
        sum_lanes = tl.zeros((ROWS, BLOCK), tl.float32)
        for start in range(0, columns, BLOCK):
            column = start + lane
            mask = live & (column < columns)
            w = load_coefficient(W, group, columns, column, 1.0) + weight_offset
            b = load_coefficient(B, group, columns, column, 0.0)
            u = load_operand(X, x_places, GATE, gate_places, row, column, mask, PRE_ACTIVATION, ACTIVATION, GATE_FIRST)
            g, x_hat, seen = norm_gradient(
                DY, dy_places, u, mean, rstd, w, b, GATE, gate_places, DGATE, row, column, mask, columns,
                ACTIVATION, GATE_FIRST, CAST, DGATE is not None, X.dtype.element_ty,
            )  # fmt: skip
            if Y is not None:
                store_rows(Y, columns, row, column, mask, activate(seen * w + b, ACTIVATION))
            if DW is not None:
                add_to_partial(DW, partial, column, columns, g * seen)
            if DB is not None:
                add_to_partial(DB, partial, column, columns, g)
            wg = g * w
            tilt_lanes += wg * x_hat
            if MEAN is not None:
                sum_lanes += wg
        if DX is not None:
            tilt = tl.sum(tilt_lanes, 1)[:, None] / columns
            average = tl.sum(sum_lanes, 1)[:, None] / columns
            for start in range(0, columns, BLOCK):
                column = start + lane
                mask = live & (column < columns)
                w = load_coefficient(W, group, columns, column, 1.0) + weight_offset
                b = load_coefficient(B, group, columns, column, 0.0)
                u = load_operand(
                    X, x_places, GATE, gate_places, row, column, mask, PRE_ACTIVATION, ACTIVATION, GATE_FIRST
                )  # fmt: skip
                g, x_hat, seen = norm_gradient(
                    DY, dy_places, u, mean, rstd, w, b, GATE, gate_places, DGATE, row, column, mask, columns,
                    ACTIVATION, GATE_FIRST, CAST, False, X.dtype.element_ty,
                )  # fmt: skip
                store_input_gradients(
                    (g * w - x_hat * tilt - average) * rstd, X, x_places, GATE, gate_places, SEED, DH, dh_places,
                    DX, DRESIDUAL, DGATE, row, start, column, mask, columns, threshold, scale,
                    PRE_ACTIVATION, ACTIVATION, GATE_FIRST, ROWS, BLOCK,
                )  # fmt: skip
