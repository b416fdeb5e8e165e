"""Functions that compute one block, with choices of their options: the same in eager torch, what may be kept for
backward, and what must cross memory. What is in `BLOCKS` is held to all contracts, and stands in the tables."""

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import functional
from ..activations import NAMES, SIGNED_BY_OUTPUT
from ..backends.reference import ACTIVATIONS as ACT

Operands = dict[str, Tensor]
Function = Callable[..., tuple[Tensor, ...]]


class Traffic(NamedTuple):
    """What must cross memory in one pass, in tensors of the block's shape."""

    read: int
    written: int


@dataclass(frozen=True)
class Block:
    """One public function with one choice of options.

    `call` is ours, `eager` the same in eager torch; both take the operands by name and return a tuple of `outputs`
    tensors. `rows` have the block's shape, or twice its columns where they are `packed`; `coefficients` are vectors, as
    long as the columns or, where there are `channels`, as the second dimension; `samples` have a row for each index of
    the first dimension. `kept` names what may be kept for backward ("output 1" is the second output); `statistics`
    tells how many numbers beside these, for an input of (samples, tokens or channels, ...). `gradients` is how many
    tensors of the block's shape the backward pass writes, if not one for each of `rows`.
    """

    name: str
    function: str
    formula: str
    options: Mapping[str, Any]
    call: Function
    eager: Function
    rows: Sequence[str] = ("input",)
    coefficients: Sequence[str] = ("weight", "bias")
    samples: Sequence[str] = ()
    packed: bool = False
    channels: bool = False
    outputs: int = 1
    kept: Sequence[str] = ("input",)
    statistics: Callable[[int, int], int] = lambda samples, tokens: 2 * samples * tokens
    gradients: int | None = None

    def operands(self, lead: Sequence[int], columns: int, dtype: torch.dtype, device: str, seed: int = 0) -> Operands:
        """Random operands, all wanting gradients, the coefficients as parameters; `lead` has two dimensions or more."""
        shapes = {name: (*lead, 2 * columns if self.packed else columns) for name in self.rows}
        shapes |= {name: (lead[1] if self.channels else columns,) for name in self.coefficients}
        shapes |= {name: (lead[0], *[1] * (len(lead) - 1), columns) for name in self.samples}
        return random_operands(shapes, self.coefficients, dtype, device, seed)

    @property
    def forward(self) -> Traffic:
        """Operands are read once, and the input of a channel norm again when its statistics are known."""
        return Traffic(self._tensors(self.rows) + self.channels, self.outputs)

    @property
    def backward(self) -> Traffic:
        """What is kept and the incoming gradients are read, by a channel norm again when its sums are known."""
        read = self._tensors(self.kept) + self.outputs
        written = self._tensors(self.rows) if self.gradients is None else self.gradients
        return Traffic(2 * read if self.channels else read, written)

    def _tensors(self, names: Sequence[str]) -> int:
        """How many tensors of the block's shape they are."""
        return (2 if self.packed else 1) * len(set(names).difference(self.samples))


def random_operands(
    shapes: Mapping[str, Sequence[int]], parameters: Collection[str], dtype: torch.dtype, device: str, seed: int
) -> Operands:
    """Random tensors that want gradients: weights of linear layers scaled by their width, those of norms around 1."""
    generator = torch.Generator(device).manual_seed(seed)
    found = {}
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=generator, dtype=torch.float64, device=device)
        if name in parameters and len(shape) == 2:
            values *= shape[1] ** -0.5
        elif name == "weight":
            values += 1
        found[name] = nn.Parameter(values.to(dtype)) if name in parameters else values.to(dtype).requires_grad_()
    return found


def calls_of(function: str, twin: Callable, given: Mapping[str, Any]) -> dict[str, Any]:
    """A function and its eager twin as `Block` and `Pair` have them. Parameters of the twin are the operands and, where
    they are keyword-only, options of both; its docstring is the formula."""
    ours = getattr(functional, function)
    parameters = tuple(inspect.signature(ours).parameters)
    weight = "norm_weight" if "norm_weight" in parameters else "weight"
    own = inspect.signature(twin).parameters.values()
    options = {p.name: p.default for p in own if p.kind is p.KEYWORD_ONLY} | given

    def call(**operands: Any) -> tuple[Tensor, ...]:
        if "normalized_shape" in parameters:
            operands["normalized_shape"] = operands[weight].shape
        if "num_groups" in parameters:
            operands["num_groups"] = groups_of(operands["input"].shape[1])
        return as_tuple(ours(**operands, **options))

    def eager(**operands: Tensor) -> tuple[Tensor, ...]:
        return as_tuple(twin(**operands, **options))

    return {"function": function, "formula": twin.__doc__, "options": options, "call": call, "eager": eager}


