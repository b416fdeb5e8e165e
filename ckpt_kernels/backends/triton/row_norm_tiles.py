"""The pieces that the row-norm kernels are composed from.

Each works on a tile of ROWS rows by BLOCK columns, in float32; `row` is (ROWS, 1) and int64, so that no offset
overflows, `column` is (1, BLOCK). An operand that is None is left out when the kernel is compiled.
"""

import triton
import triton.language as tl

from .activations import activate, differentiate


@triton.jit
def dropout_factor(SEED, row, start, threshold, scale, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """0 or 1 / (1 - p) for ROWS x BLOCK elements from column `start`; one Philox call makes four columns."""
    quad = (start // 4 + tl.arange(0, BLOCK // 4))[None, :] + tl.zeros((ROWS, 1), tl.int32)
    low = tl.zeros((1, BLOCK // 4), tl.uint32) + row.to(tl.uint32)
    high = tl.zeros((1, BLOCK // 4), tl.uint32) + (row >> 32).to(tl.uint32)
    a, b, c, d = tl.philox(tl.load(SEED), quad.to(tl.uint32), low, high, high * 0)
    bits = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (ROWS, BLOCK))
    return tl.where(bits.to(tl.int64) >= threshold, scale, 0.0)


@triton.jit
def load_rows(X, stride, row, column, mask):
    """A tile of X in float32; zero where the mask is off."""
    return tl.load(X + row * stride + column, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_placed_rows(X, places, row, column, mask):
    """The same of rows that lie on three levels; see `launch.places_of`."""
    stride, middle, middle_stride, inner, inner_stride = places
    start = row // inner // middle * stride + row // inner % middle * middle_stride + row % inner * inner_stride
    return tl.load(X + start + column, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_rows(Y, stride, row, column, mask, value):
    tl.store(Y + row * stride + column, value.to(Y.dtype.element_ty), mask=mask)


@triton.jit
def load_coefficient(W, group, columns, column, default):
    """A group's weight or bias; `default` where there is none."""
    if W is None:
        w = tl.full(column.shape, default, tl.float32)
    else:
        w = tl.load(W + group * columns + column, mask=column < columns, other=0.0).to(tl.float32)
    return w


@triton.jit
def load_operand(
    X, x_places, GATE, gate_places, row, column, mask,
    PRE_ACTIVATION: tl.constexpr, ACTIVATION: tl.constexpr, GATE_FIRST: tl.constexpr,
):  # fmt: skip
    """What is normalised: pre_activation(x), or x * activation(gate) where the gate comes first."""
    u = load_placed_rows(X, x_places, row, column, mask)
    if GATE_FIRST:
        u = u * activate(load_placed_rows(GATE, gate_places, row, column, mask), ACTIVATION)
    elif PRE_ACTIVATION != "identity":
        # Off the mask an activation may not be zero, and the statistics must not see it.
        u = tl.where(mask, activate(u, PRE_ACTIVATION), 0.0)
    return u


@triton.jit
def add_residual(
    X, x_places, RESIDUAL, residual_places, RESIDUAL_OUT, SEED, row, start, column, mask, columns, threshold, scale,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """residual + dropout(x), stored, and returned as stored."""
    x = load_placed_rows(X, x_places, row, column, mask)
    if SEED is not None:
        x = x * dropout_factor(SEED, row, start, threshold, scale, ROWS, BLOCK)
    total = (load_placed_rows(RESIDUAL, residual_places, row, column, mask) + x).to(RESIDUAL_OUT.dtype.element_ty)
    tl.store(RESIDUAL_OUT + row * columns + column, total, mask=mask)
    return total.to(tl.float32)


@triton.jit
def finish(
    u, mean, rstd, w, b, GATE, gate_places, Y, row, column, mask, columns,
    ACTIVATION: tl.constexpr, GATE_FIRST: tl.constexpr, CAST: tl.constexpr,
):  # fmt: skip
    """The output from the normalised operand, stored."""
    x_hat = (u - mean) * rstd
    if CAST:
        x_hat = x_hat.to(Y.dtype.element_ty).to(tl.float32)
    y = x_hat * w + b
    if GATE is None:
        y = activate(y, ACTIVATION)
    elif not GATE_FIRST:
        y = y * activate(load_placed_rows(GATE, gate_places, row, column, mask), ACTIVATION)
    store_rows(Y, columns, row, column, mask, y)


@triton.jit
def norm_gradient(
    DY, dy_places, u, mean, rstd, w, b, GATE, gate_places, DGATE, row, column, mask, columns,
    ACTIVATION: tl.constexpr, GATE_FIRST: tl.constexpr, CAST: tl.constexpr, STORE_GATE: tl.constexpr,
    STORAGE: tl.constexpr,
):  # fmt: skip
    """(gradient before weight and bias, x_hat, x_hat as the weight saw it) of a tile; the gate's gradient stored."""
    x_hat = tl.where(mask, (u - mean) * rstd, 0.0)
    seen = x_hat
    if CAST:
        seen = x_hat.to(STORAGE).to(tl.float32)
    g = load_placed_rows(DY, dy_places, row, column, mask)
    if GATE is None:
        if ACTIVATION != "identity":
            g = tl.where(mask, g * differentiate(seen * w + b, ACTIVATION), 0.0)
    elif not GATE_FIRST:
        gate = load_placed_rows(GATE, gate_places, row, column, mask)
        if STORE_GATE:
            store_rows(DGATE, columns, row, column, mask, g * (seen * w) * differentiate(gate, ACTIVATION))
        g = tl.where(mask, g * activate(gate, ACTIVATION), 0.0)
    return g, x_hat, seen


@triton.jit
def store_input_gradients(
    du, X, x_places, GATE, gate_places, SEED, DH, dh_places, DX, DRESIDUAL, DGATE, row, start, column, mask, columns,
    threshold, scale, PRE_ACTIVATION: tl.constexpr, ACTIVATION: tl.constexpr, GATE_FIRST: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """From the gradient of what was normalised to the gradients of what it was made from, stored."""
    if GATE_FIRST:
        x = load_placed_rows(X, x_places, row, column, mask)
        gate = load_placed_rows(GATE, gate_places, row, column, mask)
        store_rows(DGATE, columns, row, column, mask, du * x * differentiate(gate, ACTIVATION))
        du = du * activate(gate, ACTIVATION)
    elif PRE_ACTIVATION != "identity":
        du = du * differentiate(load_placed_rows(X, x_places, row, column, mask), PRE_ACTIVATION)
    if DH is not None:
        du += load_placed_rows(DH, dh_places, row, column, mask)
    if DRESIDUAL is not None:
        store_rows(DRESIDUAL, columns, row, column, mask, du)
        du = du.to(DRESIDUAL.dtype.element_ty).to(tl.float32)
        du = du * dropout_factor(SEED, row, start, threshold, scale, ROWS, BLOCK)
    store_rows(DX, columns, row, column, mask, du)


@triton.jit
def load_statistics(MEAN, RSTD, row, live, ROWS: tl.constexpr):
    rstd = tl.load(RSTD + row, mask=live, other=0.0)
    if MEAN is None:
        mean = tl.zeros((ROWS, 1), tl.float32)
    else:
        mean = tl.load(MEAN + row, mask=live, other=0.0)
    return mean, rstd


@triton.jit
def store_statistics(MEAN, RSTD, mean, rstd, row, live):
    if MEAN is not None:
        tl.store(MEAN + row, mean, mask=live)
    tl.store(RSTD + row, rstd, mask=live)
