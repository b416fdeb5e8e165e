"""Row norms of a sum: dropout, residual add, and a norm over the last dimensions."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .. import ops, thin
from ..activations import Activation, activation_name
from ..arguments import flag, number
from ..backends.blocks import RowNormOptions
from .checks import (
    autocast,
    check_coefficient,
    check_input,
    check_like,
    dropout_seed,
    promoted,
    rms_eps,
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
    r"""Dropout, residual add and LayerNorm in one kernel per pass.

    .. math::
        r = \mathrm{residual} + \mathrm{dropout}(x), \qquad
        y = \mathrm{act}\left(\frac{r - \mu}{\sqrt{\sigma^2 + \epsilon}} \odot w + b\right)

    The mean :math:`\mu` and the biased variance :math:`\sigma^2` are those of each row of :math:`r`.

    Args:
        input: x, `(*, normalized_shape)`; float32, bfloat16, float16 or float64.
        residual: of the input's shape and dtype.
        normalized_shape: the last dimensions, normalised together.
        weight: w, `(normalized_shape)`, of any of these dtypes; None means 1.
        bias: b, `(normalized_shape)`, of any of these dtypes; None means 0.
        eps: added to the variance.
        activation: act, applied to the normalised value.
        dropout_p: the probability of dropping an element of the input.
        training: False switches dropout off.

    Returns:
        (y, r), both contiguous and of the input's shape and dtype.

    Kept for backward:
        r, which the next residual add reads too, and two numbers per row. No dropout mask: the backward kernel draws
        the mask again from the seed.

    Raises:
        RuntimeError: a shape, dtype or device is not as described above.
        ValueError: the activation is unknown, or `dropout_p` is outside [0, 1].
        TypeError: an argument is not of the expected type.

    Example:
        >>> x, residual = torch.randn(8, 64), torch.randn(8, 64)
        >>> y, r = F.add_layer_norm(x, residual, 64)
        >>> torch.equal(r, residual + x)
        True
        >>> torch.allclose(y, torch.nn.functional.layer_norm(r, (64,)), atol=1e-5)
        True

    Source:
        Ba et al., "Layer Normalization", 2016; its place behind the add: Vaswani et al., "Attention Is All You Need",
        2017; the masks: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (Philox), 2011.
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
    r"""Dropout, residual add and RMSNorm in one kernel per pass.

    .. math::
        r = \mathrm{residual} + \mathrm{dropout}(x), \qquad
        y = \mathrm{act}\left(\frac{r}{\sqrt{\mathrm{mean}(r^2) + \epsilon}} \odot (o + w)\right)

    Args:
        input: x, `(*, normalized_shape)`; float32, bfloat16, float16 or float64.
        residual: of the input's shape and dtype.
        normalized_shape: the last dimensions, normalised together.
        weight: w, `(normalized_shape)`, of any of these dtypes; None makes the factor 1.
        eps: added to the mean square; None means the epsilon of the dtype of the arithmetic.
        activation: act, applied to the normalised value.
        dropout_p: the probability of dropping an element of the input.
        training: False switches dropout off.
        weight_offset: o; 1 is Gemma's 1 + weight.
        cast_before_weight: round the normalised value to the input's dtype before the product, as Llama does.

    Returns:
        (y, r), both contiguous and of the input's shape and dtype.

    Kept for backward:
        r, which the next residual add reads too, and one number per row. No dropout mask.

    Raises:
        RuntimeError: a shape, dtype or device is not as described above.
        ValueError: the activation is unknown, or `dropout_p` is outside [0, 1].
        TypeError: an argument is not of the expected type.

    Example:
        >>> x, residual, weight = torch.randn(8, 64), torch.randn(8, 64), torch.ones(64)
        >>> y, r = F.add_rms_norm(x, residual, 64, weight)
        >>> torch.allclose(y, torch.nn.functional.rms_norm(residual + x, (64,), weight), atol=1e-5)
        True

    Source:
        Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019; its place in a layer: Touvron et al., "LLaMA",
        2023.
    """
    return _add_row_norm(
        (input, residual, weight, None),
        (normalized_shape, eps, False, activation, dropout_p, training, weight_offset, cast_before_weight),
    )


def _add_row_norm(tensors: Sequence[Any], given: tuple) -> tuple[Tensor, Tensor]:
    """A row norm of (input, residual, weight, bias), with the options of the public function."""
    input, residual, weight, bias = tensors
    normalized_shape, eps, centered, activation, dropout_p, training, weight_offset, cast_before_weight = given
    plan = thin.plan_of("add_row_norm", tensors, given)
    if plan is not None:
        seed = dropout_seed(input, dropout_p, training)[1] if dropout_p and training else None
        return plan(input, residual, None, None, None, weight, bias, seed)
    input, residual = promoted(input, residual)
    eps = number(eps, "eps") if centered else rms_eps(input, eps)
    columns = check_input(input, normalized_shape)
    check_like(residual, "residual", input)
    check_coefficient(weight, "weight", input, normalized_shape)
    check_coefficient(bias, "bias", input, normalized_shape)
    name, offset = activation_name(activation), number(weight_offset, "weight_offset")
    p, seed = dropout_seed(input, dropout_p, training)
    options = RowNormOptions(
        columns, eps, centered, "identity", name, offset, flag(cast_before_weight, "cast_before_weight"), p
    )
    given_input, given_residual, *_ = tensors
    known = thin.row_norm.row_norm(given_input, given_residual, None, None, None, weight, bias, options)
    thin.remember(known, "add_row_norm", tensors, given)
    input, residual, weight, bias = autocast(input, residual, weight, bias)
    return ops.row_norm.row_norm(input, residual, None, None, None, weight, bias, seed, options)