def as_tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def groups_of(channels: int) -> int:
    """32, as most networks have, or what there is for fewer channels."""
    return next(groups for groups in (32, 2, 1) if channels % groups == 0)


def _block(function: str, by: Callable[..., dict[str, Any]] = lambda **options: {}, **declared: Any) -> Callable:
    """Makes of an eager twin what makes blocks, of a name and options; `by` tells what of a block depends on these."""

    def of(twin: Callable) -> Callable[..., Block]:
        def block(name: str, **given: Any) -> Block:
            calls = calls_of(function, twin, given)
            return Block(name, **calls, **declared, **by(**calls["options"]))

        return block

    return of


def _dropout(x: Tensor, p: float) -> Tensor:
    return F.dropout(x, p) if p else x


def _add(dropout_p: float, **options: Any) -> dict[str, Any]:
    """Without a dropout the gradients of input and residual are one tensor."""
    return {"rows": ("input", "residual"), "outputs": 2, "kept": ("output 1",), "gradients": 2 if dropout_p else 1}


def _elementwise(activation: str, **options: Any) -> dict[str, Any]:
    """An activation that is signed by its output keeps that, as whatever reads the output does."""
    if activation == "identity":
        return {"kept": (), "gradients": 0}
    return {"kept": ("output 0",) if activation in SIGNED_BY_OUTPUT else ("input",)}


def _sum(activation: str, **options: Any) -> dict[str, Any]:
    """The slope at a sum follows from the sign of the output, or else from the sum, for which the residual is kept.
    Without an activation the gradient of the residual is the incoming one."""
    if activation == "identity":
        return {"gradients": 1}
    return {"kept": ("input", "output 0" if activation in SIGNED_BY_OUTPUT else "residual")}


_RMS = {"coefficients": ("weight",), "statistics": lambda samples, tokens: samples * tokens}
_NO_NORM = {"coefficients": (), "statistics": lambda samples, tokens: 0}
_MODULATED = {"samples": ("scale", "shift"), "kept": ("input", "scale", "shift")}


@_block("layer_norm")
def layer_norm(input, weight, bias, *, activation="identity", pre_activation="identity"):
    """act(norm(pre_act(input)))"""
    return ACT[activation](F.layer_norm(ACT[pre_activation](input), weight.shape, weight, bias))


@_block("rms_norm", **_RMS)
def rms_norm(input, weight, *, activation="identity", pre_activation="identity", weight_offset=0.0, eps=1e-6):
    """act(norm(pre_act(input)))"""
    factor = weight + weight_offset if weight_offset else weight
    return ACT[activation](F.rms_norm(ACT[pre_activation](input), weight.shape, factor, eps))


@_block("rms_norm", **_RMS)
def rms_norm_cast(input, weight, *, cast_before_weight=True, eps=1e-6):
    """act(norm(pre_act(input)))"""
    wide = input.float() if input.dtype != torch.float64 else input
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(input.dtype)


@_block("add_layer_norm", _add)
def add_layer_norm(input, residual, weight, bias, *, activation="identity", dropout_p=0.0):
    """r = residual + dropout(input); act(norm(r)), r"""
    total = residual + _dropout(input, dropout_p)
    return ACT[activation](F.layer_norm(total, weight.shape, weight, bias)), total


@_block("add_rms_norm", _add, **_RMS)
def add_rms_norm(input, residual, weight, *, activation="identity", dropout_p=0.0):
    """r = residual + dropout(input); act(norm(r)), r"""
    total = residual + _dropout(input, dropout_p)
    return ACT[activation](F.rms_norm(total, weight.shape, weight)), total


@_block("gated_rms_norm", rows=("input", "gate"), kept=("input", "gate"), **_RMS)
def gated_rms_norm(input, gate, weight, *, activation, norm_before_gate=True, eps=1e-6):
    """norm(input) * act(gate), or norm(input * act(gate))"""
    factor = ACT[activation](gate)
    if norm_before_gate:
        return F.rms_norm(input, weight.shape, weight, eps) * factor
    return F.rms_norm(input * factor, weight.shape, weight, eps)


