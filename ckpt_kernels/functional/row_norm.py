"""Row norms: over the last dimensions."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops, thin
from ..activations import Activation, activation_name
from ..backends.blocks import RowNormOptions
from .bias_act import bias_act
from .checks import (
    autocast,
    check_coefficient,
    check_input,
    check_like,
    check_modulation,
    check_rms_input,
    dropout_seed,
    memory_format,
    normalized,
    number,
    promoted,
    rms_eps,
    shape_of,
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
    r"""LayerNorm of the last dimensions, with an activation before and after it, in one kernel a pass.

    .. math::
        y = \mathrm{act}\left(\frac{u - \mu}{\sqrt{\sigma^2 + \epsilon}} \odot w + b\right), \qquad u = \mathrm{pre}(x)

    The mean :math:`\mu` and the biased variance :math:`\sigma^2` are those of each row of :math:`u`.

    Args:
        input: x, `(*, normalized_shape)`; float32, bfloat16, float16 or float64.
        normalized_shape: the last dimensions, normalised together.
        weight: w, `(normalized_shape)`, of any of these dtypes; None is 1.
        bias: b, `(normalized_shape)`, of any of these dtypes; None is 0.
        eps: added to the variance.
        activation: act, applied to the normalised value.
        pre_activation: pre, applied to the input.

    Returns:
        `(*, normalized_shape)`, contiguous, of the input's dtype.

    Kept for backward:
        The input, and two numbers a row: the mean and :math:`1 / \sqrt{\sigma^2 + \epsilon}`.

    Raises:
        RuntimeError: a tensor has another shape, dtype or device than said above.
        ValueError: an activation is unknown.
        TypeError: an argument is no tensor, or no number.

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
    r"""RMSNorm of the last dimensions, with an activation before and after it, in one kernel a pass.

    .. math::
        y = \mathrm{act}\left(\frac{u}{\sqrt{\mathrm{mean}(u^2) + \epsilon}} \odot (o + w)\right),
        \qquad u = \mathrm{pre}(x)

    Args:
        input: x, `(*, normalized_shape)`; float32, bfloat16, float16 or float64.
        normalized_shape: the last dimensions, normalised together.
        weight: w, `(normalized_shape)`, of any of these dtypes; None makes the factor 1.
        eps: added to the mean square; None is the epsilon of the type that is computed in, as torch's.
        activation: act, applied to the normalised value.
        pre_activation: pre, applied to the input.
        weight_offset: o; 1 is Gemma's 1 + weight.
        cast_before_weight: round the normalised value to the input's dtype before the product, as Llama does.

    Returns:
        `(*, normalized_shape)`, of the input's dtype; contiguous, or, as torch's, channels last where the input is.

    Kept for backward:
        The input, and one number a row: :math:`1 / \sqrt{\mathrm{mean}(u^2) + \epsilon}`.

    Raises:
        RuntimeError: a tensor has another shape, dtype or device than said above.
        ValueError: an activation is unknown, or the input has fewer dimensions than `normalized_shape`.
        TypeError: an argument is no tensor, or no number.

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
    r"""Dropout, residual add and LayerNorm in one kernel a pass.

    .. math::
        r = \mathrm{residual} + \mathrm{dropout}(x), \qquad
        y = \mathrm{act}\left(\frac{r - \mu}{\sqrt{\sigma^2 + \epsilon}} \odot w + b\right)

    The mean :math:`\mu` and the biased variance :math:`\sigma^2` are those of each row of :math:`r`.

    Args:
        input: x, `(*, normalized_shape)`; float32, bfloat16, float16 or float64.
        residual: of the input's shape and dtype.
        normalized_shape: the last dimensions, normalised together.
        weight: w, `(normalized_shape)`, of any of these dtypes; None is 1.
        bias: b, `(normalized_shape)`, of any of these dtypes; None is 0.
        eps: added to the variance.
        activation: act, applied to the normalised value.
        dropout_p: the probability with which an element of the input is dropped.
        training: False switches dropout off.

    Returns:
        (y, r), both contiguous and of the input's shape and dtype.

    Kept for backward:
        r, which is what the network goes on with, and two numbers a row. No dropout mask: the backward kernel draws the
        mask again from its seed.

    Raises:
        RuntimeError: a tensor has another shape, dtype or device than said above.
        ValueError: the activation is unknown, or `dropout_p` is outside [0, 1].
        TypeError: an argument is no tensor, or no number.

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
    r"""Dropout, residual add and RMSNorm in one kernel a pass.

    .. math::
        r = \mathrm{residual} + \mathrm{dropout}(x), \qquad
        y = \mathrm{act}\left(\frac{r}{\sqrt{\mathrm{mean}(r^2) + \epsilon}} \odot (o + w)\right)

    Args:
        input: x, `(*, normalized_shape)`; float32, bfloat16, float16 or float64.
        residual: of the input's shape and dtype.
        normalized_shape: the last dimensions, normalised together.
        weight: w, `(normalized_shape)`, of any of these dtypes; None makes the factor 1.
        eps: added to the mean square; None is the epsilon of the type that is computed in.
        activation: act, applied to the normalised value.
        dropout_p: the probability with which an element of the input is dropped.
        training: False switches dropout off.
        weight_offset: o; 1 is Gemma's 1 + weight.
        cast_before_weight: round the normalised value to the input's dtype before the product, as Llama does.

    Returns:
        (y, r), both contiguous and of the input's shape and dtype.

    Kept for backward:
        r, which is what the network goes on with, and one number a row. No dropout mask.

    Raises:
        RuntimeError: a tensor has another shape, dtype or device than said above.
        ValueError: the activation is unknown, or `dropout_p` is outside [0, 1].
        TypeError: an argument is no tensor, or no number.

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
    r"""RMSNorm and a gate, in either order, in one kernel a pass.

    .. math::
        y = \frac{x}{\sqrt{\mathrm{mean}(x^2) + \epsilon}} \odot w \odot \mathrm{act}(g)
        \qquad\text{or}\qquad
        y = \frac{h}{\sqrt{\mathrm{mean}(h^2) + \epsilon}} \odot w, \quad h = x \odot \mathrm{act}(g)

    Args:
        input: x, `(*, normalized_shape)`; float32, bfloat16, float16 or float64.
        gate: g, of the input's shape and dtype.
        normalized_shape: the last dimensions, normalised together.
        weight: w, `(normalized_shape)`, of any of these dtypes; None is 1.
        eps: added to the mean square; None is the epsilon of the type that is computed in.
        activation: act, applied to the gate.
        norm_before_gate: True computes the first form, False the second.

    Returns:
        `(*, normalized_shape)`, contiguous, of the input's dtype.

    Kept for backward:
        Input, gate, and one number a row.

    Raises:
        RuntimeError: a tensor has another shape, dtype or device than said above.
        ValueError: the activation is unknown.
        TypeError: an argument is no tensor, or no number.

    Example:
        >>> x, gate = torch.randn(8, 64), torch.randn(8, 64)
        >>> y = F.gated_rms_norm(x, gate, 64)
        >>> torch.allclose(y, torch.nn.functional.rms_norm(x, (64,)) * torch.nn.functional.silu(gate), atol=1e-5)
        True

    Source:
        Dao and Gu, "Transformers are SSMs" (Mamba-2), 2024.
    """
    tensors = (input, gate, weight)
    call = "gated_row_norm", tensors, (normalized_shape, eps, activation, norm_before_gate)
    plan = thin.plan_of(*call)
    if plan is not None:
        return plan(input, None, gate, None, None, weight, None, None)[0]
    input, gate = promoted(input, gate)
    columns = check_input(input, normalized_shape)
    check_like(gate, "gate", input)
    check_coefficient(weight, "weight", input, normalized_shape)
    eps, name = rms_eps(input, eps), activation_name(activation)
    options = RowNormOptions(columns, eps, False, activation=name, gate_first=not norm_before_gate)
    thin.remember(thin.row_norm.row_norm(tensors[0], None, tensors[1], None, None, weight, None, options), *call)
    input, gate, weight = autocast(input, gate, weight)
    return ops.row_norm.row_norm(input, None, gate, None, None, weight, None, None, options)[0]


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
    r"""LayerNorm whose result is scaled and shifted by sample, in one kernel a pass.

    .. math::
        y = \mathrm{act}\left(\mathrm{LayerNorm}(\mathrm{pre}(x)) \odot (1 + s) + t\right)

    Args:
        input: x, `(*samples, *, normalized_shape)`; float32, bfloat16, float16 or float64.
        scale: s, `(*samples, normalized_shape)`, where `samples` are the input's first dimensions. Dimensions of 1 may
            stand for those in between, so `(B, 1, N)` and `(B, N)` both go with `(B, T, N)`.
        shift: t, of the shape of `scale`.
        normalized_shape: the last dimensions, normalised together.
        weight: of the norm, `(normalized_shape)`, of any of these dtypes; None is 1.
        bias: of the norm, `(normalized_shape)`, of any of these dtypes; None is 0.
        eps: added to the variance.
        activation: act, applied to the modulated value.
        pre_activation: pre, applied to the input.

    Returns:
        The input's shape and dtype, contiguous.

    Kept for backward:
        Input, scale, shift, and two numbers a row.

    Raises:
        RuntimeError: a tensor has another shape, dtype or device than said above.
        ValueError: an activation is unknown.
        TypeError: an argument is no tensor, or no number.

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
    r"""RMSNorm whose result is scaled and shifted by sample, in one kernel a pass.

    .. math::
        y = \mathrm{act}\left(\mathrm{RMSNorm}(\mathrm{pre}(x)) \odot (1 + s) + t\right)

    Args:
        input: x, `(*samples, *, normalized_shape)`; float32, bfloat16, float16 or float64.
        scale: s, `(*samples, normalized_shape)`; see `modulated_layer_norm`.
        shift: t, of the shape of `scale`.
        normalized_shape: the last dimensions, normalised together.
        weight: of the norm, `(normalized_shape)`, of any of these dtypes; None is 1.
        eps: added to the mean square; None is the epsilon of the type that is computed in.
        activation: act, applied to the modulated value.
        pre_activation: pre, applied to the input.

    Returns:
        The input's shape and dtype, contiguous.

    Kept for backward:
        Input, scale, shift, and one number a row.

    Raises:
        RuntimeError: a tensor has another shape, dtype or device than said above.
        ValueError: an activation is unknown.
        TypeError: an argument is no tensor, or no number.

    Example:
        >>> x, scale, shift = torch.randn(2, 8, 64), torch.randn(2, 1, 64), torch.randn(2, 1, 64)
        >>> y = F.modulated_rms_norm(x, scale, shift, 64)
        >>> torch.allclose(y, torch.nn.functional.rms_norm(x, (64,)) * (1 + scale) + shift, atol=1e-5)
        True

    Source:
        The modulation: Peebles and Xie, "Scalable Diffusion Models with Transformers" (DiT), 2023.
    """
    return _modulated((input, scale, shift, weight, None), (normalized_shape, eps, False, pre_activation, activation))


