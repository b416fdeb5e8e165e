"""Blocks and the linear layers that read them, MLPs among them.

Each takes `recompute`, which says how far the backward pass goes back:

- "block" keeps what the composition of the blocks and of F.linear keeps.
- "output" (the default) lets go of the output of the block that a linear layer reads; the block's gradient kernel
  writes it again in the pass that it makes anyway.
- "all" lets go of the products before the block too, and runs these again, but never the last one. Where there is none
  before the block, it is the same as "output".

Weights may be frozen: one that wants no gradient costs neither a product nor a kept tensor. Under autocast the products
are computed as those of F.linear; what is kept is the operand itself, not the copy that was cast. Gradients of
gradients, and torch.compile, go through the composition.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import ops, thin
from ..activations import Activation, activation_name
from .checks import (
    autocast,
    check_coefficient,
    check_device,
    check_input,
    check_tensor,
    dropout_seed,
    number,
    rms_eps,
    shape_of,
)

RECOMPUTE = ("block", "output", "all")
NORMS = ("layer_norm", "rms_norm")


def norm_linear(
    input: Tensor,
    normalized_shape: int | Sequence[int],
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor | Sequence[Tensor],
    bias: Tensor | Sequence[Tensor | None] | None = None,
    eps: float | None = None,
    *,
    norm: str = "layer_norm",
    activation: Activation = "identity",
    pre_activation: Activation = "identity",
    weight_offset: float = 0.0,
    cast_before_weight: bool = False,
    recompute: str = "output",
) -> Tensor | tuple[Tensor, ...]:
    """F.linear(activation(norm(input)), weight, bias), or a tuple of several for sequences of weights and biases.

    `norm` is "layer_norm" or "rms_norm", over one dimension; the latter has no `norm_bias`, and `weight_offset` and
    `cast_before_weight` are for it (see `functional.rms_norm`). `weight` is (out, normalized_shape), `bias` (out,).
    `eps=None` is 1e-5 for layer_norm, and that of `rms_norm` else. Keeps the input and one or two numbers a row.
    """
    single = isinstance(weight, Tensor)
    weights, biases = _as_sequences(weight, bias)
    tensors = (input, norm_weight, norm_bias, *weights, *biases)
    given = (normalized_shape, eps, norm, activation, pre_activation, weight_offset, cast_before_weight, recompute)
    block = thin.plan_of("norm_linear", tensors, (single, len(weights), given))
    if block is not None:
        outputs = _block_linear(block, tensors[:3], weights, biases, recompute)
        return outputs[0] if single else outputs
    level_name(recompute)
    columns = check_input(input, normalized_shape)
    check_coefficient(norm_weight, "norm_weight", input, normalized_shape)
    check_coefficient(norm_bias, "norm_bias", input, normalized_shape)
    centered = norm_name(norm) == "layer_norm"
    if columns != input.shape[-1]:
        raise RuntimeError(f"normalized_shape is {normalized_shape}; expected one dimension")
    if not centered and norm_bias is not None:
        raise ValueError("norm_bias is given; expected None where norm is 'rms_norm'")
    if centered and (weight_offset or cast_before_weight):
        raise ValueError("weight_offset or cast_before_weight is given; expected neither where norm is 'layer_norm'")
    pre, post = activation_name(pre_activation, "pre_activation"), activation_name(activation)
    eps = (1e-5 if eps is None else number(eps, "eps")) if centered else rms_eps(input, eps)
    for w, b in zip(weights, biases, strict=True):
        _check_linear(w, b, "weight", "bias", columns, input)
    options = (columns, eps, centered, pre, post, number(weight_offset, "weight_offset"), bool(cast_before_weight))
    block = ops.linear.norm_block(*options)
    known = thin.linear.norm_block(_dtypes(input, *weights, *biases), input, (norm_weight, norm_bias), options)
    thin.remember(known, "norm_linear", tensors, (single, len(weights), given))
    operands = autocast(input, norm_weight, norm_bias)
    outputs = _block_linear(block, operands, weights, biases, recompute)
    return outputs[0] if single else outputs


def _as_sequences(
    weight: Tensor | Sequence[Tensor], bias: Tensor | Sequence[Tensor | None] | None
) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
    single = isinstance(weight, Tensor)
    if not single and not isinstance(weight, Sequence):
        raise TypeError(f"weight is {weight!r}; expected a tensor or a sequence of them")
    weights = (weight,) if single else tuple(weight)
    biases = (bias,) * len(weights) if single or bias is None else tuple(bias)
    if len(biases) != len(weights):
        raise ValueError(f"bias has {len(biases)} tensors; expected one for each of {len(weights)} weights")
    return weights, biases


def act_linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Activation = "gelu",
    dropout_p: float = 0.0,
    training: bool = True,
    recompute: str = "output",
) -> Tensor:
    """F.linear(dropout(activation(input)), weight, bias).

    `weight` is (out, in), where in is the input's last dimension, `bias` (out,). Keeps the input, and no dropout mask.
    """
    call = "act_linear", (input, weight, bias), (activation, dropout_p, training, recompute)
    block = thin.plan_of(*call)
    if block is not None:
        return _block_linear(block, (input,), (weight,), (bias,), recompute)[0]
    level_name(recompute)
    check_tensor(input, "input", nested=True)
    _check_linear(weight, bias, "weight", "bias", _last(input), input)
    p, seed = dropout_seed(input, dropout_p, training)
    name = activation_name(activation)
    thin.remember(thin.linear.act_block(_dtypes(input, weight, bias), name, p), *call)
    block = ops.linear.act_block(name, seed, p)
    return _block_linear(block, (input,), (weight,), (bias,), recompute)[0]


def mlp(
    input: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    *,
    activation: Activation = "gelu",
    dropout_p: float = 0.0,
    training: bool = True,
    recompute: str = "output",
) -> Tensor:
    """F.linear(dropout(activation(F.linear(input, weight1, bias1))), weight2, bias2).

    `weight1` is (hidden, in), `weight2` (out, hidden). Keeps the input and, but for `recompute="all"`, the first
    product, (..., hidden); with "block" the activation's output too.
    """
    tensors = (input, weight1, bias1, weight2, bias2)
    call = "mlp", tensors, (activation, dropout_p, training, recompute)
    block = thin.plan_of(*call)
    if block is not None:
        return ops.linear.linear_block_linear(block, input, (weight1, bias1), weight2, bias2, recompute)
    level_name(recompute)
    check_tensor(input, "input", nested=True)
    _check_linear(weight1, bias1, "weight1", "bias1", _last(input), input)
    _check_linear(weight2, bias2, "weight2", "bias2", weight1.shape[0], input)
    p, seed = dropout_seed(input, dropout_p, training)
    name = activation_name(activation)
    thin.remember(thin.linear.act_block(_dtypes(*tensors), name, p), *call)
    block = ops.linear.act_block(name, seed, p)
    return ops.linear.linear_block_linear(block, input, (weight1, bias1), weight2, bias2, recompute)


def gated_mlp(
    input: Tensor,
    gate_weight: Tensor,
    value_weight: Tensor | None,
    weight: Tensor,
    gate_bias: Tensor | None = None,
    value_bias: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    activation: Activation = "silu",
    layout: str = "gate_first",
    dropout_p: float = 0.0,
    training: bool = True,
    recompute: str = "output",
) -> Tensor:
    """F.linear(dropout(activation(gate) * value), weight, bias), gate and value products of the input.

    `gate_weight` and `value_weight` are (hidden, in), `weight` is (out, hidden). With `value_weight=None`,
    `gate_weight` is (2 * hidden, in) and packs both as `layout` says (see `functional.packed_glu`), and so does
    `gate_bias`. Keeps the input and, but for `recompute="all"`, the two products; with "block" their product too.
    """
    tensors = (input, gate_weight, value_weight, weight, gate_bias, value_bias, bias)
    call = "gated_mlp", tensors, (activation, layout, dropout_p, training, recompute)
    block = thin.plan_of(*call)
    if block is not None:
        firsts = (gate_weight, gate_bias)
        firsts = firsts if value_weight is None else (*firsts, value_weight, value_bias)
        return ops.linear.linear_block_linear(block, input, firsts, weight, bias, recompute)
    level_name(recompute)
    ops.glu.layout_name(layout)
    check_tensor(input, "input", nested=True)
    _check_linear(gate_weight, gate_bias, "gate_weight", "gate_bias", _last(input), input)
    firsts: tuple[Tensor | None, ...] = (gate_weight, gate_bias)
    hidden = gate_weight.shape[0]
    if value_weight is not None:
        _check_linear(value_weight, value_bias, "value_weight", "value_bias", _last(input), input)
        firsts += (value_weight, value_bias)
        if value_weight.shape != gate_weight.shape:
            raise RuntimeError(
                f"value_weight has shape {shape_of(value_weight)}; expected gate_weight's, {shape_of(gate_weight)}"
            )
    elif value_bias is not None:
        raise ValueError("value_bias is given; expected None where value_weight is")
    elif hidden % 2:
        raise RuntimeError(f"gate_weight has shape {shape_of(gate_weight)}; expected an even first dimension")
    else:
        hidden //= 2
    _check_linear(weight, bias, "weight", "bias", hidden, input)
    p, seed = dropout_seed(input, dropout_p, training)
    name, packed = activation_name(activation), value_weight is None
    thin.remember(thin.linear.glu_block(_dtypes(*tensors), name, layout, p, packed), *call)
    block = ops.linear.glu_block(name, layout, seed, p)
    return ops.linear.linear_block_linear(block, input, firsts, weight, bias, recompute)


def level_name(recompute: str) -> str:
    """`recompute`, if it is one of `RECOMPUTE`; else ValueError."""
    if recompute not in RECOMPUTE:
        raise ValueError(f"recompute is {recompute!r}; expected one of {', '.join(RECOMPUTE)}")
    return recompute


def norm_name(norm: str) -> str:
    """`norm`, if it is one of `NORMS`; else ValueError."""
    if norm not in NORMS:
        raise ValueError(f"norm is {norm!r}; expected one of {', '.join(NORMS)}")
    return norm


def _block_linear(
    block: ops.linear.Block,
    operands: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    recompute: str,
) -> tuple[Tensor, ...]:
    compute = ops.linear.composed_linear if recompute == "block" else ops.linear.block_linear
    return compute(block, operands, weights, biases)


def _dtypes(*tensors: Tensor | None) -> set[torch.dtype]:
    return {t.dtype for t in tensors if t is not None}


def _last(input: Tensor) -> int:
    if input.dim() == 0:
        raise RuntimeError("input has shape (); expected at least one dimension")
    return input.shape[-1]


def _check_linear(
    weight: Tensor, bias: Tensor | None, weight_name: str, bias_name: str, columns: int, input: Tensor
) -> None:
    _check_operand(weight, weight_name, input)
    if weight.dim() != 2 or weight.shape[1] != columns:
        raise RuntimeError(f"{weight_name} has shape {shape_of(weight)}; expected (out, {columns})")
    if bias is None:
        return
    _check_operand(bias, bias_name, input)
    if shape_of(bias) != shape_of(weight)[:1]:
        raise RuntimeError(f"{bias_name} has shape {shape_of(bias)}; expected {shape_of(weight)[:1]}")


def _check_operand(tensor: Tensor, argument: str, input: Tensor) -> None:
    check_tensor(tensor, argument)
    check_device(tensor, argument, input)
    if tensor.dtype != input.dtype and not torch.is_autocast_enabled(input.device.type):
        raise RuntimeError(f"{argument} has dtype {tensor.dtype}; expected the input's, {input.dtype}")
