"""The inlined functions that the row-norm kernels are composed of.

Each works on a tile of ROWS rows by BLOCK columns, in float32. `row` is (ROWS, 1) and int64, so that offsets do not
overflow; `column` is (1, BLOCK). Code for operands that are None is removed at compile time.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.target_info import is_cuda

from ..blocks import RowNorm
from .activations import activate, as_stored, differentiate
from .launch import Dropout, Rows, Tile, dropout_of, rows_of


class Operands(NamedTuple):
    """The kernel arguments for a `RowNorm`: pointers, strides and numbers."""

    input: Rows
    residual: Rows
    gate: Rows
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    mean: torch.Tensor | None
    rstd: torch.Tensor
    columns: int
    rows_per_group: int
    eps: float
    weight_offset: float
    dropout: Dropout


class Choices(NamedTuple):
    """The compile-time arguments.

    `even` says that tiles cover rows and columns exactly, so that no masks are needed; `stages` is the number of steps
    of a loop in flight.
    """

    pre_activation: tl.constexpr
    activation: tl.constexpr
    gate_before_norm: tl.constexpr
    cast_before_weight: tl.constexpr
    even: tl.constexpr
    stages: tl.constexpr


def operands_of(block: RowNorm, tile: Tile) -> tuple[Operands, Choices, int]:
    """Return the kernel arguments, and the number of groups of rows, each with its own row of weight and bias."""
    options = block.options
    coefficient = block.bias if block.weight is None else block.weight
    groups = 1 if coefficient is None else coefficient.numel() // options.columns
    operands = Operands(
        *map(rows_of, block[:3]),
        block.weight,
        block.bias,
        block.mean,
        block.rstd,
        options.columns,
        block.input.numel() // options.columns // groups,
        options.eps,
        options.weight_offset,
        dropout_of(block.seed, options.dropout_p),
    )
    even = options.columns % tile.block == 0 and operands.rows_per_group % tile.rows == 0
    activations = (as_stored(name, *block[:5]) for name in (options.pre_activation, options.activation))
    chosen = (*activations, options.gate_before_norm, options.cast_before_weight)
    return operands, Choices(*map(tl.constexpr, (*chosen, even, tile.stages))), groups


@triton.jit
def dropout_factor(dropout, row, start, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Return 0 or 1 / (1 - p) for ROWS x BLOCK elements from column `start`; a Philox call serves four columns."""
    quad = (start // 4 + tl.arange(0, BLOCK // 4))[None, :] + tl.zeros((ROWS, 1), tl.int32)
    low = tl.zeros((1, BLOCK // 4), tl.uint32) + row.to(tl.uint32)
    high = tl.zeros((1, BLOCK // 4), tl.uint32) + (row >> 32).to(tl.uint32)
    a, b, c, d = tl.philox(tl.load(dropout.seed), quad.to(tl.uint32), low, high, high * 0)
    bits = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (ROWS, BLOCK))
    threshold = tl.full((), dropout.threshold, tl.int64).to(tl.uint32)
    return tl.where(bits >= threshold, dropout.scale, 0.0)


@triton.jit
def widened(x):
    """Convert to float32. Two bfloat16 numbers in a register are unpacked by one instruction each, instead of three.

    For large operands only. Coefficients use plain conversions, which the compiler moves to the place of use.
    """
    if (x.dtype == tl.bfloat16) and is_cuda():
        y = tl.inline_asm_elementwise(
            "{ shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000; }", "=r,=r,r", [x], tl.float32, is_pure=True, pack=2
        )
    else:
        y = x.to(tl.float32)
    return y


@triton.jit
def load_at(pointers, mask):
    """Load in float32; zero where the mask is off."""
    return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_rows(X, stride, row, column, mask):
    """Load a tile of the matrix X in float32; zero where the mask is off."""
    return widened(tl.load(X + row * stride + column, mask=mask, other=0.0))


@triton.jit
def load(rows, row, column, mask):
    """Load a tile of `launch.Rows` in float32; zero where the mask is off."""
    stride, middle, middle_stride, inner, inner_stride = rows.strides
    start = row // inner // middle * stride + row // inner % middle * middle_stride + row % inner * inner_stride
    return widened(tl.load(rows.data + start + column, mask=mask, other=0.0))


@triton.jit
def store_rows(Y, stride, row, column, mask, value):
    tl.store(Y + row * stride + column, value.to(Y.dtype.element_ty), mask=mask)


@triton.jit
def masks(norm, chosen, row, end, column):
    """Return the masks of the rows before `end`, of the columns, and of the elements of a tile.

    If tiles cover the rows exactly, the masks are constants, and the compiler removes them.
    """
    if chosen.even:
        row_mask, column_mask = tl.full(row.shape, 1, tl.int1), tl.full(column.shape, 1, tl.int1)
    else:
        row_mask, column_mask = row < end, column < norm.columns
    return row_mask, column_mask, row_mask & column_mask


@triton.jit
def load_scale(norm, group, column, column_mask):
    """Return a group's weight plus the offset; 1 without a weight."""
    if norm.weight is None:
        w = tl.full(column.shape, 1.0, tl.float32)
    else:
        w = load_at(norm.weight + group * norm.columns + column, column_mask) + norm.weight_offset
    return w


@triton.jit
def load_coefficient(C, group, columns, column, column_mask, default):
    """Return a group's row of coefficients; `default` if C is None."""
    if C is None:
        c = tl.full(column.shape, default, tl.float32)
    else:
        c = load_at(C + group * columns + column, column_mask)
    return c


@triton.jit
def load_operand(norm, chosen, row, column, mask):
    """Return the input of the norm: pre_activation(x), or x * activation(gate) with a gate before the norm."""
    u = load(norm.input, row, column, mask)
    if chosen.gate_before_norm:
        u = u * activate(load(norm.gate, row, column, mask), chosen.activation)
    elif chosen.pre_activation != "identity":
        # activate(0) may differ from zero, and masked elements must not change the statistics.
        u = tl.where(mask, activate(u, chosen.pre_activation), 0.0)
    return u


@triton.jit
def add_residual(norm, RESIDUAL_OUT, row, start, column, mask, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Store residual + dropout(x), and return the sum as rounded by the store."""
    x = load(norm.input, row, column, mask)
    if norm.dropout.seed is not None:
        x = x * dropout_factor(norm.dropout, row, start, ROWS, BLOCK)
    total = (load(norm.residual, row, column, mask) + x).to(RESIDUAL_OUT.dtype.element_ty)
    tl.store(RESIDUAL_OUT + row * norm.columns + column, total, mask=mask)
    return total.to(tl.float32)


@triton.jit
def store_output(norm, chosen, u, mean, rstd, w, b, Y, row, column, mask):
    """Compute the output from the input of the norm, u, and store it in Y."""
    y = cast_x_hat(norm, chosen, (u - mean) * rstd) * w + b
    if norm.gate.data is None:
        y = activate(y, chosen.activation)
    elif not chosen.gate_before_norm:
        y = y * activate(load(norm.gate, row, column, mask), chosen.activation)
    store_rows(Y, norm.columns, row, column, mask, y)


@triton.jit
def cast_x_hat(norm, chosen, x_hat):
    """Return x_hat, rounded to the input's dtype with `cast_before_weight`."""
    if chosen.cast_before_weight:
        x_hat = x_hat.to(norm.input.data.dtype.element_ty).to(tl.float32)
    return x_hat


@triton.jit
def affine_gradient(norm, chosen, grad_output, rounded, w, b, DGATE, row, column, mask):
    """Return g, the gradient of x_hat * w + b, and store the gate's gradient unless DGATE is None."""
    g = load(grad_output, row, column, mask)
    if norm.gate.data is None:
        if chosen.activation != "identity":
            g = tl.where(mask, g * differentiate(rounded * w + b, chosen.activation), 0.0)
    elif not chosen.gate_before_norm:
        gate = load(norm.gate, row, column, mask)
        if DGATE is not None:
            store_rows(
                DGATE, norm.columns, row, column, mask, g * (rounded * w) * differentiate(gate, chosen.activation)
            )
        g = tl.where(mask, g * activate(gate, chosen.activation), 0.0)
    return g


@triton.jit
def store_input_gradients(
    norm, chosen, du, grad_sum, gradients, row, start, column, mask, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Compute the gradients of input, gate and residual from du, the gradient of the norm's input, and store them."""
    if chosen.gate_before_norm:
        x = load(norm.input, row, column, mask)
        gate = load(norm.gate, row, column, mask)
        store_rows(gradients.gate, norm.columns, row, column, mask, du * x * differentiate(gate, chosen.activation))
        du = du * activate(gate, chosen.activation)
    elif chosen.pre_activation != "identity":
        du = du * differentiate(load(norm.input, row, column, mask), chosen.pre_activation)
    if grad_sum.data is not None:
        du += load(grad_sum, row, column, mask)
    if gradients.residual is not None:
        store_rows(gradients.residual, norm.columns, row, column, mask, du)
        du = du.to(gradients.residual.dtype.element_ty).to(tl.float32)
        du = du * dropout_factor(norm.dropout, row, start, ROWS, BLOCK)
    store_rows(gradients.input, norm.columns, row, column, mask, du)


@triton.jit
def load_statistics(norm, row, row_mask, ROWS: tl.constexpr):
    rstd = load_at(norm.rstd + row, row_mask)
    if norm.mean is None:
        mean = tl.zeros((ROWS, 1), tl.float32)
    else:
        mean = load_at(norm.mean + row, row_mask)
    return mean, rstd


@triton.jit
def store_statistics(norm, mean, rstd, row, row_mask):
    if norm.mean is not None:
        tl.store(norm.mean + row, mean, mask=row_mask)
    tl.store(norm.rstd + row, rstd, mask=row_mask)
