"""The row-norm kernels for rows that fit a tile, read once and kept in registers; and how all are launched.

A program works on tiles of ROWS rows by BLOCK columns. An operand that is None is left out when the kernel is
compiled. Statistics and arithmetic are in float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

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


def _groups(columns: int, *coefficients: Tensor | None) -> int:
    """How many rows of weight and bias there are."""
    return next((t.numel() // columns for t in coefficients if t is not None), 1)


def _forward(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    output: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    eps: float,
    activation: str,
    *,
    residual: Tensor | None = None,
    residual_out: Tensor | None = None,
    seed: Tensor | None = None,
    dropout_p: float = 0.0,
    gate: Tensor | None = None,
    gate_first: bool = False,
    pre_activation: str = "identity",
    weight_offset: float = 0.0,
    cast_before_weight: bool = False,
    given_statistics: bool = False,
) -> None:
    columns = input.shape[-1]
    rows = input.numel() // columns
    groups = _groups(columns, weight, bias)
    tile = forward_tile(columns)
    tiles = triton.cdiv(rows // groups, tile.rows)
    kernel = row_norm_forward_kernel if tile.whole else long_row_norm_forward_kernel
    with device_of(input):
        kernel[(groups * tiles,)](
            input, residual, gate, weight, bias, seed, output, residual_out, mean, rstd,
            columns, places_of(input), places_of(residual), places_of(gate), rows // groups, tiles,
            eps, weight_offset, *dropout_bits(dropout_p), pre_activation, activation, gate_first, cast_before_weight,
            given_statistics, tile.rows, tile.block, num_warps=tile.warps,
        )  # fmt: skip


def _backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    grad_input: Tensor | None,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
    activation: str,
    *,
    grad_residual_out: Tensor | None = None,
    grad_residual: Tensor | None = None,
    seed: Tensor | None = None,
    dropout_p: float = 0.0,
    gate: Tensor | None = None,
    grad_gate: Tensor | None = None,
    output: Tensor | None = None,
    gate_first: bool = False,
    pre_activation: str = "identity",
    weight_offset: float = 0.0,
    cast_before_weight: bool = False,
) -> None:
    columns = input.shape[-1]
    rows = input.numel() // columns
    groups = _groups(columns, weight, bias)
    tile = backward_tile(columns, gate is not None or output is not None)
    programs, program_rows = backward_programs(input.device, rows // groups, tile)
    new = torch.empty if tile.whole else torch.zeros

    def partial(gradient: Tensor | None) -> Tensor | None:
        return None if gradient is None else new((groups, programs, columns), dtype=torch.float32, device=input.device)

    weight_sums, bias_sums = partial(grad_weight), partial(grad_bias)
    kernel = row_norm_backward_kernel if tile.whole else long_row_norm_backward_kernel
    with device_of(input):
        kernel[(groups * programs,)](
            grad_output, grad_residual_out, input, gate, weight, bias, seed, mean, rstd,
            grad_input, grad_residual, grad_gate, output, weight_sums, bias_sums,
            columns, places_of(grad_output), places_of(grad_residual_out), places_of(input), places_of(gate),
            rows // groups, programs, program_rows, weight_offset, *dropout_bits(dropout_p),
            pre_activation, activation, gate_first, cast_before_weight, tile.rows, tile.block, num_warps=tile.warps,
        )  # fmt: skip
    for gradient, sums in ((grad_weight, weight_sums), (grad_bias, bias_sums)):
        if gradient is not None:
            torch.sum(sums, 1, out=gradient.view(groups, columns))


def row_norm_forward(
    input, weight, bias, output, mean, rstd, eps, pre_activation, activation, weight_offset, cast_before_weight,
    given_statistics,
):  # fmt: skip
    """`backends.reference.row_norm` into output, mean (None: not centred) and rstd, which may be there already."""
    _forward(
        input, weight, bias, output, mean, rstd, eps, activation,
        pre_activation=pre_activation, weight_offset=weight_offset, cast_before_weight=cast_before_weight,
        given_statistics=given_statistics,
    )  # fmt: skip


def row_norm_backward(
    grad_output, input, weight, bias, mean, rstd, grad_input, grad_weight, grad_bias, output, eps,
    pre_activation, activation, weight_offset, cast_before_weight,
):  # fmt: skip
    """The gradients of `row_norm`, and its output where there is room."""
    _backward(
        grad_output, input, weight, bias, mean, rstd, grad_input, grad_weight, grad_bias, activation, output=output,
        pre_activation=pre_activation, weight_offset=weight_offset, cast_before_weight=cast_before_weight,
    )  # fmt: skip


def add_row_norm_forward(
    input, residual, weight, bias, seed, output, residual_out, mean, rstd, eps,
    activation, weight_offset, cast_before_weight, dropout_p,
):  # fmt: skip
    """`backends.reference.add_row_norm` into output, residual_out, mean (None: not centred) and rstd."""
    _forward(
        input, weight, bias, output, mean, rstd, eps, activation,
        residual=residual, residual_out=residual_out, seed=seed, dropout_p=dropout_p,
        weight_offset=weight_offset, cast_before_weight=cast_before_weight,
    )  # fmt: skip


def add_row_norm_backward(
    grad_output, grad_residual_out, residual_out, weight, bias, seed, mean, rstd,
    grad_input, grad_residual, grad_weight, grad_bias, eps,
    activation, weight_offset, cast_before_weight, dropout_p,
):  # fmt: skip
    """The gradients of `add_row_norm`; grad_residual is None where it equals grad_input."""
    _backward(
        grad_output, residual_out, weight, bias, mean, rstd, grad_input, grad_weight, grad_bias, activation,
        grad_residual_out=grad_residual_out, grad_residual=grad_residual, seed=seed, dropout_p=dropout_p,
        weight_offset=weight_offset, cast_before_weight=cast_before_weight,
    )  # fmt: skip


def gated_row_norm_forward(input, gate, weight, output, rstd, eps, activation, norm_before_gate):
    """`backends.reference.gated_row_norm` into output and rstd."""
    _forward(
        input, weight, None, output, None, rstd, eps, activation, gate=gate, gate_first=not norm_before_gate
    )  # fmt: skip


def gated_row_norm_backward(
    grad_output, input, gate, weight, rstd, grad_input, grad_gate, grad_weight, eps, activation, norm_before_gate
):
    """The gradients of `gated_row_norm`."""
    _backward(
        grad_output, input, weight, None, None, rstd, grad_input, grad_weight, None, activation,
        gate=gate, grad_gate=grad_gate, gate_first=not norm_before_gate,
    )  # fmt: skip
