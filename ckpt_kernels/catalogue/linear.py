"""Lists the functions that compute a block with linear layers: the eager twin, and the tensors kept at each level."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends.reference import ACTIVATIONS as ACT
from ..levels import OF_FUNCTIONS
from .block import Function, Operands, calls_of, empty_operands, random_operands
from .blocks import dropout


@dataclass(frozen=True)
class Pair:
    """One public function with one choice of options.

    Attributes:
        name, function, formula, options, eager: as in `Block`.
        call: as in `Block`, with an argument `recompute`.
        shapes: returns the shapes of weights and biases by name, for a number of columns of the input.
        kept: for each level the tensors that may be kept, by name, each with its size in tensors of the input's shape.
        statistics: the numbers a row kept beside these tensors.
    """

    name: str
    function: str
    formula: str
    options: Mapping[str, Any]
    call: Function
    eager: Function
    shapes: Callable[[int], dict[str, tuple[int, ...]]]
    kept: Mapping[str, Mapping[str, int]]
    statistics: int = 0

    def at(self, level: str) -> Function:
        """Return `call` at a recompute level."""
        return lambda **operands: self.call(**operands, recompute=level)

    def units(self, level: str) -> int:
        """Return the size of the kept tensors at a level, in tensors of the input's shape."""
        return sum(self.kept[level].values())

    def operands(self, lead: Sequence[int], columns: int, dtype: torch.dtype, device: str, seed: int = 0) -> Operands:
        """Return a random input that requires a gradient, and random parameters."""
        shapes = self.shapes(columns)
        return random_operands({"input": (*lead, columns)} | shapes, shapes, dtype, device, seed)

    def empty_operands(self, lead: Sequence[int], columns: int, dtype: torch.dtype, device: str) -> Operands:
        """Return operands without values, such as those on the meta device."""
        return empty_operands({"input": (*lead, columns)} | self.shapes(columns), dtype, device)


def _pair(function: str, kept: dict, shapes: Callable, statistics: int = 0) -> Callable:
    """Decorate an eager twin; the result makes a `Pair` from a name and options."""
    declared: dict[str, Any] = {"shapes": shapes, "kept": kept, "statistics": statistics}
    return lambda twin: lambda name, **chosen: Pair(name, **calls_of(function, twin, chosen), **declared)


def _kept_by_linear(hidden: str) -> dict[str, dict[str, int]]:
    """Return the kept tensors of a block whose output `hidden` has the input's shape and is read by linear layers."""
    return {"block": {"input": 1, hidden: 1}, "output": {"input": 1}, "all": {"input": 1}}


def _kept_by_mlp(**hidden: int) -> dict[str, dict[str, int]]:
    """Return the kept tensors of an MLP with these hidden tensors."""
    kept = {"input": 1} | hidden
    return {"block": kept | {"product": 4}, "output": kept, "all": {"input": 1}}


def _split(pair: Pair) -> Pair:
    """Replace one linear layer by three that read the same block, one of them with a bias."""

    def call(q: Tensor, k: Tensor, v: Tensor, k_bias: Tensor, **others: Any) -> tuple[Tensor, ...]:
        return pair.call(weight=(q, k, v), bias=(None, k_bias, None), **others)

    return replace(pair, call=call)


@_pair(
    "norm_linear",
    _kept_by_linear("act(norm(input))"),
    lambda n: {"norm_weight": (n,), "norm_bias": (n,), "weight": (n + 3, n), "bias": (n + 3,)},
    statistics=2,
)
def norm_linear(
    input: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor, *, activation: str
) -> Tensor:
    """linear(act(norm(pre_act(input))))"""
    return F.linear(ACT[activation](F.layer_norm(input, norm_weight.shape, norm_weight, norm_bias)), weight, bias)


