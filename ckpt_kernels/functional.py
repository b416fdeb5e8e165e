"""The blocks as functions: torch.nn.functional's own signatures, with keyword-only extras.

Each computes its whole chain in one kernel, and keeps for backward only what its docstring says; what is in
between is computed again in the backward kernel. Arithmetic is in float32 (float64 for float64 input), whatever
the dtype of the input (float32, bfloat16, float16, float64); outputs have the input's dtype. Weights and biases
may be of another floating dtype. Under CUDA autocast the inputs of row norms and group norms are cast to float32, as
those of torch's own are.

An `activation` is a name (see `ckpt_kernels.activations.NAMES`), or the torch module or function that means the
same. Errors, before anything is computed: RuntimeError for tensors of wrong shape, dtype or device; ValueError
for an unknown activation and for a probability outside [0, 1]; TypeError for what is not a tensor.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import ops
from .activations import Activation, activation_name

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


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
    return _row_norm(input, normalized_shape, weight, bias, eps, True, pre_activation, activation)


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
    Keeps the input and one number a row. Source: Zhang and Sennrich, "Root Mean Square Layer Normalization",
    2019; `torch.nn.functional.rms_norm`.
    """
    eps = _rms_eps(input, eps)
    return _row_norm(
        input,
        normalized_shape,
        weight,
        None,
        eps,
        False,
        pre_activation,
        activation,
        weight_offset,
        cast_before_weight,
    )


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
    return _add_row_norm(input, residual, normalized_shape, weight, bias, eps, True, activation, dropout_p, training)


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
    eps = _rms_eps(input, eps)
    return _add_row_norm(
        input,
        residual,
        normalized_shape,
        weight,
        None,
        eps,
        False,
        activation,
        dropout_p,
        training,
        weight_offset,
        cast_before_weight,
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
    columns = _check_input(input, normalized_shape)
    _check_like(gate, "gate", input)
    _check_coefficient(weight, "weight", input, normalized_shape)
    name = activation_name(activation)
    eps = _rms_eps(input, eps)
    input, gate, weight = _autocast(input, gate, weight)
    return ops.row_norm.gated_row_norm(input, gate, weight, columns, eps, name, bool(norm_before_gate))[0]


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

    `scale` and `shift` have the shape (*samples, *normalized_shape), where `samples` are the input's first
    dimensions; dimensions of 1 may stand for those in between, so (B, 1, N) and (B, N) both go with (B, T, N).
    Keeps input, scale, shift and two numbers a row. Source: Peebles and Xie, "Scalable Diffusion Models with
    Transformers" (DiT), 2023.
    """
    return _modulated(input, scale, shift, normalized_shape, weight, bias, eps, True, pre_activation, activation)


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
    eps = _rms_eps(input, eps)
    return _modulated(input, scale, shift, normalized_shape, weight, None, eps, False, pre_activation, activation)


def glu(gate: Tensor, value: Tensor, *, activation: Activation = "silu") -> Tensor:
    """activation(gate) * value: "silu" makes it SwiGLU, "gelu" GEGLU, "relu" ReGLU, "sigmoid" the first GLU.

    Both have the same shape. They may be views, such as the two halves of one product, and are not copied as long as
    their last dimension is contiguous. Keeps gate and value. Source: Shazeer, "GLU Variants Improve Transformer", 2020.
    """
    _check_tensor(gate, "gate")
    _check_like(value, "value", gate, "gate")
    return ops.glu.glu(gate, value, activation_name(activation))


def packed_glu(input: Tensor, *, activation: Activation = "silu", layout: str = "gate_first") -> Tensor:
    """activation(gate) * value, where the last dimension of `input` holds both; the output's is half as long.

    `layout` is "gate_first" (gate, then value: Phi-3), "value_first" (value, then gate: `torch.nn.functional.glu`), or
    "interleaved" (gate at even places, value at odd ones). Keeps the input; its gradient is written as one tensor.
    """
    _check_tensor(input, "input")
    ops.glu.layout_name(layout)
    if input.dim() == 0 or input.shape[-1] % 2:
        raise RuntimeError(f"input has shape {_shape(input)}; expected a last dimension of even length")
    return ops.glu.packed_glu(input, activation_name(activation), layout)


def bias_act(
    input: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Activation = "identity",
    dropout_p: float = 0.0,
    training: bool = True,
) -> Tensor:
    """dropout(activation(input + bias)); the bias is that of the last dimension.

    Keeps the input; for relu and leaky_relu the output instead, which whatever reads it keeps too; for the identity
    nothing. No dropout mask: the backward kernel draws it again from its seed.
    """
    _check_tensor(input, "input")
    if bias is not None:
        _check_tensor(bias, "bias")
        _check_device(bias, "bias", input)
        if input.dim() == 0 or _shape(bias) != _shape(input)[-1:]:
            raise RuntimeError(f"bias has shape {_shape(bias)}; expected that of the last dimension of {_shape(input)}")
    name = activation_name(activation)
    p, seed = _dropout(input, dropout_p, training)
    return ops.bias_act.bias_act(input, bias, seed, name, p)


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    activation: Activation = "identity",
    residual: Tensor | None = None,
    process_group: "torch.distributed.ProcessGroup | None" = None,
) -> Tensor:
    """activation((input - mean) / sqrt(var + eps) * weight + bias + residual), of (N, C, *space), by channel.

    In training mean and (biased) variance are over N and space, and the running ones, if given, move towards them by
    `momentum`, the variance unbiased; else they are the running ones. `residual` has the input's shape. With a
    `process_group` the statistics of training are over the batches of all its processes, which may differ in size.
    Contiguous and channels-last inputs are computed as they lie, and so is the output.

    Keeps the input and five numbers a channel; with a residual also, for relu and leaky_relu, the output, which
    whatever reads it keeps too, or, for other activations but the identity, the residual. Errors leave the running
    statistics as they were. Source: Ioffe and Szegedy, "Batch Normalization", 2015; `torch.nn.functional.batch_norm`.
    """
    _check_channels(input, weight, bias)
    if residual is not None:
        _check_like(residual, "residual", input)
    _check_coefficient(running_mean, "running_mean", input, input.shape[1])
    _check_coefficient(running_var, "running_var", input, input.shape[1])
    name = activation_name(activation)
    if not training:
        if running_mean is None or running_var is None:
            raise RuntimeError("running_mean or running_var is None; expected both where training is False")
        return ops.channel_norm.channel_norm(
            input, residual, weight, bias, running_mean, running_var, 0, float(eps), name
        )[0]
    if process_group is not None:
        output, mean, var, count = ops.sync_batch_norm.sync_batch_norm(
            input, residual, weight, bias, float(eps), name, process_group
        )
    else:
        count = input.numel() // max(input.shape[1], 1)
        if count == 1:
            raise ValueError(
                f"input has shape {_shape(input)}; expected more than 1 value per channel where training is True"
            )
        output, mean, var = ops.channel_norm.channel_norm(
            input, residual, weight, bias, None, None, 0, float(eps), name
        )
    _move(running_mean, mean, momentum)
    _move(running_var, var * (count / max(count - 1, 1)), momentum)
    return output


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    activation: Activation = "identity",
) -> Tensor:
    """activation((input - mean) / sqrt(var + eps) * weight + bias), of (N, C, *space), by sample and group of channels.

    Mean and (biased) variance are over the C / num_groups channels of a group and space. Contiguous and channels-last
    inputs are computed as they lie, and so is the output. Keeps the input, two numbers a group and three a channel, of
    each sample. Source: Wu and He, "Group Normalization", 2018; `torch.nn.functional.group_norm`.
    """
    _check_channels(input, weight, bias)
    if num_groups < 1 or input.shape[1] % num_groups:
        raise RuntimeError(f"num_groups is {num_groups}; expected a divisor of the channels of {_shape(input)}")
    name = activation_name(activation)
    input, weight, bias = _autocast(input, weight, bias)
    return ops.channel_norm.channel_norm(input, None, weight, bias, None, None, int(num_groups), float(eps), name)[0]


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    activation: Activation = "identity",
) -> Tensor:
    """activation((input - mean) / sqrt(var + eps) * weight + bias), of (N, C, *space), by sample and channel.

    With `use_input_stats` mean and (biased) variance are over space, and the running ones, if given, move by `momentum`
    towards their means over the samples, the variance unbiased; without, they are the running ones. Keeps the input and
    five numbers for each channel of each sample. Source: Ulyanov et al., "Instance Normalization", 2016;
    `torch.nn.functional.instance_norm`.
    """
    _check_channels(input, weight, bias)
    _check_coefficient(running_mean, "running_mean", input, input.shape[1])
    _check_coefficient(running_var, "running_var", input, input.shape[1])
    if not use_input_stats:
        return batch_norm(input, running_mean, running_var, weight, bias, False, 0.0, eps, activation=activation)
    size = math.prod(input.shape[2:])
    if size == 1:
        raise ValueError(f"input has shape {_shape(input)}; expected more than 1 element in space")
    output, mean, var = ops.channel_norm.channel_norm(
        input, None, weight, bias, None, None, input.shape[1], float(eps), activation_name(activation)
    )
    _move(running_mean, mean.mean(0), momentum)
    _move(running_var, var.mean(0) * (size / max(size - 1, 1)), momentum)
    return output


def _move(running: Tensor | None, towards: Tensor, momentum: float) -> None:
    if running is not None:
        with torch.no_grad():
            running.mul_(1 - momentum).add_(towards.to(running.dtype), alpha=momentum)


def _check_channels(input: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    _check_tensor(input, "input")
    if input.dim() < 2:
        raise RuntimeError(f"input has shape {_shape(input)}; expected (N, C, *space)")
    _check_coefficient(weight, "weight", input, input.shape[1])
    _check_coefficient(bias, "bias", input, input.shape[1])


def _dropout(input: Tensor, dropout_p: float, training: bool) -> tuple[float, Tensor | None]:
    """The probability, and a seed drawn from torch's generator of the input's device, and left there."""
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p is {dropout_p}; expected a probability between 0 and 1")
    p = float(dropout_p) if training else 0.0
    return p, torch.randint(-(2**63), 2**63 - 1, (1,), device=input.device) if p else None


def _row_norm(
    input: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    centered: bool,
    pre_activation: Activation,
    activation: Activation,
    weight_offset: float = 0.0,
    cast_before_weight: bool = False,
) -> Tensor:
    columns = _check_input(input, normalized_shape)
    _check_coefficient(weight, "weight", input, normalized_shape)
    _check_coefficient(bias, "bias", input, normalized_shape)
    pre, post = activation_name(pre_activation, "pre_activation"), activation_name(activation)
    input, weight, bias = _autocast(input, weight, bias)
    return ops.row_norm.row_norm(
        input, weight, bias, columns, eps, centered, pre, post, float(weight_offset), bool(cast_before_weight)
    )[0]


def _add_row_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    centered: bool,
    activation: Activation,
    dropout_p: float,
    training: bool,
    weight_offset: float = 0.0,
    cast_before_weight: bool = False,
) -> tuple[Tensor, Tensor]:
    columns = _check_input(input, normalized_shape)
    _check_like(residual, "residual", input)
    _check_coefficient(weight, "weight", input, normalized_shape)
    _check_coefficient(bias, "bias", input, normalized_shape)
    name = activation_name(activation)
    p, seed = _dropout(input, dropout_p, training)
    input, residual, weight, bias = _autocast(input, residual, weight, bias)
    return ops.row_norm.add_row_norm(
        input,
        residual,
        weight,
        bias,
        seed,
        columns,
        eps,
        centered,
        name,
        float(weight_offset),
        bool(cast_before_weight),
        p,
    )


def _modulated(
    input: Tensor,
    scale: Tensor,
    shift: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    centered: bool,
    pre_activation: Activation,
    activation: Activation,
) -> Tensor:
    columns = _check_input(input, normalized_shape)
    _check_modulation(scale, "scale", input, normalized_shape)
    _check_modulation(shift, "shift", input, normalized_shape)
    if scale.numel() != shift.numel():
        raise RuntimeError(f"shift has shape {_shape(shift)}; expected that of scale, {_shape(scale)}")
    _check_coefficient(weight, "weight", input, normalized_shape)
    _check_coefficient(bias, "bias", input, normalized_shape)
    pre, post = activation_name(pre_activation, "pre_activation"), activation_name(activation)
    input, scale, shift, weight, bias = _autocast(input, scale, shift, weight, bias)
    return ops.row_norm.modulated_row_norm(input, scale, shift, weight, bias, columns, eps, centered, pre, post)[0]


def _rms_eps(input: Tensor, eps: float | None) -> float:
    if eps is not None:
        return float(eps)
    wide = isinstance(input, Tensor) and input.dtype == torch.float64
    return torch.finfo(torch.float64 if wide else torch.float32).eps


def _autocast(*tensors: Tensor | None) -> Sequence[Tensor | None]:
    """In float32 under CUDA autocast; torch's CPU autocast leaves norms alone."""
    if tensors[0].device.type == "cuda" and torch.is_autocast_enabled("cuda"):
        return [None if t is None else t.float() for t in tensors]
    return tensors


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def _normalized_shape(normalized_shape: int | Sequence[int]) -> tuple[int, ...]:
    return (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)


def _check_tensor(tensor: Tensor, argument: str) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{argument} is {type(tensor).__name__}; expected a tensor")
    if tensor.dtype not in _DTYPES:
        raise RuntimeError(f"{argument} has dtype {tensor.dtype}; expected float32, bfloat16, float16 or float64")


def _check_input(input: Tensor, normalized_shape: int | Sequence[int]) -> int:
    """The number of elements that are normalised together."""
    _check_tensor(input, "input")
    shape = _normalized_shape(normalized_shape)
    if not shape:
        raise RuntimeError("normalized_shape is empty; expected at least one dimension")
    if len(shape) > input.dim() or tuple(input.shape[-len(shape) :]) != shape:
        raise RuntimeError(f"input has shape {_shape(input)}; expected its last dimensions to be {shape}")
    columns = math.prod(shape)
    if columns == 0:
        raise RuntimeError(f"normalized_shape is {shape}; expected at least one element")
    return columns


def _check_device(tensor: Tensor, argument: str, input: Tensor, name: str = "input") -> None:
    if tensor.device != input.device:
        raise RuntimeError(f"{argument} is on {tensor.device}; expected it on {input.device}, where {name} is")


def _check_like(tensor: Tensor, argument: str, input: Tensor, name: str = "input") -> None:
    _check_tensor(tensor, argument)
    _check_device(tensor, argument, input, name)
    if tensor.shape != input.shape:
        raise RuntimeError(f"{argument} has shape {_shape(tensor)}; expected the {name}'s, {_shape(input)}")
    if tensor.dtype != input.dtype:
        raise RuntimeError(f"{argument} has dtype {tensor.dtype}; expected the {name}'s, {input.dtype}")


def _check_coefficient(
    tensor: Tensor | None, argument: str, input: Tensor, normalized_shape: int | Sequence[int]
) -> None:
    if tensor is None:
        return
    _check_tensor(tensor, argument)
    _check_device(tensor, argument, input)
    shape = _normalized_shape(normalized_shape)
    if tuple(tensor.shape) != shape:
        raise RuntimeError(f"{argument} has shape {_shape(tensor)}; expected {shape}")


def _check_modulation(tensor: Tensor, argument: str, input: Tensor, normalized_shape: int | Sequence[int]) -> None:
    _check_tensor(tensor, argument)
    _check_device(tensor, argument, input)
    shape = _normalized_shape(normalized_shape)
    lead = tuple(input.shape[: input.dim() - len(shape)])
    samples = tuple(tensor.shape[: tensor.dim() - len(shape)])
    while samples and samples[-1] == 1:
        samples = samples[:-1]
    if tuple(tensor.shape[-len(shape) :]) != shape or samples != lead[: len(samples)]:
        raise RuntimeError(
            f"{argument} has shape {_shape(tensor)}; expected (*samples, *normalized_shape), where the samples are "
            f"the first dimensions of input, which has shape {_shape(input)} and normalized_shape {shape}"
        )
