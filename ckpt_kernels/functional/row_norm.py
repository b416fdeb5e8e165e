"""Row norms: over the last dimensions."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops, thin
from ..activations import Activation, activation_name
from ..arguments import flag, number
from ..backends.blocks import RowNormOptions
from .checks import (
    autocast,
    check_coefficient,
    check_input,
    check_rms_input,
    memory_format,
    rms_eps,
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
    r"""LayerNorm of the last dimensions, with an activation before and after it, in one kernel per pass.

    .. math::
        y = \mathrm{act}\left(\frac{u - \mu}{\sqrt{\sigma^2 + \epsilon}} \odot w + b\right), \qquad u = \mathrm{pre}(x)

    The mean :math:`\mu` and the biased variance :math:`\sigma^2` are those of each row of :math:`u`.

    Args:
        input: x, `(*, normalized_shape)`; float32, bfloat16, float16 or float64.
        normalized_shape: the last dimensions, normalised together.
        weight: w, `(normalized_shape)`, of any of these dtypes; None means 1.
        bias: b, `(normalized_shape)`, of any of these dtypes; None means 0.
        eps: added to the variance.
        activation: act, applied to the normalised value.
        pre_activation: pre, applied to the input.

    Returns:
        `(*, normalized_shape)`, contiguous, of the input's dtype.

    Kept for backward:
        The input, and two numbers per row: the mean and :math:`1 / \sqrt{\sigma^2 + \epsilon}`.

    Raises:
        RuntimeError: a shape, dtype or device is not as described above.
        ValueError: an activation is unknown.
        TypeError: an argument is not of the expected type.

    Example:
        >>> x = torch.randn(8, 64, requires_grad=True)
        >>> y = F.layer_norm(x, 64, activation="gelu")
        >>> torch.allclose(y, torch.nn.functional.gelu(torch.nn.functional.layer_norm(x, (64,))), atol=1e-5)
        True
        >>> saved_bytes(F.layer_norm, x, 64, activation="gelu") == 4 * (8 * 64 + 8 * 2)
        True

    Source:
        Ba et al., "Layer Normalization", 2016; `torch.nn.functional.layer_norm`.
    """
    call = (input, weight, bias), (normalized_shape, eps, True, pre_activation, activation, 0.0, False)
    plan = thin.plan_of("row_norm", *call)
    if plan is not None:
        return plan(input, None, None, None, None, weight, bias, None)[0]
    return _row_norm(*call)


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
    r"""RMSNorm of the last dimensions, with an activation before and after it, in one kernel per pass.

    .. math::
        y = \mathrm{act}\left(\frac{u}{\sqrt{\mathrm{mean}(u^2) + \epsilon}} \odot (o + w)\right),
        \qquad u = \mathrm{pre}(x)

    Args:
        input: x, `(*, normalized_shape)`; float32, bfloat16, float16 or float64.
        normalized_shape: the last dimensions, normalised together.
        weight: w, `(normalized_shape)`, of any of these dtypes; None makes the factor 1.
        eps: added to the mean square; None means the epsilon of the dtype of the arithmetic, as in torch.
        activation: act, applied to the normalised value.
        pre_activation: pre, applied to the input.
        weight_offset: o; 1 is Gemma's 1 + weight.
        cast_before_weight: round the normalised value to the input's dtype before the product, as Llama does.

    Returns:
        `(*, normalized_shape)`, of the input's dtype; contiguous, or for channels-last inputs, as in torch, channels
        last.

    Kept for backward:
        The input, and one number per row: :math:`1 / \sqrt{\mathrm{mean}(u^2) + \epsilon}`.

    Raises:
        RuntimeError: a shape, dtype or device is not as described above.
        ValueError: an activation is unknown, or the input has fewer dimensions than `normalized_shape`.
        TypeError: an argument is not of the expected type.

    Example:
        >>> x, weight = torch.randn(8, 64, requires_grad=True), torch.ones(64)
        >>> y = F.rms_norm(x, 64, weight, activation="silu")
        >>> torch.allclose(y, torch.nn.functional.silu(torch.nn.functional.rms_norm(x, (64,), weight)), atol=1e-5)
        True
        >>> saved_bytes(F.rms_norm, x, 64, activation="silu") == 4 * (8 * 64 + 8)
        True

    Source:
        Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019; `torch.nn.functional.rms_norm`.
    """
    call = (
        (input, weight, None),
        (normalized_shape, eps, False, pre_activation, activation, weight_offset, cast_before_weight),
    )
    plan = thin.plan_of("row_norm", *call)
    if plan is not None and input.is_contiguous():
        return plan(input, None, None, None, None, weight, None, None)[0]
    output = _row_norm(*call)
    format = memory_format(input)
    return output if format == torch.contiguous_format else output.contiguous(memory_format=format)


def _row_norm(tensors: Sequence[Any], given: tuple) -> Tensor:
    """A row norm of (input, weight, bias), with the options of the public function."""
    input, weight, bias = tensors
    normalized_shape, eps, centered, pre_activation, activation, weight_offset, cast_before_weight = given
    eps = number(eps, "eps") if centered else rms_eps(input, eps)
    columns = (check_input if centered else check_rms_input)(input, normalized_shape)
    check_coefficient(weight, "weight", input, normalized_shape)
    check_coefficient(bias, "bias", input, normalized_shape)
    pre, post = activation_name(pre_activation, "pre_activation"), activation_name(activation)
    offset = number(weight_offset, "weight_offset")
    options = RowNormOptions(columns, eps, centered, pre, post, offset, flag(cast_before_weight, "cast_before_weight"))
    thin.remember(
        thin.row_norm.row_norm(input, None, None, None, None, weight, bias, options), "row_norm", tensors, given
    )
    input, weight, bias = autocast(input, weight, bias)
    return ops.row_norm.row_norm(input, None, None, None, None, weight, bias, None, options)[0]
