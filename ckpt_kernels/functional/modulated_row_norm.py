"""Row norms whose result is scaled and shifted by sample."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .. import ops, thin
from ..activations import Activation, activation_name
from ..arguments import number
from ..backends.blocks import RowNormOptions
from .bias_act import bias_act
from .checks import (
    autocast,
    check_coefficient,
    check_input,
    check_modulation,
    normalized,
    rms_eps,
    shape_of,
)
from .row_norm import layer_norm, rms_norm


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
    r"""LayerNorm whose result is scaled and shifted by sample, in one kernel per pass.

    .. math::
        y = \mathrm{act}\left(\mathrm{LayerNorm}(\mathrm{pre}(x)) \odot (1 + s) + t\right)

    Args:
        input: x, `(*samples, *, normalized_shape)`; float32, bfloat16, float16 or float64.
        scale: s, `(*samples, normalized_shape)`, where `samples` are the input's first dimensions. Dimensions of
            length 1 may follow them, so for an input `(B, T, N)` both `(B, N)` and `(B, 1, N)` are possible.
        shift: t, of the shape of `scale`.
        normalized_shape: the last dimensions, normalised together.
        weight: of the norm, `(normalized_shape)`, of any of these dtypes; None means 1.
        bias: of the norm, `(normalized_shape)`, of any of these dtypes; None means 0.
        eps: added to the variance.
        activation: act, applied to the modulated value.
        pre_activation: pre, applied to the input.

    Returns:
        The input's shape and dtype, contiguous.

    Kept for backward:
        Input, scale, shift, and two numbers per row.

    Raises:
        RuntimeError: a shape, dtype or device is not as described above.
        ValueError: an activation is unknown.
        TypeError: an argument is not of the expected type.

    Example:
        >>> x, scale, shift = torch.randn(2, 8, 64), torch.randn(2, 64), torch.randn(2, 64)
        >>> y = F.modulated_layer_norm(x, scale, shift, 64)
        >>> normed = torch.nn.functional.layer_norm(x, (64,))
        >>> torch.allclose(y, normed * (1 + scale[:, None]) + shift[:, None], atol=1e-5)
        True

    Source:
        Peebles and Xie, "Scalable Diffusion Models with Transformers" (DiT), 2023.
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
    r"""RMSNorm whose result is scaled and shifted by sample, in one kernel per pass.

    .. math::
        y = \mathrm{act}\left(\mathrm{RMSNorm}(\mathrm{pre}(x)) \odot (1 + s) + t\right)

    Args:
        input: x, `(*samples, *, normalized_shape)`; float32, bfloat16, float16 or float64.
        scale: s, `(*samples, normalized_shape)`; see `modulated_layer_norm`.
        shift: t, of the shape of `scale`.
        normalized_shape: the last dimensions, normalised together.
        weight: of the norm, `(normalized_shape)`, of any of these dtypes; None means 1.
        eps: added to the mean square; None means the epsilon of the dtype of the arithmetic.
        activation: act, applied to the modulated value.
        pre_activation: pre, applied to the input.

    Returns:
        The input's shape and dtype, contiguous.

    Kept for backward:
        Input, scale, shift, and one number per row.

    Raises:
        RuntimeError: a shape, dtype or device is not as described above.
        ValueError: an activation is unknown.
        TypeError: an argument is not of the expected type.

    Example:
        >>> x, scale, shift = torch.randn(2, 8, 64), torch.randn(2, 1, 64), torch.randn(2, 1, 64)
        >>> y = F.modulated_rms_norm(x, scale, shift, 64)
        >>> torch.allclose(y, torch.nn.functional.rms_norm(x, (64,)) * (1 + scale) + shift, atol=1e-5)
        True

    Source:
        The modulation: Peebles and Xie, "Scalable Diffusion Models with Transformers" (DiT), 2023.
    """
    return _modulated((input, scale, shift, weight, None), (normalized_shape, eps, False, pre_activation, activation))


def _modulated(tensors: Sequence[Any], given: tuple) -> Tensor:
    """A modulated row norm of (input, scale, shift, weight, bias), with the options of the public function."""
    plan = thin.plan_of("modulated_row_norm", tensors, given)
    input, scale, shift, weight, bias = tensors
    if plan is not None:
        return plan(input, None, None, scale, shift, weight, bias, None)[0]
    normalized_shape, eps, centered, pre_activation, activation = given
    eps = number(eps, "eps") if centered else rms_eps(input, eps)
    columns = check_input(input, normalized_shape)
    check_modulation(scale, "scale", input, normalized_shape)
    check_modulation(shift, "shift", input, normalized_shape)
    if scale.numel() != shift.numel():
        raise RuntimeError(f"shift has shape {shape_of(shift)}; expected that of scale, {shape_of(scale)}")
    check_coefficient(weight, "weight", input, normalized_shape)
    check_coefficient(bias, "bias", input, normalized_shape)
    pre, post = activation_name(pre_activation, "pre_activation"), activation_name(activation)
    if input.is_nested:
        # Samples have different numbers of rows, and torch's sum broadcasts over the rows of each sample.
        if centered:
            normed = layer_norm(input, normalized_shape, weight, bias, eps, pre_activation=pre)
        else:
            normed = rms_norm(input, normalized_shape, weight, eps, pre_activation=pre)
        count = len(normalized(normalized_shape))
        scale, shift = (_beside(normed, t, count) for t in (scale, shift))
        return bias_act(normed * (1 + scale) + shift, activation=post)
    options = RowNormOptions(columns, eps, centered, pre, post)
    known = thin.row_norm.row_norm(input, None, None, scale, shift, weight, bias, options)
    thin.remember(known, "modulated_row_norm", tensors, given)
    input, scale, shift, weight, bias = autocast(input, scale, shift, weight, bias)
    return ops.row_norm.row_norm(input, None, None, scale, shift, weight, bias, None, options)[0]


def _beside(input: Tensor, given: Tensor, count: int) -> Tensor:
    """A scale or shift with all dimensions of the input; those between samples and the last `count` have length 1."""
    place = given.dim() - count
    return given.reshape(*given.shape[:place], *(1,) * (input.dim() - given.dim()), *given.shape[place:])