@_block("modulated_layer_norm", **_MODULATED)
def modulated_layer_norm(input, scale, shift, weight, bias, *, activation="identity"):
    """act(norm(pre_act(input)) * (1 + scale) + shift)"""
    return ACT[activation](F.layer_norm(input, weight.shape, weight, bias) * (1 + scale) + shift)


@_block("modulated_rms_norm", **_MODULATED, **_RMS)
def modulated_rms_norm(input, scale, shift, weight, *, activation="identity"):
    """act(norm(pre_act(input)) * (1 + scale) + shift)"""
    return ACT[activation](F.rms_norm(input, weight.shape, weight) * (1 + scale) + shift)


@_block("glu", rows=("gate", "value"), kept=("gate", "value"), **_NO_NORM)
def glu(gate, value, *, activation):
    """act(gate) * value"""
    return ACT[activation](gate) * value


@_block("packed_glu", packed=True, **_NO_NORM)
def packed_glu(input, *, activation, layout="gate_first"):
    """act(gate) * value, both in one input"""
    first, second = (input[..., ::2], input[..., 1::2]) if layout == "interleaved" else input.chunk(2, -1)
    return first * ACT[activation](second) if layout == "value_first" else ACT[activation](first) * second


@_block("bias_act", _elementwise, **_NO_NORM | {"coefficients": ("bias",)})
def bias_act(input, bias=None, *, activation, dropout_p=0.0):
    """dropout(act(input + bias))"""
    return _dropout(ACT[activation](input if bias is None else input + bias), dropout_p)


_BATCH = {"channels": True, "statistics": lambda samples, channels: 5 * channels}


@_block("batch_norm", **_BATCH)
def batch_norm(input, weight, bias, *, running_mean=None, running_var=None, training=True, activation="identity"):
    """act(norm(input))"""
    return ACT[activation](F.batch_norm(input, running_mean, running_var, weight, bias, training))


@_block("batch_norm", _sum, rows=("input", "residual"), **_BATCH)
def add_batch_norm(
    input, residual, weight, bias, *, running_mean=None, running_var=None, training=True, activation="identity"
):
    """act(norm(input) + residual)"""
    return ACT[activation](F.batch_norm(input, running_mean, running_var, weight, bias, training) + residual)


@_block(
    "group_norm", channels=True, statistics=lambda samples, channels: samples * (2 * groups_of(channels) + 3 * channels)
)
def group_norm(input, weight, bias, *, activation="identity"):
    """act(norm(input))"""
    return ACT[activation](F.group_norm(input, groups_of(input.shape[1]), weight, bias))


@_block("instance_norm", channels=True, statistics=lambda samples, channels: 5 * samples * channels)
def instance_norm(input, weight, bias, *, activation="identity"):
    """act(norm(input))"""
    return ACT[activation](F.instance_norm(input, None, None, weight, bias))


# Some of each function, for the contracts that do not depend on the activation.
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
    bias_act("bias_act (gelu)", activation="gelu"),
    replace(bias_act("bias_act (silu, no bias)", activation="silu"), coefficients=()),
    bias_act("bias_act (relu)", activation="relu"),
    bias_act("bias_act (identity)", activation="identity"),
    batch_norm("batch_norm"),
    batch_norm("batch_norm+relu", activation="relu"),
    add_batch_norm("batch_norm+add+relu", activation="relu"),
    add_batch_norm("batch_norm+add+silu", activation="silu"),
    add_batch_norm("batch_norm+add"),
    group_norm("group_norm"),
    group_norm("group_norm+silu", activation="silu"),
    instance_norm("instance_norm+leaky_relu", activation="leaky_relu"),
)

# Every activation in every place that it can take.
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

# Those whose results are random, so that they are not compared with eager torch's.
DROPOUT_BLOCKS = (
    add_layer_norm("add_layer_norm (dropout)", dropout_p=0.1),
    bias_act("bias_act (gelu, dropout)", activation="gelu", dropout_p=0.1),
)

BY_NAME = {block.name: block for block in (*ACTIVATION_BLOCKS, *BLOCKS, *DROPOUT_BLOCKS)}
