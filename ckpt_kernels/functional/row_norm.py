"""Row norms: over the last dimensions."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import ops, thin
from ..activations import Activation, activation_name
from .checks import (
    autocast,
    check_coefficient,
    check_input,
    check_like,
    check_modulation,
    dropout_seed,
    memory_format,
    number,
    promoted,
    rms_eps,
    shape_of,
)


def layer_norm(
    input: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    activation: Activation = "identity",
    pre_activation: Activation = "identity",
) -> Tensor:
    """activation(LayerNorm(pre_activation(input))): y = act((u - mean) / sqrt(var + eps) * weight + bias).

    Mean and (biased) variance are over the last dimensions, which must be `normalized_shape`; `weight` and `bias`
    have that shape. Keeps the input and two numbers a row. Source: Ba et al., "Layer Normalization", 2016;
    `torch.nn.functional.layer_norm`.
    """
    call = (input, weight, bias), (normalized_shape, eps, True, pre_activation, activation, 0.0, False)
    plan = thin.plan_of("row_norm", *call)
    return plan(input, weight, bias) if plan is not None else _row_norm(*call)


def rms_norm(
    input: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    activation: Activation = "identity",
    pre_activation: Activation = "identity",
    weight_offset: float = 0.0,
    cast_before_weight: bool = False,
) -> Tensor:
    """activation(RMSNorm(pre_activation(input))): y = act(u / sqrt(mean(u**2) + eps) * (weight_offset + weight)).

    `eps=None` is the epsilon of the type that is computed in, as torch's. `weight_offset=1` is Gemma's 1 + weight;
    `cast_before_weight` rounds the normalised value to the input's dtype before the product, as Llama does.
    Keeps the input and one number a row. The output is contiguous, or, as torch's, channels last where the input is.
    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019; `torch.nn.functional.rms_norm`.
    """
    call = (
        (input, weight, None),
        (normalized_shape, eps, False, pre_activation, activation, weight_offset, cast_before_weight),
    )
    plan = thin.plan_of("row_norm", *call)
    if plan is not None and input.is_contiguous():
        return plan(input, weight, None)
    output = _row_norm(*call)
    format = memory_format(input)
    return output if format == torch.contiguous_format else output.contiguous(memory_format=format)


def add_layer_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    activation: Activation = "identity",
    dropout_p: float = 0.0,
    training: bool = True,
) -> tuple[Tensor, Tensor]:
    """residual_out = residual + dropout(input); output = activation(LayerNorm(residual_out)).

    Returns (output, residual_out), both of the input's shape. Keeps residual_out, which is what the network goes
    on with, and two numbers a row; no dropout mask, which the backward kernel draws again from its seed.
    """
    return _add_row_norm(
        (input, residual, weight, bias), (normalized_shape, eps, True, activation, dropout_p, training, 0.0, False)
    )


def add_rms_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    activation: Activation = "identity",
    dropout_p: float = 0.0,
    training: bool = True,
    weight_offset: float = 0.0,
    cast_before_weight: bool = False,
) -> tuple[Tensor, Tensor]:
    """residual_out = residual + dropout(input); output = activation(RMSNorm(residual_out)).

    Returns (output, residual_out). Keeps residual_out and one number a row. See `rms_norm` for `eps`,
    `weight_offset` and `cast_before_weight`.
    """
    return _add_row_norm(
        (input, residual, weight, None),
        (normalized_shape, eps, False, activation, dropout_p, training, weight_offset, cast_before_weight),
    )


def gated_rms_norm(
    input: Tensor,
    gate: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    activation: Activation = "silu",
    norm_before_gate: bool = True,
) -> Tensor:
    """RMSNorm(input) * activation(gate), or RMSNorm(input * activation(gate)) without `norm_before_gate`.

    `gate` has the input's shape. Keeps input, gate and one number a row. Source: Dao and Gu, "Transformers are
    SSMs" (Mamba-2), 2024.
    """
    call = "gated_row_norm", (input, gate, weight), (normalized_shape, eps, activation, norm_before_gate)
    plan = thin.plan_of(*call)
    if plan is not None:
        return plan(input, gate, weight)
    input, gate = promoted(input, gate)
    columns = check_input(input, normalized_shape)
    check_like(gate, "gate", input)
    check_coefficient(weight, "weight", input, normalized_shape)
    options = (columns, rms_eps(input, eps), activation_name(activation), bool(norm_before_gate))
    thin.remember(thin.row_norm.gated_row_norm(input, gate, weight, options), *call)
    input, gate, weight = autocast(input, gate, weight)
    return ops.row_norm.gated_row_norm(input, gate, weight, *options)[0]


def modulated_layer_norm(
    input: Tensor,
    scale: Tensor,
    shift: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    activation: Activation = "identity",
    pre_activation: Activation = "identity",
) -> Tensor:
    """activation(LayerNorm(pre_activation(input)) * (1 + scale) + shift), with a scale and shift for each sample.

    `scale` and `shift` have the shape `(*samples, *normalized_shape)`, where `samples` are the input's first
    dimensions; dimensions of 1 may stand for those in between, so (B, 1, N) and (B, N) both go with (B, T, N).
    Keeps input, scale, shift and two numbers a row. Source: Peebles and Xie, "Scalable Diffusion Models with
    Transformers" (DiT), 2023.
    """
    return _modulated((input, scale, shift, weight, bias), (normalized_shape, eps, True, pre_activation, activation))


def modulated_rms_norm(
    input: Tensor,
    scale: Tensor,
    shift: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    activation: Activation = "identity",
    pre_activation: Activation = "identity",
) -> Tensor:
    """activation(RMSNorm(pre_activation(input)) * (1 + scale) + shift); see `modulated_layer_norm`."""
    return _modulated((input, scale, shift, weight, None), (normalized_shape, eps, False, pre_activation, activation))


def _row_norm(tensors: Sequence[Tensor | None], given: tuple) -> Tensor:
    """Of (input, weight, bias), and the options as they were given."""
    input, weight, bias = tensors
    normalized_shape, eps, centered, pre_activation, activation, weight_offset, cast_before_weight = given
    eps = number(eps, "eps") if centered else rms_eps(input, eps)
    columns = check_input(input, normalized_shape)
    check_coefficient(weight, "weight", input, normalized_shape)
    check_coefficient(bias, "bias", input, normalized_shape)
    options = (
        columns,
        eps,
        centered,
        activation_name(pre_activation, "pre_activation"),
        activation_name(activation),
        number(weight_offset, "weight_offset"),
        bool(cast_before_weight),
    )
    thin.remember(thin.row_norm.row_norm(input, weight, bias, options), "row_norm", tensors, given)
    input, weight, bias = autocast(input, weight, bias)
    return ops.row_norm.row_norm(input, weight, bias, *options)[0]


def _add_row_norm(tensors: Sequence[Tensor | None], given: tuple) -> tuple[Tensor, Tensor]:
    """Of (input, residual, weight, bias), and the options as they were given."""
    input, residual, weight, bias = tensors
    normalized_shape, eps, centered, activation, dropout_p, training, weight_offset, cast_before_weight = given
    plan = thin.plan_of("add_row_norm", tensors, given)
    if plan is not None:
        seed = dropout_seed(input, dropout_p, training)[1] if dropout_p and training else None
        return plan(input, residual, weight, bias, seed)
    input, residual = promoted(input, residual)
    eps = number(eps, "eps") if centered else rms_eps(input, eps)
    columns = check_input(input, normalized_shape)
    check_like(residual, "residual", input)
    check_coefficient(weight, "weight", input, normalized_shape)
    check_coefficient(bias, "bias", input, normalized_shape)
    name, offset = activation_name(activation), number(weight_offset, "weight_offset")
    p, seed = dropout_seed(input, dropout_p, training)
    options = (columns, eps, centered, name, offset, bool(cast_before_weight), p)
    thin.remember(thin.row_norm.add_row_norm(input, residual, weight, bias, options), "add_row_norm", tensors, given)
    input, residual, weight, bias = autocast(input, residual, weight, bias)
    return ops.row_norm.add_row_norm(input, residual, weight, bias, seed, *options)


def _modulated(tensors: Sequence[Tensor | None], given: tuple) -> Tensor:
    """Of (input, scale, shift, weight, bias), and the options as they were given."""
    plan = thin.plan_of("modulated_row_norm", tensors, given)
    if plan is not None:
        return plan(*tensors)
    input, scale, shift, weight, bias = tensors
    normalized_shape, eps, centered, pre_activation, activation = given
    eps = number(eps, "eps") if centered else rms_eps(input, eps)
    # What is given for a sample is not given for rows of which samples have different numbers.
    columns = check_input(input, normalized_shape, nested=False)
    check_modulation(scale, "scale", input, normalized_shape)
    check_modulation(shift, "shift", input, normalized_shape)
    if scale.numel() != shift.numel():
        raise RuntimeError(f"shift has shape {shape_of(shift)}; expected that of scale, {shape_of(scale)}")
    check_coefficient(weight, "weight", input, normalized_shape)
    check_coefficient(bias, "bias", input, normalized_shape)
    names = activation_name(pre_activation, "pre_activation"), activation_name(activation)
    options = (columns, eps, centered, *names)
    known = thin.row_norm.modulated_row_norm(*tensors, options)
    thin.remember(known, "modulated_row_norm", tensors, given)
    return ops.row_norm.modulated_row_norm(*autocast(input, scale, shift, weight, bias), *options)[0]
