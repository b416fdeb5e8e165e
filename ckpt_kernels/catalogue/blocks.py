"""Lists the functions that compute one block, each as an eager twin with declared options, kept tensors and traffic.

All contract tests run on each entry of `BLOCKS`, and the tables of README and docs have a row for each function.
"""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..activations import NAMES, SIGNED_BY_OUTPUT
from ..backends.reference import ACTIVATIONS as ACT
from .block import block, groups_of


def dropout(x: Tensor, p: float) -> Tensor:
    """Apply torch's dropout unless p is 0."""
    return F.dropout(x, p) if p else x


def _add(dropout_p: float, **options: Any) -> dict[str, Any]:
    """Return the fields of add-norm blocks. Without dropout the gradients of input and residual are one tensor."""
    return {"rows": ("input", "residual"), "outputs": 2, "kept": ("output 1",), "gradients": 2 if dropout_p else 1}


def _elementwise(activation: str, **options: Any) -> dict[str, Any]:
    """Return the fields of bias_act. An activation in SIGNED_BY_OUTPUT keeps the output, as the consumer does too."""
    if activation == "identity":
        return {"kept": (), "gradients": 0}
    return {"kept": ("output 0",) if activation in SIGNED_BY_OUTPUT else ("input",)}


def _sum(activation: str, **options: Any) -> dict[str, Any]:
    """Return the fields of act(norm(input) + residual).

    The derivative of the activation follows from the sign of the output, or else from the sum, for which the residual
    is kept. Without an activation the gradient of the residual is the incoming gradient.
    """
    if activation == "identity":
        return {"gradients": 1}
    return {"kept": ("input", "output 0" if activation in SIGNED_BY_OUTPUT else "residual")}


_RMS: dict[str, Any] = {"coefficients": ("weight",), "statistics": lambda samples, tokens: samples * tokens}
_NO_NORM: dict[str, Any] = {"coefficients": (), "statistics": lambda samples, tokens: 0}
_MODULATED: dict[str, Any] = {"samples": ("scale", "shift"), "kept": ("input", "scale", "shift")}


@block("layer_norm")
def layer_norm(
    input: Tensor, weight: Tensor, bias: Tensor, *, activation: str = "identity", pre_activation: str = "identity"
) -> Tensor:
    """act(norm(pre_act(input)))"""
    return ACT[activation](F.layer_norm(ACT[pre_activation](input), weight.shape, weight, bias))


@block("rms_norm", **_RMS)
def rms_norm(
    input: Tensor,
    weight: Tensor,
    *,
    activation: str = "identity",
    pre_activation: str = "identity",
    weight_offset: float = 0.0,
    eps: float = 1e-6,
) -> Tensor:
    """act(norm(pre_act(input)))"""
    factor = weight + weight_offset if weight_offset else weight
    return ACT[activation](F.rms_norm(ACT[pre_activation](input), weight.shape, factor, eps))


@block("rms_norm", **_RMS)
def rms_norm_cast(input: Tensor, weight: Tensor, *, cast_before_weight: bool = True, eps: float = 1e-6) -> Tensor:
    """act(norm(pre_act(input)))"""
    wide = input.float() if input.dtype != torch.float64 else input
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(input.dtype)


