"""The row-norm kernels for rows that fit a tile, read once and kept in registers; and how all are launched.

A program works on tiles of ROWS rows by BLOCK columns. An operand that is None is left out when the kernel is
compiled. Statistics and arithmetic are in float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..blocks import RowNorm, RowNormGradients
from .activations import activate
from .launch import backward_programs, backward_tile, device_of, dropout_bits, forward_tile, places_of
from .long_row_norm import long_row_norm_backward_kernel, long_row_norm_forward_kernel
from .row_norm_tiles import (
    add_residual,
    finish,
    load_coefficient,
    load_operand,
    load_statistics,
    norm_gradient,
    store_input_gradients,
    store_rows,
    store_statistics,
)


@triton.jit
def row_norm_forward_kernel(
    X, RESIDUAL, GATE, W, B, SEED, Y, RESIDUAL_OUT, MEAN, RSTD,
    columns, x_places, residual_places, gate_places, rows_per_group, tiles,
    eps, weight_offset, threshold, scale,
    PRE_ACTIVATION: tl.constexpr, ACTIVATION: tl.constexpr, GATE_FIRST: tl.constexpr, CAST: tl.constexpr,
    GIVEN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Y = activation(x_hat * (W + offset) + B) and the row statistics; see `backends.reference` for the family.

    The grid is `tiles` programs for each group of rows_per_group rows.
    """
    # A tile never crosses a group, so that its rows share one row of weight and bias.
    group = (tl.program_id(0) // tiles).to(tl.int64)
    first = group * rows_per_group + tl.program_id(0) % tiles * ROWS
    row = first + tl.arange(0, ROWS)[:, None]
    live = row < (group + 1) * rows_per_group
    column = tl.arange(0, BLOCK)[None, :]
    mask = live & (column < columns)
    if RESIDUAL is None:
        u = load_operand(X, x_places, GATE, gate_places, row, column, mask, PRE_ACTIVATION, ACTIVATION, GATE_FIRST)
    else:
        u = add_residual(
            X, x_places, RESIDUAL, residual_places, RESIDUAL_OUT, SEED, row, 0, column, mask, columns,
            threshold, scale, ROWS, BLOCK,
        )  # fmt: skip
    if GIVEN:
        mean, rstd = load_statistics(MEAN, RSTD, row, live, ROWS)
    else:
        if MEAN is None:
            mean = tl.zeros((ROWS, 1), tl.float32)
            variance = tl.sum(u * u, 1)[:, None] / columns
        else:
            mean = tl.sum(u, 1)[:, None] / columns
            centered = tl.where(mask, u - mean, 0.0)
            variance = tl.sum(centered * centered, 1)[:, None] / columns
        rstd = 1.0 / tl.sqrt_rn(variance + eps)
        store_statistics(MEAN, RSTD, mean, rstd, row, live)
    w = load_coefficient(W, group, columns, column, 1.0) + weight_offset
    b = load_coefficient(B, group, columns, column, 0.0)
    finish(u, mean, rstd, w, b, GATE, gate_places, Y, row, column, mask, columns, ACTIVATION, GATE_FIRST, CAST)


@triton.jit
def row_norm_backward_kernel(
    DY, DH, X, GATE, W, B, SEED, MEAN, RSTD, DX, DRESIDUAL, DGATE, Y, DW, DB,
    columns, dy_places, dh_places, x_places, gate_places, rows_per_group, programs, program_rows,
    weight_offset, threshold, scale,
    PRE_ACTIVATION: tl.constexpr, ACTIVATION: tl.constexpr, GATE_FIRST: tl.constexpr, CAST: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradients of the block, and its output again where there is room for it.

    Each of a group's `programs` programs takes `program_rows` rows, in order.

    DW and DB are partial sums, one row of columns a program, in float32, which the caller adds up.
    """
    group = (tl.program_id(0) // programs).to(tl.int64)
    begin = group * rows_per_group + tl.program_id(0) % programs * program_rows
    end = tl.minimum(begin + program_rows, (group + 1) * rows_per_group)
    partial = tl.program_id(0).to(tl.int64) * columns
    column = tl.arange(0, BLOCK)[None, :]
    w = load_coefficient(W, group, columns, column, 1.0) + weight_offset
    b = load_coefficient(B, group, columns, column, 0.0)
    dw = tl.zeros((ROWS, BLOCK), tl.float32)
    db = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(begin, end, ROWS):
        row = first + tl.arange(0, ROWS)[:, None]
        live = row < end
        mask = live & (column < columns)
        mean, rstd = load_statistics(MEAN, RSTD, row, live, ROWS)
        u = load_operand(X, x_places, GATE, gate_places, row, column, mask, PRE_ACTIVATION, ACTIVATION, GATE_FIRST)
        g, x_hat, seen = norm_gradient(
            DY, dy_places, u, mean, rstd, w, b, GATE, gate_places, DGATE, row, column, mask, columns,
            ACTIVATION, GATE_FIRST, CAST, DGATE is not None, X.dtype.element_ty,
        )  # fmt: skip
        if Y is not None:
            store_rows(Y, columns, row, column, mask, activate(seen * w + b, ACTIVATION))
        if DW is not None:
            dw += g * seen
        if DB is not None:
            db += g
        if DX is not None:
            wg = g * w
            du = wg - x_hat * (tl.sum(wg * x_hat, 1)[:, None] / columns)
            if MEAN is not None:
                du -= tl.sum(wg, 1)[:, None] / columns
            store_input_gradients(
                du * rstd, X, x_places, GATE, gate_places, SEED, DH, dh_places, DX, DRESIDUAL, DGATE,
                row, 0, column, mask, columns, threshold, scale, PRE_ACTIVATION, ACTIVATION, GATE_FIRST, ROWS, BLOCK,
            )  # fmt: skip
    if DW is not None:
        tl.store(DW + partial + column, tl.sum(dw, 0)[None, :], mask=column < columns)
    if DB is not None:
        tl.store(DB + partial + column, tl.sum(db, 0)[None, :], mask=column < columns)


def _groups(block: RowNorm) -> int:
    """How many rows of weight and bias there are."""
    return next((t.numel() // block.options.columns for t in (block.weight, block.bias) if t is not None), 1)


def row_norm_forward(
    block: RowNorm, output: Tensor, residual_out: Tensor | None, given_statistics: bool = False
) -> None:
    """`backends.reference.row_norm_forward`."""
    input, residual, gate, weight, bias, seed, mean, rstd, options = block
    columns, groups = options.columns, _groups(block)
    rows = input.numel() // columns
    tile = forward_tile(columns)
    tiles = triton.cdiv(rows // groups, tile.rows)
    kernel = row_norm_forward_kernel if tile.whole else long_row_norm_forward_kernel
    with device_of(input):
        kernel[(groups * tiles,)](
            input, residual, gate, weight, bias, seed, output, residual_out, mean, rstd,
            columns, places_of(input), places_of(residual), places_of(gate), rows // groups, tiles,
            options.eps, options.weight_offset, *dropout_bits(options.dropout_p), options.pre_activation,
            options.activation, options.gate_first, options.cast_before_weight,
            given_statistics, tile.rows, tile.block, num_warps=tile.warps,
        )  # fmt: skip


def row_norm_backward(
    block: RowNorm,
    grad_output: Tensor,
    grad_residual_out: Tensor | None,
    gradients: RowNormGradients,
    output: Tensor | None = None,
) -> None:
    """`backends.reference.row_norm_backward`."""
    input, _, gate, weight, bias, seed, mean, rstd, options = block
    columns, groups = options.columns, _groups(block)
    rows = input.numel() // columns
    tile = backward_tile(columns, gate is not None or output is not None)
    programs, program_rows = backward_programs(input.device, rows // groups, tile)
    new = torch.empty if tile.whole else torch.zeros

    def partial(gradient: Tensor | None) -> Tensor | None:
        return None if gradient is None else new((groups, programs, columns), dtype=torch.float32, device=input.device)

    weight_sums, bias_sums = partial(gradients.weight), partial(gradients.bias)
    kernel = row_norm_backward_kernel if tile.whole else long_row_norm_backward_kernel
    with device_of(input):
        kernel[(groups * programs,)](
            grad_output, grad_residual_out, input, gate, weight, bias, seed, mean, rstd,
            *gradients[:3], output, weight_sums, bias_sums,
            columns, places_of(grad_output), places_of(grad_residual_out), places_of(input), places_of(gate),
            rows // groups, programs, program_rows, options.weight_offset, *dropout_bits(options.dropout_p),
            options.pre_activation, options.activation, options.gate_first, options.cast_before_weight,
            tile.rows, tile.block, num_warps=tile.warps,
        )  # fmt: skip
    for gradient, sums in ((gradients.weight, weight_sums), (gradients.bias, bias_sums)):
        if gradient is not None:
            torch.sum(sums, 1, out=gradient.view(groups, columns))
