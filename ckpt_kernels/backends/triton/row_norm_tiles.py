"""The pieces that the row-norm kernels are composed from.

Each works on a tile of ROWS rows by BLOCK columns, in float32; `row` is (ROWS, 1) and int64, so that no offset
overflows, `column` is (1, BLOCK). An operand that is None is left out when the kernel is compiled.
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
    """A `RowNorm` as the kernels take it: pointers, with strides where rows need not follow each other, and numbers."""

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
    """What is compiled for."""

    pre_activation: tl.constexpr
    activation: tl.constexpr
    gate_before_norm: tl.constexpr
    cast_before_weight: tl.constexpr
    even: tl.constexpr
    stages: tl.constexpr


def operands_of(block: RowNorm, tile: Tile) -> tuple[Operands, Choices, int]:
    """And how many groups of rows there are, each with a row of weight and bias of its own."""
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
    """0 or 1 / (1 - p) for ROWS x BLOCK elements from column `start`; one Philox call makes four columns."""
    quad = (start // 4 + tl.arange(0, BLOCK // 4))[None, :] + tl.zeros((ROWS, 1), tl.int32)
    low = tl.zeros((1, BLOCK // 4), tl.uint32) + row.to(tl.uint32)
    high = tl.zeros((1, BLOCK // 4), tl.uint32) + (row >> 32).to(tl.uint32)
    a, b, c, d = tl.philox(tl.load(dropout.seed), quad.to(tl.uint32), low, high, high * 0)
    bits = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (ROWS, BLOCK))
    threshold = tl.full((), dropout.threshold, tl.int64).to(tl.uint32)
    return tl.where(bits >= threshold, dropout.scale, 0.0)


@triton.jit
def widened(x):
    """In float32. Two numbers of bfloat16 that share a register are taken apart by one instruction each, not three.

    For large operands only: coefficients are widened when they are needed, for which the compiler finds a better place.
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
    """What lies there, in float32; zero where the mask is off."""
    return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_rows(X, stride, row, column, mask):
    """A tile of X in float32; zero where the mask is off."""
    return widened(tl.load(X + row * stride + column, mask=mask, other=0.0))


@triton.jit
def load(rows, row, column, mask):
    """The same of `launch.Rows`."""
    stride, middle, middle_stride, inner, inner_stride = rows.strides
    start = row // inner // middle * stride + row // inner % middle * middle_stride + row % inner * inner_stride
    return widened(tl.load(rows.data + start + column, mask=mask, other=0.0))


@triton.jit
def store_rows(Y, stride, row, column, mask, value):
    tl.store(Y + row * stride + column, value.to(Y.dtype.element_ty), mask=mask)


@triton.jit
def masks(norm, chosen, row, end, column):
    """Which rows, columns and elements of a tile there are, rows from `end` on being others'.

    Where tiles fill the rows exactly, the compiler knows that all are there, and leaves the masks out.
    """
    if chosen.even:
        live, there = tl.full(row.shape, 1, tl.int1), tl.full(column.shape, 1, tl.int1)
    else:
        live, there = row < end, column < norm.columns
    return live, there, live & there


@triton.jit
def load_scale(norm, group, column, there):
    """What is multiplied by: a group's weight, to which the offset belongs, or 1."""
    if norm.weight is None:
        w = tl.full(column.shape, 1.0, tl.float32)
    else:
        w = load_at(norm.weight + group * norm.columns + column, there) + norm.weight_offset
    return w


@triton.jit
def load_coefficient(C, group, columns, column, there, default):
    """A group's row of coefficients; `default` where there are none."""
    if C is None:
        c = tl.full(column.shape, default, tl.float32)
    else:
        c = load_at(C + group * columns + column, there)
    return c


@triton.jit
def load_operand(norm, chosen, row, column, mask):
    """What is normalised: pre_activation(x), or x * activation(gate) where the gate comes first."""
    u = load(norm.input, row, column, mask)
    if chosen.gate_before_norm:
        u = u * activate(load(norm.gate, row, column, mask), chosen.activation)
    elif chosen.pre_activation != "identity":
        # Off the mask an activation may not be zero, and the statistics must not see it.
        u = tl.where(mask, activate(u, chosen.pre_activation), 0.0)
    return u


@triton.jit
def add_residual(norm, RESIDUAL_OUT, row, start, column, mask, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """residual + dropout(x), stored, and returned as stored."""
    x = load(norm.input, row, column, mask)
    if norm.dropout.seed is not None:
        x = x * dropout_factor(norm.dropout, row, start, ROWS, BLOCK)
    total = (load(norm.residual, row, column, mask) + x).to(RESIDUAL_OUT.dtype.element_ty)
    tl.store(RESIDUAL_OUT + row * norm.columns + column, total, mask=mask)
    return total.to(tl.float32)


@triton.jit
def finish(norm, chosen, u, mean, rstd, w, b, Y, row, column, mask):
    """The output from the normalised operand, stored."""
    y = seen_by_weight(norm, chosen, (u - mean) * rstd) * w + b
    if norm.gate.data is None:
        y = activate(y, chosen.activation)
    elif not chosen.gate_before_norm:
        y = y * activate(load(norm.gate, row, column, mask), chosen.activation)
    store_rows(Y, norm.columns, row, column, mask, y)


@triton.jit
def seen_by_weight(norm, chosen, x_hat):
    if chosen.cast_before_weight:
        x_hat = x_hat.to(norm.input.data.dtype.element_ty).to(tl.float32)
    return x_hat


@triton.jit
def affine_gradient(norm, chosen, grad_output, seen, w, b, DGATE, row, column, mask):
    """The gradient before weight and bias, g, of a tile; the gate's gradient stored, where there is DGATE."""
    g = load(grad_output, row, column, mask)
    if norm.gate.data is None:
        if chosen.activation != "identity":
            g = tl.where(mask, g * differentiate(seen * w + b, chosen.activation), 0.0)
    elif not chosen.gate_before_norm:
        gate = load(norm.gate, row, column, mask)
        if DGATE is not None:
            store_rows(DGATE, norm.columns, row, column, mask, g * (seen * w) * differentiate(gate, chosen.activation))
        g = tl.where(mask, g * activate(gate, chosen.activation), 0.0)
    return g


@triton.jit
def store_input_gradients(
    norm, chosen, du, grad_sum, gradients, row, start, column, mask, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """From the gradient of what was normalised to the gradients of what it was made from, stored."""
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
def load_statistics(norm, row, live, ROWS: tl.constexpr):
    rstd = load_at(norm.rstd + row, live)
    if norm.mean is None:
        mean = tl.zeros((ROWS, 1), tl.float32)
    else:
        mean = load_at(norm.mean + row, live)
    return mean, rstd


@triton.jit
def store_statistics(norm, mean, rstd, row, live):
    if norm.mean is not None:
        tl.store(norm.mean + row, mean, mask=live)
    tl.store(norm.rstd + row, rstd, mask=live)
