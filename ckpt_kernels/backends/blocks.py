"""Data types that describe a block to a backend: tensors, options, and tensors for the gradients."""

from typing import NamedTuple

from torch import Tensor


class RowNormOptions(NamedTuple):
    """The options of a row norm.

    Rows have `columns` elements. Without `centered` the mean is taken as 0 (RMSNorm). `cast_before_weight` rounds x_hat
    to the input's dtype before the multiplication with weight + `weight_offset`. A gate multiplies the output of the
    norm, or with `gate_before_norm` the input.
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

    and with a gate after the norm y = x_hat * weight * activation(gate). Operands that the block does not have are
    None.

    Attributes:
        input, residual, gate: (rows, columns) with contiguous rows, or (outer, middle, inner, columns); kernels read
            them with their strides. In the backward pass of a block with a residual, `input` is residual_out, and
            `residual` is None.
        weight, bias: contiguous, (columns,) or (groups, columns); each group is an equal share of the rows.
        seed: the seed of the dropout, one int64.
        mean, rstd: (rows,), in the compute dtype; mean is None unless centered.
        options: the options.
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
    """Tensors for the gradients; None for gradients that are not needed.

    The gradients of weight and bias are in the compute dtype. Without dropout the gradients of residual and input are
    equal, and residual is None.
    """

    input: Tensor | None
    residual: Tensor | None
    gate: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


class RotaryOptions(NamedTuple):
    """The options of a rotary embedding.

    Columns `start` to `start + rotary_dim` of a head are rotated in pairs; the others are copied. If the head is
    `interleaved`, a pair is two adjacent elements; otherwise element i of the first half and element i of the second.
    `interleaved_output` is the same for the output. `norm` is "none", "rms" or "layer": a norm over the whole head
    before the rotation, with eps, weight_offset and cast_before_weight as in `RowNormOptions`. The output has the
    memory layout of the input unless `contiguous`, which concerns the ops and no backend.
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
    """A rotary embedding after an optional norm: with z = norm(input), a pair (first, second) of z becomes

        (first * cos1 - second * sin1, second * cos2 + first * sin2)

    where (cos1, cos2) and (sin1, sin2) are the table entries at the pair's positions in the rotated part of the output.
    If the tables have half as many columns as that part, both elements of a pair share an entry.

    Attributes:
        input: (outer, middle, inner, columns) with contiguous rows; None in the backward pass without a norm.
        cos, sin: (outer, middle, inner, rotary_dim or rotary_dim / 2); a dimension may be 1 and is then broadcast.
        weight, bias: contiguous, (columns,).
        options: the options.
    """

    input: Tensor | None
    cos: Tensor
    sin: Tensor
    weight: Tensor | None
    bias: Tensor | None
    options: RotaryOptions


class RotaryGradients(NamedTuple):
    """Tensors for the gradients; None for gradients that are not needed. weight and bias are in the compute dtype."""

    input: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
