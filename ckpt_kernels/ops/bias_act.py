"""The bias_act op: dropout(activation(input + bias)).

What it keeps is the least that its gradient needs: nothing where the activation is the identity; the output, which
whatever reads it keeps too, where the output's sign says what the input's would; else the input. And the dropout's
seed, not its mask.
"""

from typing import Any

from torch import Tensor

from .. import backends
from ..activations import SIGNED_BY_OUTPUT
from ..backends import reference
from .operands import (
    as_matrices,
    as_rows,
    coefficient_room,
    column_sum,
    contiguous,
    gradient_room,
    or_none,
    overwritten,
    returned,
    returned_fake,
    vector,
    wanted_gradients,
    zero,
)
from .registration import Op
from .second_order import second_order


def _columns(input: Tensor) -> int:
    return input.shape[-1] if input.dim() else 1


def _matrices(bias: Tensor | None, seed: Tensor | None, *tensors: Tensor | None) -> list[Tensor | None]:
    """By rows of the last dimension, which the bias and the dropout go by, where there is one of these."""
    if bias is None and seed is None:
        return as_matrices(*tensors)
    columns = next(_columns(t) for t in tensors if t is not None)
    return [None if t is None else as_rows(t, columns) for t in tensors]


def forward(input: Tensor, bias: Tensor | None, seed: Tensor | None, activation: str, dropout_p: float) -> Tensor:
    output = contiguous(input)
    if output.numel():
        rows, output_rows = _matrices(bias, seed, input, output)
        backends.select(input).bias_act_forward(rows, vector(bias), seed, output_rows, activation, dropout_p)
    return output


def _bias_act_fake(input, bias, seed, activation, dropout_p):
    return contiguous(input)


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
    return lambda *tensors: forward(*tensors, activation, dropout_p), tuple(operands)


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
    (grad_input,) = gradient_room((kept,), wanted[:1])
    (grad_bias,) = coefficient_room((bias,), wanted[1:], kept)
    if kept.numel():
        rows, kept_rows, grad_rows = _matrices(bias, seed, grad_output, kept, grad_input)
        backends.select(kept).bias_act_backward(
            rows, kept_rows, vector(added), seed, grad_rows, grad_bias, None, activation, dropout_p
        )
    else:
        zero(grad_bias)
    return returned((grad_input, grad_bias), operands, grad_output)


def gradient(
    grad_output: Tensor,
    input: Tensor,
    seed: Tensor | None,
    activation: str,
    dropout_p: float,
    wanted: bool,
    rewrite: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """The input's gradient from the input, without a bias, and the output again if asked for.

    `grad_output` is the caller's to give away: the gradient is written over it where it fits, element by element.
    """
    (output,) = gradient_room((input,), (rewrite,))
    grad_input = overwritten(grad_output, input) if wanted else None
    if input.numel():
        rows, input_rows, *room = _matrices(None, seed, grad_output, input, grad_input, output)
        backends.select(input).bias_act_backward(
            rows, input_rows, None, seed, room[0], None, room[1], activation, dropout_p
        )
    return grad_input, output


def _bias_act_backward_fake(grad_output, kept, bias, seed, activation, dropout_p, wanted):
    return returned_fake((grad_output, bias), wanted, grad_output)


def _bias_act_first_order(grad_output, kept, bias, seed, activation, dropout_p, wanted):
    by_output = activation in SIGNED_BY_OUTPUT
    input = grad_output if kept is None else kept

    def block(input, bias):
        columns = _columns(input)
        rows = input.reshape(input.numel() // max(columns, 1), columns)
        # In the output the bias is there already: one that is zero, with the same gradient.
        added = bias - bias.detach() if by_output and bias is not None else bias
        return (reference.bias_act(rows, added, seed, activation, dropout_p).reshape(input.shape),)

    return reference.gradients(block, (input, bias), (grad_output,), wanted, create_graph=True)


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
    recipe=_bias_act_recipe,
)
