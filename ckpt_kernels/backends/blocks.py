"""Blocks as values: what the ops hand to a backend, the same to every backend."""

from typing import NamedTuple

from torch import Tensor


class RowNormOptions(NamedTuple):
    """What a row norm is, beside its tensors.

    Rows have `columns` elements. The mean is taken as 0 unless `centered` (RMSNorm). `cast_before_weight` rounds x_hat
    to the input's dtype before the weight, to which `weight_offset` is added. A gate multiplies after the norm, or,
    `gate_first`, before.
    """

    columns: int
    eps: float
    centered: bool
    pre_activation: str = "identity"
    activation: str = "identity"
    weight_offset: float = 0.0
    cast_before_weight: bool = False
    dropout_p: float = 0.0
    gate_first: bool = False


class RowNorm(NamedTuple):
    """A row norm: y = activation(x_hat * (weight + offset) + bias) with x_hat = (u - mean) * rstd, where u is one of

        input, pre_activation(input), residual + dropout(input), input * activation(gate) (gate_first)

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