def _row_norm(tensors: Sequence[Any], given: tuple) -> Tensor:
    """Of (input, weight, bias), and the options as they were given."""
    input, weight, bias = tensors
    normalized_shape, eps, centered, pre_activation, activation, weight_offset, cast_before_weight = given
    eps = number(eps, "eps") if centered else rms_eps(input, eps)
    columns = (check_input if centered else check_rms_input)(input, normalized_shape)
    check_coefficient(weight, "weight", input, normalized_shape)
    check_coefficient(bias, "bias", input, normalized_shape)
    pre, post = activation_name(pre_activation, "pre_activation"), activation_name(activation)
    offset = number(weight_offset, "weight_offset")
    options = RowNormOptions(columns, eps, centered, pre, post, offset, bool(cast_before_weight))
    thin.remember(
        thin.row_norm.row_norm(input, None, None, None, None, weight, bias, options), "row_norm", tensors, given
    )
    input, weight, bias = autocast(input, weight, bias)
    return ops.row_norm.row_norm(input, None, None, None, None, weight, bias, None, options)[0]


def _add_row_norm(tensors: Sequence[Any], given: tuple) -> tuple[Tensor, Tensor]:
    """Of (input, residual, weight, bias), and the options as they were given."""
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
    options = RowNormOptions(columns, eps, centered, "identity", name, offset, bool(cast_before_weight), p)
    given_input, given_residual, *_ = tensors
    known = thin.row_norm.row_norm(given_input, given_residual, None, None, None, weight, bias, options)
    thin.remember(known, "add_row_norm", tensors, given)
    input, residual, weight, bias = autocast(input, residual, weight, bias)
    return ops.row_norm.row_norm(input, residual, None, None, None, weight, bias, seed, options)


def _modulated(tensors: Sequence[Any], given: tuple) -> Tensor:
    """Of (input, scale, shift, weight, bias), and the options as they were given."""
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
        # Samples have different numbers of rows there: torch knows which row is of which.
        normed = _row_norm((input, weight, bias), (normalized_shape, eps, centered, pre, "identity", 0.0, False))
        count = len(normalized(normalized_shape))
        scale, shift = (_beside(normed, t, count) for t in (scale, shift))
        return bias_act(normed * (1 + scale) + shift, activation=post)
    options = RowNormOptions(columns, eps, centered, pre, post)
    known = thin.row_norm.row_norm(input, None, None, scale, shift, weight, bias, options)
    thin.remember(known, "modulated_row_norm", tensors, given)
    input, scale, shift, weight, bias = autocast(input, scale, shift, weight, bias)
    return ops.row_norm.row_norm(input, None, None, scale, shift, weight, bias, None, options)[0]


def _beside(input: Tensor, given: Tensor, count: int) -> Tensor:
    """What is given for samples, with dimensions of 1 for those of the input before its last `count`."""
    place = given.dim() - count
    return given.reshape(*given.shape[:place], *(1,) * (input.dim() - given.dim()), *given.shape[place:])
