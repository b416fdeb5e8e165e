"""The bias_act op: dropout(activation(input + bias)).

What it keeps is the least that its gradient needs: nothing where the activation is the identity; the output, which
whatever reads it keeps too, where the output's sign says what the input's would; else the input. And the dropout's
seed, not its mask.
"""

from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..activations import SIGNED_BY_OUTPUT
from ..backends import reference
from .operands import (
    as_matrices,
    as_result_of,
    coefficient_room,
    column_sum,
    contiguous,
    elementwise_room,
    or_none,
    overwritten,
    returned,
    vector,
    wanted_gradients,
    with_strides,
    zero,
)
from .registration import Op
from .second_order import second_order
from .sharding import Sharding, every_dim, last_of_input, like_input, seed

# Torch lays their gradients out as it did the forward pass's tensors, and those of all others as grad_output lies.
_GRADIENT_LIES_AS_KEPT = ("relu", "leaky_relu", "relu_squared")


def _columns(input: Tensor) -> int:
    return input.shape[-1] if input.dim() else 1


def _row_room(target: Tensor, bias: Tensor | None, seed: Tensor | None) -> Tensor:
    """Room for `target` to be computed in by rows: itself where its order in memory will do, else a contiguous tensor.

    A dropout mask goes by rows and columns of the shape, whatever the strides are, a bias by columns.
    """
    if seed is None and (bias is None or target.stride(-1) == 1):
        return target
    return target if target.is_contiguous() else contiguous(target)


def _matrices(bias: Tensor | None, seed: Tensor | None, room: Tensor, *tensors: Tensor | None) -> list[Tensor | None]:
    """By rows of the last dimension, which the bias and the dropout go by, where there is one of these."""
    return as_matrices(room, *tensors, columns=None if bias is None and seed is None else _columns(room))


def forward(input: Tensor, bias: Tensor | None, seed: Tensor | None, activation: str, dropout_p: float) -> Tensor:
    output = elementwise_room(input)
    if output.numel():
        room = _row_room(output, bias, seed)
        rows, output_rows = _matrices(bias, seed, room, input, room)
        backends.select(input).bias_act_forward(rows, vector(bias), seed, output_rows, activation, dropout_p)
        if room is not output:
            output.copy_(room)
    return output


def _bias_act_fake(input, bias, seed, activation, dropout_p):
    return elementwise_room(input)


def _bias_act_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    input, bias, seed, activation, ctx.dropout_p = inputs
    ctx.set_materialize_grads(False)
    by_output = activation in SIGNED_BY_OUTPUT
    kept = None if activation == "identity" else output if by_output else input
    ctx.activation = activation
    ctx.save_for_backward(kept, bias, seed)


def _bias_act_recipe(ctx: Any, inputs: tuple, output: Tensor) -> tuple | None:
    """Where the input is kept; else the reader's copy of the output is the only tensor there is, or is kept anyway."""
    *operands, activation, dropout_p = inputs
    if activation == "identity" or activation in SIGNED_BY_OUTPUT:
        return None
    strides = output.stride()
    return lambda *tensors: with_strides(forward(*tensors, activation, dropout_p), strides), tuple(operands)


def _bias_act_backward_rule(ctx: Any, grad_output: Tensor | None) -> tuple:
    kept, bias, seed = ctx.saved_tensors
    wanted = wanted_gradients(ctx, 2)
    if grad_output is None:
        return (None,) * 5
    found = bias_act_backward(grad_output, kept, bias, seed, ctx.activation, ctx.dropout_p, wanted)
    return *or_none(found, wanted), None, None, None