@block("add_layer_norm", _add)
def add_layer_norm(
    input: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    activation: str = "identity",
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """r = residual + dropout(input); act(norm(r)), r"""
    total = residual + dropout(input, dropout_p)
    return ACT[activation](F.layer_norm(total, weight.shape, weight, bias)), total


@block("add_rms_norm", _add, **_RMS)
def add_rms_norm(
    input: Tensor, residual: Tensor, weight: Tensor, *, activation: str = "identity", dropout_p: float = 0.0
) -> tuple[Tensor, Tensor]:
    """r = residual + dropout(input); act(norm(r)), r"""
    total = residual + dropout(input, dropout_p)
    return ACT[activation](F.rms_norm(total, weight.shape, weight)), total


@block("gated_rms_norm", rows=("input", "gate"), kept=("input", "gate"), **_RMS)
def gated_rms_norm(
    input: Tensor, gate: Tensor, weight: Tensor, *, activation: str, norm_before_gate: bool = True, eps: float = 1e-6
) -> Tensor:
    """norm(input) * act(gate), or norm(input * act(gate))"""
    factor = ACT[activation](gate)
    if norm_before_gate:
        return F.rms_norm(input, weight.shape, weight, eps) * factor
    return F.rms_norm(input * factor, weight.shape, weight, eps)


@block("modulated_layer_norm", **_MODULATED)
def modulated_layer_norm(
    input: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, bias: Tensor, *, activation: str = "identity"
) -> Tensor:
    """act(norm(pre_act(input)) * (1 + scale) + shift)"""
    return ACT[activation](F.layer_norm(input, weight.shape, weight, bias) * (1 + scale) + shift)


@block("modulated_rms_norm", **_MODULATED, **_RMS)
def modulated_rms_norm(
    input: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, *, activation: str = "identity"
) -> Tensor:
    """act(norm(pre_act(input)) * (1 + scale) + shift)"""
    return ACT[activation](F.rms_norm(input, weight.shape, weight) * (1 + scale) + shift)


@block("glu", rows=("gate", "value"), kept=("gate", "value"), **_NO_NORM)
def glu(gate: Tensor, value: Tensor, *, activation: str, limit: float | None = None, offset: float = 0.0) -> Tensor:
    """act(gate) * value"""
    gate, value = _limited(gate, value, limit, offset)
    return ACT[activation](gate) * value


@block("packed_glu", packed=True, **_NO_NORM)
def packed_glu(
    input: Tensor,
    *,
    activation: str,
    layout: str = "gate_first",
    limit: float | None = None,
    offset: float = 0.0,
) -> Tensor:
    """act(gate) * value, both in one input"""
    first, second = (input[..., ::2], input[..., 1::2]) if layout == "interleaved" else input.chunk(2, -1)
    gate, value = _limited(*((second, first) if layout == "value_first" else (first, second)), limit, offset)
    return ACT[activation](gate) * value


def _limited(gate: Tensor, value: Tensor, limit: float | None, offset: float) -> tuple[Tensor, Tensor]:
    if limit is not None:
        gate, value = gate.clamp(max=limit), value.clamp(-limit, limit)
    return gate, value + offset if offset else value


@block("bias_act", _elementwise, **_NO_NORM | {"coefficients": ("bias",)})
def bias_act(input: Tensor, bias: Tensor | None = None, *, activation: str, dropout_p: float = 0.0) -> Tensor:
    """dropout(act(input + bias))"""
    return dropout(ACT[activation](input if bias is None else input + bias), dropout_p)


@block("dyt", numbers=("alpha",), statistics=_NO_NORM["statistics"])
def dyt(input: Tensor, alpha: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """tanh(alpha * input) * weight + bias"""
    output = torch.tanh(alpha * input)
    output = output if weight is None else output * weight
    return output if bias is None else output + bias


def _rotated(input: Tensor, cos: Tensor, sin: Tensor, layout: str) -> Tensor:
    """Rotate the pairs in the first columns of heads; the other columns pass."""
    rotary_dim = 2 * cos.shape[-1]
    part, rest = input[..., :rotary_dim], input[..., rotary_dim:]
    if layout == "interleaved":
        first, second = part[..., ::2], part[..., 1::2]
        pairs = first * cos - second * sin, second * cos + first * sin
        return torch.cat((torch.stack(pairs, -1).flatten(-2), rest), -1)
    first, second = part.chunk(2, -1)
    cos, sin = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)
    return torch.cat((part * cos + torch.cat((-second, first), -1) * sin, rest), -1)


@block("rotary", tables=("cos", "sin"), kept=("cos", "sin"), **_NO_NORM)
def rotary(input: Tensor, cos: Tensor, sin: Tensor, *, layout: str = "halves") -> Tensor:
    """pairs of input turned"""
    return _rotated(input, cos, sin, layout)


@block(
    "rotary",
    tables=("cos", "sin"),
    kept=("input", "cos", "sin"),
    coefficients=("weight",),
    statistics=_NO_NORM["statistics"],
)
def rms_norm_rotary(
    input: Tensor,
    cos: Tensor,
    sin: Tensor,
    weight: Tensor,
    *,
    norm: str = "rms",
    eps: float = 1e-6,
    layout: str = "halves",
) -> Tensor:
    """pairs of norm(input) turned"""
    return _rotated(F.rms_norm(input, weight.shape, weight, eps), cos, sin, layout)


@block("rotary", tables=("cos", "sin"), kept=("input", "cos", "sin"), statistics=_NO_NORM["statistics"])
def layer_norm_rotary(
    input: Tensor,
    cos: Tensor,
    sin: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    norm: str = "layer",
    eps: float = 1e-6,
    layout: str = "halves",
) -> Tensor:
    """pairs of norm(input) turned"""
    return _rotated(F.layer_norm(input, weight.shape, weight, bias, eps), cos, sin, layout)


_BATCH: dict[str, Any] = {"channels": True, "statistics": lambda samples, channels: 2 * channels}


@block("batch_norm", **_BATCH)
def batch_norm(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    running_mean: None = None,
    running_var: None = None,
    training: bool = True,
    activation: str = "identity",
) -> Tensor:
    """act(norm(input))"""
    return ACT[activation](F.batch_norm(input, running_mean, running_var, weight, bias, training))


@block("batch_norm", _sum, rows=("input", "residual"), **_BATCH)
def add_batch_norm(
    input: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    running_mean: None = None,
    running_var: None = None,
    training: bool = True,
    activation: str = "identity",
) -> Tensor:
    """act(norm(input) + residual)"""
    return ACT[activation](F.batch_norm(input, running_mean, running_var, weight, bias, training) + residual)


@block("group_norm", channels=True, statistics=lambda samples, channels: 2 * samples * groups_of(channels))
def group_norm(input: Tensor, weight: Tensor, bias: Tensor, *, activation: str = "identity") -> Tensor:
    """act(norm(input))"""
    return ACT[activation](F.group_norm(input, groups_of(input.shape[1]), weight, bias))


@block("instance_norm", channels=True, statistics=lambda samples, channels: 2 * samples * channels)
def instance_norm(input: Tensor, weight: Tensor, bias: Tensor, *, activation: str = "identity") -> Tensor:
    """act(norm(input))"""
    return ACT[activation](F.instance_norm(input, None, None, weight, bias))


# Some blocks of each function, for the contracts that do not depend on the activation.
BLOCKS = (
    layer_norm("layer_norm"),
    layer_norm("layer_norm+gelu", activation="gelu"),
    rms_norm("rms_norm"),
    rms_norm("rms_norm+silu", activation="silu"),
    rms_norm("silu+rms_norm (offset)", pre_activation="silu", weight_offset=1.0),
    rms_norm_cast("rms_norm (cast)"),
    add_layer_norm("add_layer_norm"),
    add_layer_norm("add_layer_norm+gelu_tanh", activation="gelu_tanh"),
    add_rms_norm("add_rms_norm"),
    add_rms_norm("add_rms_norm+silu", activation="silu"),
    gated_rms_norm("gated_rms_norm (silu, norm first)", activation="silu"),
    gated_rms_norm("gated_rms_norm (sigmoid, gate first)", activation="sigmoid", norm_before_gate=False),
    modulated_layer_norm("modulated_layer_norm"),
    modulated_layer_norm("modulated_layer_norm+silu", activation="silu"),
    modulated_rms_norm("modulated_rms_norm"),
    glu("glu (silu)", activation="silu"),
    packed_glu("packed_glu (gelu)", activation="gelu"),
    packed_glu("packed_glu (sigmoid, value first)", activation="sigmoid", layout="value_first"),
    packed_glu("packed_glu (silu, interleaved)", activation="silu", layout="interleaved"),
    glu("glu (silu, limited)", activation="silu", limit=0.75),
    packed_glu("packed_glu (limited)", activation="quick_gelu", layout="interleaved", limit=0.75, offset=1.0),
    bias_act("bias_act (gelu)", activation="gelu"),
    replace(bias_act("bias_act (silu, no bias)", activation="silu"), coefficients=()),
    bias_act("bias_act (relu)", activation="relu"),
    bias_act("bias_act (identity)", activation="identity"),
    dyt("dyt"),
    replace(dyt("dyt (alpha alone)"), coefficients=()),
    rotary("rotary"),
    rotary("rotary (interleaved)", layout="interleaved"),
    rms_norm_rotary("rms_norm+rotary"),
    layer_norm_rotary("layer_norm+rotary (interleaved)", layout="interleaved"),
    batch_norm("batch_norm"),
    batch_norm("batch_norm+relu", activation="relu"),
    add_batch_norm("batch_norm+add+relu", activation="relu"),
    add_batch_norm("batch_norm+add+silu", activation="silu"),
    add_batch_norm("batch_norm+add"),
    group_norm("group_norm"),
    group_norm("group_norm+silu", activation="silu"),
    instance_norm("instance_norm+leaky_relu", activation="leaky_relu"),
)

# Every activation in every place of an activation.
ACTIVATION_BLOCKS = (
    *(layer_norm(f"layer_norm+{name}", activation=name) for name in NAMES),
    *(layer_norm(f"{name}+layer_norm", pre_activation=name) for name in NAMES),
    *(gated_rms_norm(f"gated_rms_norm ({name}, norm first)", activation=name) for name in NAMES),
    *(gated_rms_norm(f"gated_rms_norm ({n}, gate first)", activation=n, norm_before_gate=False) for n in NAMES),
    *(glu(f"glu ({name})", activation=name) for name in NAMES),
    *(bias_act(f"bias_act ({name})", activation=name) for name in NAMES),
    *(batch_norm(f"batch_norm+{name}", activation=name) for name in NAMES),
    *(add_batch_norm(f"batch_norm+add+{name}", activation=name) for name in NAMES),
)

# Blocks with random results, which are not compared with those of eager torch.
DROPOUT_BLOCKS = (
    add_layer_norm("add_layer_norm (dropout)", dropout_p=0.1),
    bias_act("bias_act (gelu, dropout)", activation="gelu", dropout_p=0.1),
)

BY_NAME = {entry.name: entry for entry in (*ACTIVATION_BLOCKS, *BLOCKS, *DROPOUT_BLOCKS)}
