"""The rotary kernels, which rotate the pairs of a head after an optional norm, and their launchers.

A program works on tiles of ROWS whole heads, of which BLOCK columns are rotated. Statistics and arithmetic are in
float32.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from ..blocks import Rotary, RotaryGradients
from .launch import LONGEST_HEAD, Tile, backward_programs, heads_tile, launch
from .rotary_tiles import (
    added,
    cast_x_hat,
    first_row,
    load_head,
    load_weight,
    mean_of,
    normalized,
    operands_of,
    pointers,
    positions,
    rotate,
    scaled,
    store_head,
    strided,
)


class Sums(NamedTuple):
    """Float32 partial sums, a row of columns for each program, which the caller adds up."""

    weight: Tensor | None
    bias: Tensor | None


@triton.jit
def rotary_kernel(
    levels, source, cos, sin, norm, target, chosen, TRANSPOSED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Compute target = rotate(norm(source)); TRANSPOSED is the transpose of the rotation, the gradient without a norm.

    `levels`, `norm` and `chosen` are `Levels`, `Norm` and `Choices`; the others are `Strided`.
    """
    position, row_mask = positions(levels, chosen, first_row(chosen, ROWS), levels.rows, ROWS)
    at = pointers(source, position)
    if TRANSPOSED:
        head = load_head(at, row_mask, chosen, chosen.interleaved_output, BLOCK)
    else:
        head = load_head(at, row_mask, chosen, chosen.interleaved, BLOCK)
    if chosen.norm != "none":
        x_hat, _ = normalized(head, norm, row_mask, chosen, BLOCK)
        head = scaled(
            cast_x_hat(x_hat, source.data.dtype.element_ty, chosen),
            load_weight(norm.weight, norm.weight_offset, 1.0, chosen, ROWS, BLOCK),
        )
        head = added(head, load_weight(norm.bias, 0.0, 0.0, chosen, ROWS, BLOCK))
    head = rotate(head, cos, sin, position, row_mask, chosen, TRANSPOSED, BLOCK)
    if TRANSPOSED:
        store_head(pointers(target, position), row_mask, chosen, head, chosen.interleaved, BLOCK)
    else:
        store_head(pointers(target, position), row_mask, chosen, head, chosen.interleaved_output, BLOCK)


@triton.jit
def norm_rotary_backward_kernel(
    levels, grad_output, source, cos, sin, norm, grad_input, sums, program_rows, chosen,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of rotate(norm(source)).

    The gradient of z = norm(source) is h, the transpose of the rotation applied to grad_output. With c1 and c2 the
    means over a head of h * w * x_hat and of h * w, the gradient of the input is (h * w - x_hat * c1 - c2) * rstd,
    without c2 in an RMSNorm. Each program processes `program_rows` heads, in order, with partial sums in registers.
    """
    begin = first_row(chosen, program_rows)
    end = tl.minimum(begin + program_rows, levels.rows)
    w = load_weight(norm.weight, norm.weight_offset, 1.0, chosen, 1, BLOCK)
    nothing = tl.zeros((ROWS, BLOCK // 2), tl.float32)
    rest = tl.zeros((ROWS, 1 if chosen.passing == 0 else chosen.passing), tl.float32)
    dw = (nothing, nothing, rest)
    db = (nothing, nothing, rest)
    for first in range(begin, end, ROWS):
        position, row_mask = positions(levels, chosen, first, end, ROWS)
        h = load_head(pointers(grad_output, position), row_mask, chosen, chosen.interleaved_output, BLOCK)
        h = rotate(h, cos, sin, position, row_mask, chosen, True, BLOCK)
        head = load_head(pointers(source, position), row_mask, chosen, chosen.interleaved, BLOCK)
        x_hat, rstd = normalized(head, norm, row_mask, chosen, BLOCK)
        if sums.weight is not None:
            dw = added(dw, scaled(h, cast_x_hat(x_hat, source.data.dtype.element_ty, chosen)))
        if sums.bias is not None:
            db = added(db, h)
        if grad_input.data is not None:
            wh = scaled(h, w)
            c1 = -mean_of(scaled(wh, x_hat), chosen)
            du = added(wh, scaled(x_hat, (c1, c1, c1)))
            if chosen.norm == "layer":
                c2 = -mean_of(wh, chosen)
                du = added(du, (c2, c2, c2))
            du = scaled(du, (rstd, rstd, rstd))
            store_head(pointers(grad_input, position), row_mask, chosen, du, chosen.interleaved, BLOCK)
    if sums.weight is not None:
        store_sums(sums.weight, dw, chosen, BLOCK)
    if sums.bias is not None:
        store_sums(sums.bias, db, chosen, BLOCK)


@triton.jit
def store_sums(S, head, chosen, BLOCK: tl.constexpr):
    """Sum a head's gradients over the rows of this program, and store the sums."""
    at = S + tl.program_id(0).to(tl.int64) * chosen.columns + tl.zeros((1, 1), tl.int32)
    summed = (tl.sum(head[0], 0)[None, :], tl.sum(head[1], 0)[None, :], tl.sum(head[2], 0)[None, :])
    store_head(at, tl.full((1, 1), 1, tl.int1), chosen, summed, chosen.interleaved, BLOCK)


def rotary_forward(block: Rotary, output: Tensor) -> None:
    """`backends.reference.rotary_forward`."""
    if output.shape[-1] > LONGEST_HEAD:
        reference.rotary_forward(block, output)
    else:
        _launch(block, block.input, output, False)


def rotary_backward(block: Rotary, grad_output: Tensor, gradients: RotaryGradients) -> None:
    """`backends.reference.rotary_backward`, with all sums in a fixed order."""
    if grad_output.shape[-1] > LONGEST_HEAD:
        reference.rotary_backward(block, grad_output, gradients)
    elif block.options.norm != "none":
        _launch_norm_backward(block, grad_output, gradients)
    elif gradients.input is not None:
        _launch(block, grad_output, gradients.input, True)


def _tile(block: Rotary, heads: Tensor, sums: bool) -> Tile:
    rotated = block.options.rotary_dim
    return heads_tile(rotated, heads.shape[-1] - rotated, sums)


def _launch(block: Rotary, source: Tensor, target: Tensor, transposed: bool) -> None:
    tile = _tile(block, source, False)
    levels, cos, sin, norm, chosen, order = operands_of(block, source, tile)
    arguments = levels, strided(source, order), cos, sin, norm, strided(target, order), chosen, transposed
    launch(rotary_kernel, triton.cdiv(levels.rows, tile.rows), tile, source.device, *arguments)


def _launch_norm_backward(block: Rotary, grad_output: Tensor, gradients: RotaryGradients) -> None:
    device, tile = grad_output.device, _tile(block, grad_output, True)
    levels, cos, sin, norm, chosen, order = operands_of(block, grad_output, tile)
    programs, program_rows = backward_programs(device, levels.rows, tile)
    sums = Sums(
        *(
            None if gradient is None else gradient.new_empty((programs, gradient.numel()), dtype=torch.float32)
            for gradient in (gradients.weight, gradients.bias)
        )
    )
    rows = (strided(t, order) for t in (grad_output, block.input))
    arguments = *rows, cos, sin, norm, strided(gradients.input, order), sums, program_rows, chosen
    launch(norm_rotary_backward_kernel, programs, tile, device, levels, *arguments)
    for gradient, partial in zip((gradients.weight, gradients.bias), sums, strict=True):
        if gradient is not None:
            torch.sum(partial, 0, out=gradient.view(-1))