@_pair(
    "norm_linear",
    _kept_by_linear("norm(input)"),
    lambda n: {"norm_weight": (n,), "q": (n, n), "k": (3, n), "v": (5, n), "k_bias": (3,)},
    statistics=1,
)
def rms_norm_linears(
    input: Tensor,
    norm_weight: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_bias: Tensor,
    *,
    norm: str = "rms_norm",
    norm_bias: None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, ...]:
    """linear(act(norm(pre_act(input))))"""
    y = F.rms_norm(input, norm_weight.shape, norm_weight, eps)
    return F.linear(y, q), F.linear(y, k, k_bias), F.linear(y, v)


@_pair("act_linear", _kept_by_linear("act(input)"), lambda n: {"weight": (n + 1, n), "bias": (n + 1,)})
def act_linear(input: Tensor, weight: Tensor, bias: Tensor, *, activation: str, dropout_p: float = 0.0) -> Tensor:
    """linear(dropout(act(input)))"""
    return F.linear(dropout(ACT[activation](input), dropout_p), weight, bias)


@_pair(
    "mlp",
    _kept_by_mlp(hidden=4),
    lambda n: {"weight1": (4 * n, n), "weight2": (n, 4 * n), "bias1": (4 * n,), "bias2": (n,)},
)
def mlp(input: Tensor, weight1: Tensor, weight2: Tensor, bias1: Tensor, bias2: Tensor, *, activation: str) -> Tensor:
    """linear(dropout(act(linear(input))))"""
    return F.linear(ACT[activation](F.linear(input, weight1, bias1)), weight2, bias2)


def _gated_mlp_shapes(n: int) -> dict[str, tuple[int, ...]]:
    return {"gate_weight": (4 * n, n), "value_weight": (4 * n, n), "weight": (n, 4 * n)}


@_pair("gated_mlp", _kept_by_mlp(gate=4, value=4), _gated_mlp_shapes)
def gated_mlp(
    input: Tensor,
    gate_weight: Tensor,
    value_weight: Tensor,
    weight: Tensor,
    gate_bias: Tensor | None = None,
    value_bias: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    activation: str,
) -> Tensor:
    """linear(dropout(act(gate(input)) * value(input)))"""
    gate, value = F.linear(input, gate_weight, gate_bias), F.linear(input, value_weight, value_bias)
    return F.linear(ACT[activation](gate) * value, weight, bias)


@_pair(
    "gated_mlp",
    _kept_by_mlp(gate=4, value=4),
    lambda n: {"gate_weight": (8 * n, n), "weight": (n, 4 * n), "gate_bias": (8 * n,)},
)
def packed_gated_mlp(
    input: Tensor, gate_weight: Tensor, weight: Tensor, gate_bias: Tensor, *, value_weight: None = None, layout: str
) -> Tensor:
    """linear(dropout(act(gate(input)) * value(input)))"""
    packed = F.linear(input, gate_weight, gate_bias)
    gate, value = (packed[..., ::2], packed[..., 1::2]) if layout == "interleaved" else packed.chunk(2, -1)
    return F.linear(F.silu(gate) * value, weight)


PAIRS = (
    norm_linear("norm_linear (layer_norm, silu)", activation="silu"),
    _split(rms_norm_linears("norm_linear (rms_norm, several)")),
    act_linear("act_linear (gelu)", activation="gelu"),
    # The derivative of relu follows from its output, which the linear layer keeps.
    replace(act_linear("act_linear (relu)", activation="relu"), kept={level: {"input": 1} for level in OF_FUNCTIONS}),
    mlp("mlp (gelu)", activation="gelu"),
    replace(
        mlp("mlp (relu_squared, no bias)", activation="relu_squared", bias1=None, bias2=None),
        shapes=lambda n: {"weight1": (4 * n, n), "weight2": (n, 4 * n)},
    ),
    gated_mlp("gated_mlp (silu)", activation="silu"),
    replace(
        gated_mlp("gated_mlp (gelu_tanh, bias)", activation="gelu_tanh"),
        shapes=lambda n: _gated_mlp_shapes(n) | {"gate_bias": (4 * n,), "value_bias": (4 * n,), "bias": (n,)},
    ),
    packed_gated_mlp("gated_mlp (packed, gate_first)", layout="gate_first"),
    packed_gated_mlp("gated_mlp (packed, interleaved)", layout="interleaved"),
)
