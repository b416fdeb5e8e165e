"""Blocks as values: what the ops hand to a backend, the same to every backend."""

from typing import NamedTuple

from torch import Tensor


class RowNormOptions(NamedTuple):
    """What a row norm is, beside its tensors.

    Rows have `columns` elements. The mean is taken as 0 unless `centered` (RMSNorm). `cast_before_weight` rounds x_hat
    to the input's dtype before the weight, to which `weight_offset` is added. A gate multiplies after the norm, or,
    `gate_before_norm`, before.
    """

    columns: int
    eps: float
    centered: bool
    pre_activation: str = "identity"
    activation: str = "identity"
    weight_offset: float = 0.0
    cast_before_weight: bool = False
    dropout_p: float = 0.0
    gate_before_norm: bool = False


class RowNorm(NamedTuple):
    """A row norm: y = activation(x_hat * (weight + offset) + bias) with x_hat = (u - mean) * rstd, where u is one of

        input, pre_activation(input), residual + dropout(input), input * activation(gate) (gate_before_norm)

    and y is x_hat * weight * activation(gate) with a gate that does not come first. An operand of None is one that the
    block does not have.

    input, residual, gate: (rows, columns) with contiguous rows, or (outer, middle, inner, columns); they are read where
    they lie. weight, bias: contiguous, (columns,) or (groups, columns), of which each row serves an equal share of the
    rows. seed: the dropout's, one int64. mean (None unless centered), rstd: (rows,), in the compute type.

    Backward, `input` is residual_out where the block has a residual: gradients need no more.
    """

    input: Tensor
    residual: Tensor | None
    gate: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    seed: Tensor | None
    mean: Tensor | None
    rstd: Tensor
    options: RowNormOptions


class RowNormGradients(NamedTuple):
    """Where the gradients go; None for one that nobody wants. Those of weight and bias are in the compute type.

    residual is None too where it equals that of input, which is where there is no dropout.
    """

    input: Tensor | None
    residual: Tensor | None
    gate: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


class RotaryOptions(NamedTuple):
    """What a rotary embedding is, beside its tensors.

    Columns `start` to `start + rotary_dim` of a head turn in pairs, the others stay. A pair are two neighbours where
    the head is `interleaved`, else an element of the first half and the one at its place in the second; and pairs lie
    so again in the output, by `interleaved_output`. `norm` is "none", "rms" or "layer": over the whole head, before the
    rotation; eps, weight_offset and cast_before_weight are as in `RowNormOptions`. The output lies as the input does
    unless it is to be `contiguous`, which is nothing to a backend.
    """

    rotary_dim: int
    start: int = 0
    interleaved: bool = False
    interleaved_output: bool = False
    norm: str = "none"
    eps: float = 0.0
    weight_offset: float = 0.0
    cast_before_weight: bool = False
    contiguous: bool = False


class Rotary(NamedTuple):
    """A rotary embedding, and the norm before it: with z = norm(input), a pair (first, second) of z becomes

        (first * cos1 - second * sin1, second * cos2 + first * sin2)

    where (cos1, cos2) and (sin1, sin2) are the entries of the tables at the pair's places in the output's rotated part,
    or one entry for both where the tables have half as many columns as that part.

    input: (outer, middle, inner, columns) with contiguous rows; None backward where there is no norm. cos, sin: the
    same with rotary_dim or rotary_dim / 2 columns, and with 1 for a dimension over which they are the same. weight,
    bias: contiguous, (columns,).
    """

    input: Tensor | None
    cos: Tensor
    sin: Tensor
    weight: Tensor | None
    bias: Tensor | None
    options: RotaryOptions


class RotaryGradients(NamedTuple):
    """Where the gradients go; None for one that nobody wants. Those of weight and bias are in the compute type."""

    input: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
