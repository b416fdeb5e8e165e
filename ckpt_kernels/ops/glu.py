"""The glu ops: activation(gate) * value, of two tensors, or of one that packs both."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..backends import reference
from .operands import (
    as_matrices,
    contiguous,
    gradient_room,
    or_none,
    overwritten,
    returned,
    returned_fake,
    wanted_gradients,
)
from .registration import Op
from .second_order import second_order


def forward(operands: Sequence[Tensor], activation: str, layout: str) -> Tensor:
    """The output of (gate, value), or of (packed,)."""
    return _glu(*operands, activation) if len(operands) == 2 else _packed_glu(*operands, activation, layout)


def gradient(
    grad_output: Tensor, operands: Sequence[Tensor], activation: str, layout: str, wanted: Sequence[bool], rewrite: bool
) -> tuple[list[Tensor | None], Tensor | None]:
    """The gradients of (gate, value), or of (packed,), and the output again if asked for.

    `grad_output` is the caller's to give away: a gradient is written over it where it fits, element by element.
    """
    output = contiguous(grad_output) if rewrite else None
    if len(operands) == 1:
        return [_packed_gradient(grad_output, *operands, output, activation, layout)], output
    room = gradient_room(operands, (False, wanted[1]))
    room[0] = overwritten(grad_output, operands[0]) if wanted[0] else None
    if grad_output.numel():
        matrices = as_matrices(grad_output, *operands, *room, output)
        backends.select(grad_output).glu_backward(*matrices, activation)
    return room, output


# glu: two tensors


def _glu(gate: Tensor, value: Tensor, activation: str) -> Tensor:
    output = contiguous(gate)
    if output.numel():
        backends.select(gate).glu_forward(*as_matrices(gate, value, output), activation)
    return output


def _glu_fake(gate, value, activation):
    return contiguous(gate)


def _glu_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    gate, value, ctx.activation = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(gate, value)


def _glu_recipe(ctx: Any, inputs: tuple, output: Tensor) -> tuple:
    *operands, activation = inputs
    return lambda gate, value: _glu(gate, value, activation), tuple(operands)


def _glu_backward_rule(ctx: Any, grad_output: Tensor | None) -> tuple:
    wanted = wanted_gradients(ctx, 2)
    if grad_output is None:
        return None, None, None
    return *or_none(glu_backward(grad_output, *ctx.saved_tensors, ctx.activation, wanted), wanted), None


def _glu_backward(grad_output: Tensor, gate: Tensor, value: Tensor, activation: str, wanted: list[bool]) -> tuple:
    room = gradient_room((gate, value), wanted)
    if gate.numel():
        backends.select(gate).glu_backward(*as_matrices(grad_output, gate, value, *room, None), activation)
    return returned(room, (gate, value), gate)


def _glu_backward_fake(grad_output, gate, value, activation, wanted):
    return returned_fake((gate, value), wanted, gate)


def _glu_first_order(grad_output, gate, value, activation, wanted):
    def block(gate, value):
        return (reference.glu(gate, value, activation),)

    return reference.gradients(block, (gate, value), (grad_output,), wanted, create_graph=True)


glu_backward = Op(
    "glu_backward(Tensor grad_output, Tensor gate, Tensor value, str activation, bool[] wanted) -> (Tensor, Tensor)",
    _glu_backward,
    _glu_backward_fake,
    *second_order(_glu_first_order, differentiable=3),
)
glu = Op(
    "glu(Tensor gate, Tensor value, str activation) -> Tensor",
    _glu,
    _glu_fake,
    _glu_setup,
    _glu_backward_rule,
    recipe=_glu_recipe,
)


# packed_glu: one tensor, whose gradient is written as one


LAYOUTS = ("gate_first", "value_first", "interleaved")


def layout_name(layout: str) -> str:
    """`layout`, if it is one of `LAYOUTS`; else ValueError."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout is {layout!r}; expected one of {', '.join(LAYOUTS)}")
    return layout


def unpack(packed: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """Gate and value as views of a tensor whose last dimension packs them."""
    if layout == "interleaved":
        return packed[..., ::2], packed[..., 1::2]
    first, second = packed.chunk(2, -1)
    return (first, second) if layout == "gate_first" else (second, first)


def _matrices(packed: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    columns = packed.shape[-1]
    rows = packed.reshape(-1, columns)
    # A slice of every second element needs neighbours, one of a half only contiguous rows.
    return unpack(rows if columns <= 1 or rows.stride(1) == 1 else rows.contiguous(), layout)


def _packed_output(packed: Tensor) -> Tensor:
    return torch.empty((*packed.shape[:-1], packed.shape[-1] // 2), dtype=packed.dtype, device=packed.device)


def _packed_glu(packed: Tensor, activation: str, layout: str) -> Tensor:
    output = _packed_output(packed)
    if output.numel():
        gate, value = _matrices(packed, layout)
        backends.select(packed).glu_forward(gate, value, output.view(gate.shape), activation)
    return output


def _packed_glu_fake(packed, activation, layout):
    return _packed_output(packed)


def _packed_glu_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    packed, *ctx.options = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(packed)


def _packed_glu_recipe(ctx: Any, inputs: tuple, output: Tensor) -> tuple:
    packed, *options = inputs
    return lambda packed: _packed_glu(packed, *options), (packed,)


def _packed_glu_backward_rule(ctx: Any, grad_output: Tensor | None) -> tuple:
    if grad_output is None:
        return None, None, None
    return packed_glu_backward(grad_output, *ctx.saved_tensors, *ctx.options), None, None


def _packed_gradient(
    grad_output: Tensor, packed: Tensor, output: Tensor | None, activation: str, layout: str
) -> Tensor:
    grad_packed = contiguous(packed)
    if packed.numel():
        gate, value = _matrices(packed, layout)
        grad_output, output = as_matrices(grad_output, output, columns=gate.shape[1])
        gradients = _matrices(grad_packed, layout)
        backends.select(packed).glu_backward(grad_output, gate, value, *gradients, output, activation)
    return grad_packed


def _packed_glu_backward(grad_output: Tensor, packed: Tensor, activation: str, layout: str) -> Tensor:
    return _packed_gradient(grad_output, packed, None, activation, layout)


def _packed_glu_backward_fake(grad_output, packed, activation, layout):
    return contiguous(packed)


def _packed_glu_first_order(grad_output, packed, activation, layout):
    def block(packed):
        return (reference.glu(*unpack(packed, layout), activation),)

    return reference.gradients(block, (packed,), (grad_output,), [True], create_graph=True)


packed_glu_backward = Op(
    "packed_glu_backward(Tensor grad_output, Tensor packed, str activation, str layout) -> Tensor",
    _packed_glu_backward,
    _packed_glu_backward_fake,
    *second_order(_packed_glu_first_order, differentiable=2),
)
packed_glu = Op(
    "packed_glu(Tensor packed, str activation, str layout) -> Tensor",
    _packed_glu,
    _packed_glu_fake,
    _packed_glu_setup,
    _packed_glu_backward_rule,
    recipe=_packed_glu_recipe,
)
