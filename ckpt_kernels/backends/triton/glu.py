"""The glu kernels: activation(gate) * value, element by element, and how they are launched.

A program works on a tile of ROWS rows by BLOCK columns. Where gate and value take turns in memory (TURNS), 2 * BLOCK
elements are read at once and taken apart.
"""

import triton
import triton.language as tl
from torch import Tensor

from .activations import activate, differentiate
from .launch import device_of, element_tile
from .row_norm_tiles import load_rows, store_rows


@triton.jit
def tile_of(rows, columns, column_tiles, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """This program's rows (ROWS, 1), first column, columns (1, BLOCK), and which of all these there are."""
    row = (tl.program_id(0) // column_tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    start = (tl.program_id(0) % column_tiles).to(tl.int64) * BLOCK
    column = start + tl.arange(0, BLOCK)[None, :]
    return row, start, column, (row < rows) & (column < columns)


@triton.jit
def load_gate_and_value(
    GATE, VALUE, gate_stride, value_stride, row, start, column, mask, rows, columns,
    TURNS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    if TURNS:
        both = 2 * start + tl.arange(0, 2 * BLOCK)[None, :]
        mixed = load_rows(GATE, gate_stride, row, both, (row < rows) & (both < 2 * columns))
        gate, value = tl.split(tl.reshape(mixed, (ROWS, BLOCK, 2)))
    else:
        gate = load_rows(GATE, gate_stride, row, column, mask)
        value = load_rows(VALUE, value_stride, row, column, mask)
    return gate, value


@triton.jit
def glu_forward_kernel(
    GATE, VALUE, Y, rows, columns, gate_stride, value_stride, y_stride, column_tiles,
    ACTIVATION: tl.constexpr, TURNS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, start, column, mask = tile_of(rows, columns, column_tiles, ROWS, BLOCK)
    gate, value = load_gate_and_value(
        GATE, VALUE, gate_stride, value_stride, row, start, column, mask, rows, columns, TURNS, ROWS, BLOCK
    )
    store_rows(Y, y_stride, row, column, mask, activate(gate, ACTIVATION) * value)


@triton.jit
def glu_backward_kernel(
    DY, GATE, VALUE, DGATE, DVALUE, Y, rows, columns, dy_stride, gate_stride, value_stride, dgate_stride, dvalue_stride,
    y_stride, column_tiles, ACTIVATION: tl.constexpr, TURNS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, start, column, mask = tile_of(rows, columns, column_tiles, ROWS, BLOCK)
    gate, value = load_gate_and_value(
        GATE, VALUE, gate_stride, value_stride, row, start, column, mask, rows, columns, TURNS, ROWS, BLOCK
    )
    g = load_rows(DY, dy_stride, row, column, mask)
    dgate = g * value * differentiate(gate, ACTIVATION)
    factor = activate(gate, ACTIVATION)
    dvalue = g * factor
    if Y is not None:
        store_rows(Y, y_stride, row, column, mask, factor * value)
    if TURNS:
        both = 2 * start + tl.arange(0, 2 * BLOCK)[None, :]
        there = (row < rows) & (both < 2 * columns)
        store_rows(DGATE, dgate_stride, row, both, there, tl.reshape(tl.join(dgate, dvalue), (ROWS, 2 * BLOCK)))
    else:
        if DGATE is not None:
            store_rows(DGATE, dgate_stride, row, column, mask, dgate)
        if DVALUE is not None:
            store_rows(DVALUE, dvalue_stride, row, column, mask, dvalue)


def _stride(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.stride(0)


def _take_turns(gate: Tensor) -> bool:
    """Whether gate and value alternate in memory: they are every other element of their rows."""
    return gate.shape[1] > 1 and gate.stride(1) == 2


def glu_forward(gate: Tensor, value: Tensor, output: Tensor, activation: str) -> None:
    """`backends.reference.glu` into output."""
    rows, columns = gate.shape
    tile = element_tile(columns)
    column_tiles = triton.cdiv(columns, tile.block)
    with device_of(gate):
        glu_forward_kernel[(triton.cdiv(rows, tile.rows) * column_tiles,)](
            gate, value, output, rows, columns, gate.stride(0), value.stride(0), output.stride(0), column_tiles,
            activation, _take_turns(gate), tile.rows, tile.block, num_warps=tile.warps,
        )  # fmt: skip


def glu_backward(
    grad_output: Tensor,
    gate: Tensor,
    value: Tensor,
    grad_gate: Tensor | None,
    grad_value: Tensor | None,
    output: Tensor | None,
    activation: str,
) -> None:
    """The gradients of `glu`, and its output where there is room."""
    rows, columns = gate.shape
    tile = element_tile(columns)
    column_tiles = triton.cdiv(columns, tile.block)
    with device_of(gate):
        glu_backward_kernel[(triton.cdiv(rows, tile.rows) * column_tiles,)](
            grad_output, gate, value, grad_gate, grad_value, output, rows, columns,
            grad_output.stride(0), gate.stride(0), value.stride(0), _stride(grad_gate), _stride(grad_value),
            _stride(output), column_tiles, activation, _take_turns(gate), tile.rows, tile.block, num_warps=tile.warps,
        )  # fmt: skip