def _bias_act_backward(
    grad_output: Tensor,
    kept: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    activation: str,
    dropout_p: float,
    wanted: list[bool],
) -> tuple[Tensor, ...]:
    operands = (grad_output, bias)
    if kept is None:
        # The gradient goes the way that the input went.
        grad_input = forward(grad_output, None, seed, "identity", dropout_p)
        grad_bias = column_sum(grad_input, bias) if wanted[1] else None
        return returned((grad_input if wanted[0] else None, grad_bias), operands, grad_output)
    added = None if activation in SIGNED_BY_OUTPUT else bias
    (grad_bias,) = coefficient_room((bias,), wanted[1:], kept)
    grad_input = _gradient_room(grad_output, kept, activation) if wanted[0] else None
    if kept.numel():
        # Only its strides count where no gradient is written to it.
        like = torch.empty(kept.shape, device="meta") if grad_input is None else grad_input
        room = _row_room(like, bias, seed)
        target = None if grad_input is None else room
        rows, kept_rows, grad_rows = _matrices(bias, seed, room, grad_output, kept, target)
        backends.select(kept).bias_act_backward(
            rows, kept_rows, vector(added), seed, grad_rows, grad_bias, None, activation, dropout_p
        )
        if target is not None and target is not grad_input:
            grad_input.copy_(target)
    else:
        zero(grad_bias)
    return returned((grad_input, grad_bias), operands, grad_output)


def _gradient_room(grad_output: Tensor, kept: Tensor, activation: str) -> Tensor:
    operands = (kept, grad_output) if activation in _GRADIENT_LIES_AS_KEPT else (grad_output, kept)
    return elementwise_room(*operands)


def gradient(
    grad_output: Tensor,
    input: Tensor,
    seed: Tensor | None,
    activation: str,
    dropout_p: float,
    wanted: bool,
    rewrite: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """The input's gradient from the input, without a bias, and the output again, as `forward` made it, if asked for.

    `grad_output` is the caller's to give away: the gradient is written over it where it fits, element by element.
    """
    grad_output = grad_output.contiguous()
    grad_input = overwritten(grad_output, input) if wanted else None
    output = contiguous(grad_output) if rewrite else None
    if input.numel():
        rows, input_rows, *room = _matrices(None, seed, grad_output, grad_output, input, grad_input, output)
        backends.select(input).bias_act_backward(
            rows, input_rows, None, seed, room[0], None, room[1], activation, dropout_p
        )
    return grad_input, None if output is None else as_result_of(input, output)


def _bias_act_backward_fake(grad_output, kept, bias, seed, activation, dropout_p, wanted):
    nothing = grad_output.new_empty(0)
    grad_input, grad_bias = nothing, nothing.clone()
    if wanted[0]:
        room = elementwise_room(grad_output) if kept is None else _gradient_room(grad_output, kept, activation)
        grad_input = room.to(grad_output.dtype)
    if wanted[1] and bias is not None:
        grad_bias = contiguous(bias)
    return grad_input, grad_bias


def _bias_act_composed(input, bias, seed, activation, dropout_p):
    if seed is None:
        return reference.bias_act(input, bias, seed, activation, dropout_p)
    columns = _columns(input)
    rows = input.reshape(input.numel() // max(columns, 1), columns)
    return reference.bias_act(rows, bias, seed, activation, dropout_p).reshape(input.shape)


def _bias_act_first_order(grad_output, kept, bias, seed, activation, dropout_p, wanted):
    if kept is None:
        grad_input = _bias_act_composed(grad_output, None, seed, "identity", dropout_p)
        return or_none((grad_input, column_sum(grad_input, bias) if wanted[1] else None), wanted)
    by_output = activation in SIGNED_BY_OUTPUT

    def block(input, bias):
        # In the output the bias is there already: one that is zero, with the same gradient.
        added = bias - bias.detach() if by_output and bias is not None else bias
        return (_bias_act_composed(input, added, seed, activation, dropout_p),)

    return reference.gradients(block, (kept, bias), (grad_output,), wanted, create_graph=True)


bias_act_backward = Op(
    "bias_act_backward(Tensor grad_output, Tensor? kept, Tensor? bias, Tensor? seed, str activation, float dropout_p,"
    " bool[] wanted) -> (Tensor, Tensor)",
    _bias_act_backward,
    _bias_act_backward_fake,
    *second_order(_bias_act_first_order, differentiable=3),
)
bias_act = Op(
    "bias_act(Tensor input, Tensor? bias, Tensor? seed, str activation, float dropout_p) -> Tensor",
    forward,
    _bias_act_fake,
    _bias_act_setup,
    _bias_act_backward_rule,
    _bias_act_composed,
    recipe=_bias_act_recipe,
    elementwise=True,
    sharding=Sharding(every_dim, (like_input, last_of_input, seed), (like_input,)),
)
