"""The glu ops: activation(gate) * value, of two tensors, or of one that packs both."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backends
from ..backends import reference
from .operands import (
    as_matrices,
    as_result_of,
    as_rows,
    contiguous,
    elementwise_room,
    memory_order,
    or_none,
    overwritten,
    returned,
    wanted_gradients,
    with_strides,
)
from .registration import Op
from .second_order import second_order
from .sharding import Sharding, every_dim, like_input


def forward(operands: Sequence[Tensor], activation: str, layout: str) -> Tensor:
    """The output of (gate, value), or of (packed,)."""
    return _glu(*operands, activation) if len(operands) == 2 else _packed_glu(*operands, activation, layout)


def gradient(
    grad_output: Tensor, operands: Sequence[Tensor], activation: str, layout: str, wanted: Sequence[bool], rewrite: bool
) -> tuple[list[Tensor | None], Tensor | None]:
    """The gradients of (gate, value), or of (packed,), and the output again, as `forward` made it, if asked for.

    `grad_output` is the caller's to give away: a gradient is written over it where it fits, element by element.
    """
    if len(operands) == 1:
        output = _packed_output(*operands) if rewrite else None
        return [_packed_gradient(grad_output, *operands, output, activation, layout)], output
    gate, value = operands
    grad_output = grad_output.contiguous()
    output = contiguous(grad_output) if rewrite else None
    room = [overwritten(grad_output, gate) if wanted[0] else None, contiguous(value) if wanted[1] else None]
    if grad_output.numel():
        matrices = as_matrices(grad_output, grad_output, gate, value, *room, output)
        backends.select(grad_output).glu_backward(*matrices, activation)
    return room, None if output is None else as_result_of(gate, output)


# glu: two tensors


def _glu(gate: Tensor, value: Tensor, activation: str) -> Tensor:
    output = elementwise_room(gate)
    if output.numel():
        backends.select(gate).glu_forward(*as_matrices(output, gate, value, output), activation)
    return output


def _glu_fake(gate, value, activation):
    return elementwise_room(gate)


def _glu_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    gate, value, ctx.activation = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(gate, value)


def _glu_recipe(ctx: Any, inputs: tuple, output: Tensor) -> tuple:
    *operands, activation = inputs
    strides = output.stride()
    return lambda gate, value: with_strides(_glu(gate, value, activation), strides), tuple(operands)


def _glu_backward_rule(ctx: Any, grad_output: Tensor | None) -> tuple:
    wanted = wanted_gradients(ctx, 2)
    if grad_output is None:
        return None, None, None
    return *or_none(glu_backward(grad_output, *ctx.saved_tensors, ctx.activation, wanted), wanted), None


def _glu_gradient_room(grad_output: Tensor, gate: Tensor, value: Tensor, wanted: list[bool]) -> list[Tensor | None]:
    """Both lie alike: as grad_output does, or as gate where grad_output is expanded."""
    return [elementwise_room(grad_output, gate, value) if w else None for w in wanted]


def _glu_backward(grad_output: Tensor, gate: Tensor, value: Tensor, activation: str, wanted: list[bool]) -> tuple:
    room = _glu_gradient_room(grad_output, gate, value, wanted)
    there = next((t for t in room if t is not None), None)
    if gate.numel() and there is not None:
        matrices = as_matrices(there, grad_output, gate, value, *room)
        backends.select(gate).glu_backward(*matrices, None, activation)
    return returned(room, (gate, value), gate)


def _glu_backward_fake(grad_output, gate, value, activation, wanted):
    return returned(_glu_gradient_room(grad_output, gate, value, wanted), (gate, value), gate)


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
    reference.glu,
    recipe=_glu_recipe,
    elementwise=True,
    sharding=Sharding(every_dim, (like_input, like_input), (like_input,)),
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


class _Cut(NamedTuple):
    """How a packed tensor and its output are cut into rows: their dimensions from the outermost to the innermost in
    memory, how long a row of gate or value is, and how a row of both packs them.

    Where the packed dimension is not the innermost, a half is it and all that it contains, and a gate and a value that
    take turns are all that a single place contains.
    """

    order: list[int]
    columns: int
    layout: str

    def matrix(self, tensor: Tensor | None) -> Tensor | None:
        """The output, or its gradient."""
        return None if tensor is None else as_rows(tensor.permute(self.order), self.columns)

    def matrices(self, packed: Tensor) -> tuple[Tensor, Tensor]:
        """Gate and value: views of a dense tensor, else of a copy where strides demand it."""
        return unpack(as_rows(packed.permute(self.order), 2 * self.columns), self.layout)


def _cut(packed: Tensor, layout: str) -> _Cut:
    last, half = packed.dim() - 1, packed.shape[-1] // 2
    if packed.is_contiguous():
        return _Cut(list(range(last + 1)), half, layout)
    order = memory_order(torch.empty_like(packed, device="meta").stride())
    inner = math.prod(packed.shape[dim] for dim in order[order.index(last) + 1 :])
    if layout == "interleaved" and inner > 1:
        return _Cut(order, inner, "gate_first")
    return _Cut(order, inner * half, layout)


def _packed_output(packed: Tensor) -> Tensor:
    shape = (*packed.shape[:-1], packed.shape[-1] // 2)
    if packed.is_contiguous():
        return torch.empty(shape, dtype=packed.dtype, device=packed.device)
    order = memory_order(torch.empty_like(packed, device="meta").stride())
    return torch.empty_permuted(shape, order, dtype=packed.dtype, device=packed.device)


def _packed_glu(packed: Tensor, activation: str, layout: str) -> Tensor:
    output = _packed_output(packed)
    if output.numel():
        cut = _cut(packed, layout)
        backends.select(packed).glu_forward(*cut.matrices(packed), cut.matrix(output), activation)
    return output


def _packed_glu_fake(packed, activation, layout):
    return _packed_output(packed)


def _packed_glu_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    packed, *ctx.options = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(packed)


def _packed_glu_recipe(ctx: Any, inputs: tuple, output: Tensor) -> tuple:
    packed, *options = inputs
    strides = output.stride()
    return lambda packed: with_strides(_packed_glu(packed, *options), strides), (packed,)


def _packed_glu_backward_rule(ctx: Any, grad_output: Tensor | None) -> tuple:
    if grad_output is None:
        return None, None, None
    return packed_glu_backward(grad_output, *ctx.saved_tensors, *ctx.options), None, None


def _packed_gradient(
    grad_output: Tensor, packed: Tensor, output: Tensor | None, activation: str, layout: str
) -> Tensor:
    grad_packed = elementwise_room(packed)
    if packed.numel():
        cut = _cut(packed, layout)
        gate_and_value, gradients = cut.matrices(packed), cut.matrices(grad_packed)
        operands = (cut.matrix(grad_output), *gate_and_value, *gradients, cut.matrix(output))
        backends.select(packed).glu_backward(*operands, activation)
    return grad_packed


def _packed_glu_backward(grad_output: Tensor, packed: Tensor, activation: str, layout: str) -> Tensor:
    return _packed_gradient(grad_output, packed, None, activation, layout)


def _packed_glu_backward_fake(grad_output, packed, activation, layout):
    return elementwise_room(packed)


def _packed_glu_composed(packed, activation, layout):
    return reference.glu(*unpack(packed, layout), activation)


def _packed_glu_first_order(grad_output, packed, activation, layout):
    def block(packed):
        return (_packed_glu_composed(packed, activation, layout),)

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
    _packed_glu_composed,
    recipe=_packed_glu_recipe,
    elementwise=True,
    # The dimension that packs both is in one piece.
    sharding=Sharding(lambda arguments: range(arguments[0].dim() - 1), (like_input,), (like_input,)),
)
