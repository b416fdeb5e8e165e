"""Norms of tensors (N, C, ...) with statistics by channel or by group of channels."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops, thin
from ..activations import Activation, activation_name
from ..arguments import flag, number, whole
from .checks import (
    autocast,
    check_channels,
    check_like,
    check_tensor,
    memory_format,
    promoted,
    shape_of,
)
from .running_statistics import check_running, is_updated_by_torch, require_gradients, update_both, update_by_torch


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    activation: Activation = "identity",
    residual: Tensor | None = None,
    process_group: "torch.distributed.ProcessGroup | None" = None,
) -> Tensor:
    r"""BatchNorm, a residual add and an activation in one op.

    .. math::
        y = \mathrm{act}\left(\frac{x - \mu_c}{\sqrt{\sigma_c^2 + \epsilon}}\, w_c + b_c + r\right)

    In training, the mean :math:`\mu_c` and the biased variance :math:`\sigma_c^2` of a channel are taken over samples
    and space, and update the running statistics, if given: :math:`m \leftarrow (1 - p)\, m + p\, \mu_c` with the
    momentum p, and the same for the unbiased variance. Otherwise the running statistics are used. An input without
    elements does not change the running statistics.

    Args:
        input: x, `(N, C, *)`; float32, bfloat16, float16 or float64. Tensors that are neither contiguous nor
            channels-last are copied.
        running_mean: `(C)`, or None.
        running_var: `(C)`, or None.
        weight: w, `(C)`, of any of these dtypes; None means 1.
        bias: b, `(C)`, of any of these dtypes; None means 0.
        training: whether the statistics are those of the batch.
        momentum: p.
        eps: added to the variance.
        activation: act, applied to the sum.
        residual: r, of the input's shape and dtype; None means 0.
        process_group: the processes over whose batches the statistics are taken in training; the batches may differ in
            size.

    Returns:
        The input's shape, dtype and memory format.

    Kept for backward:
        The input and two numbers per channel. With a residual and relu or leaky_relu, also the output, which a later
        op that saves its input keeps too; with a residual and another activation except the identity, the residual.

    Raises:
        RuntimeError: a shape, dtype or device is not as described above; or `training` is False and a running
            statistic is None; or one requires a gradient. After an error the running statistics are unchanged.
        ValueError: the activation is unknown; `eps` is below 0, or 0 in training; there is one value per channel in
            training; or one running statistic is given without the other.
        TypeError: an argument is not of the expected type.

    Example:
        >>> x, residual = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
        >>> y = F.batch_norm(x, None, None, training=True, activation="relu", residual=residual)
        >>> normed = torch.nn.functional.batch_norm(x, None, None, training=True)
        >>> torch.allclose(y, torch.relu(normed + residual), atol=1e-5)
        True

    Source:
        Ioffe and Szegedy, "Batch Normalization", 2015; `torch.nn.functional.batch_norm`.
    """
    tensors = (input, residual, running_mean, running_var, weight, bias)
    call = "batch_norm", tensors, (training, momentum, eps, activation, process_group)
    plan = thin.plan_of(*call)
    if plan is not None and not require_gradients(running_mean, running_var):
        output, mean, var = plan(input, residual, weight, bias, None, None)
        count: float = input.numel() // input.shape[1]
        update_both(running_mean, running_var, mean, var, float(momentum), count / (count - 1))
        return output
    input, residual = promoted(input, residual)
    check_tensor(input, "input")
    if input.dim() == 1 and input.numel() == 0:
        # As torch's batch norm, accepts an empty input with no channels.
        if residual is not None:
            check_like(residual, "residual", input)
            residual = residual.view(0, 0)
        named: dict[str, Any] = {"activation": activation, "residual": residual, "process_group": process_group}
        rest = (running_mean, running_var, weight, bias, training, momentum, eps)
        return batch_norm(input.view(0, 0), *rest, **named).view(0)
    check_channels(input, weight, bias)
    if residual is not None:
        check_like(residual, "residual", input)
    check_running(running_mean, running_var, input)
    name, eps, momentum = activation_name(activation), number(eps, "eps"), number(momentum, "momentum")
    if process_group is not None and not isinstance(process_group, torch.distributed.ProcessGroup):
        raise TypeError(f"process_group is {process_group!r}; expected a torch.distributed.ProcessGroup")
    if eps < 0 or (flag(training, "training") and eps == 0):
        raise ValueError(f"eps is {eps}; expected a positive number, or, where training is False, 0")
    if not training:
        return _by_running_statistics(input, residual, running_mean, running_var, weight, bias, eps, name)
    if process_group is not None:
        output, mean, var, count = ops.sync_batch_norm.sync_batch_norm(
            input, residual, weight, bias, eps, name, process_group
        )
    else:
        count = input.numel() // max(input.shape[1], 1)
        if count == 1:
            raise ValueError(
                f"input has shape {shape_of(input)}; expected more than 1 value per channel where training is True"
            )
        options = ops.channel_steps.Options(0, eps, name)
        thin.remember(thin.channel_norm.channel_norm(*tensors[:2], weight, bias, options), *call)
        output, mean, var = ops.channel_norm.channel_norm(input, residual, weight, bias, None, None, options)
    if process_group is None and is_updated_by_torch():
        update_by_torch(F.batch_norm, input, running_mean, running_var, momentum, eps)
    elif count:
        update_both(running_mean, running_var, mean, var, momentum, count / max(count - 1, 1))
    return output


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    activation: Activation = "identity",
) -> Tensor:
    r"""GroupNorm and an activation in one op.

    .. math::
        y = \mathrm{act}\left(\frac{x - \mu_{n,g}}{\sqrt{\sigma_{n,g}^2 + \epsilon}}\, w_c + b_c\right)

    Mean and biased variance are taken over each sample's group of `C / num_groups` channels, and over space.

    Args:
        input: x, `(N, C, *)`; float32, bfloat16, float16 or float64. Tensors that are neither contiguous nor
            channels-last are copied.
        num_groups: the number of groups of channels.
        weight: w, `(C)`, of any of these dtypes; None means 1.
        bias: b, `(C)`, of any of these dtypes; None means 0.
        eps: added to the variance.
        activation: act, applied to the normalised value.

    Returns:
        The input's shape, dtype and memory format.

    Kept for backward:
        The input, and two numbers per group of each sample.

    Raises:
        RuntimeError: a shape, dtype or device is not as described above; or `num_groups` does not divide the
            channels.
        ValueError: the activation is unknown, or there is one value for each group in all.
        TypeError: an argument is not of the expected type.

    Example:
        >>> x = torch.randn(2, 4, 8, 8)
        >>> y = F.group_norm(x, 2, activation="silu")
        >>> torch.allclose(y, torch.nn.functional.silu(torch.nn.functional.group_norm(x, 2)), atol=1e-5)
        True

    Source:
        Wu and He, "Group Normalization", 2018; `torch.nn.functional.group_norm`.
    """
    call = "group_norm", (input, weight, bias), (num_groups, eps, activation)
    plan = thin.plan_of(*call)
    if plan is not None:
        return plan(input, None, weight, bias, None, None)[0]
    check_channels(input, weight, bias)
    groups = whole(num_groups, "num_groups")
    if groups < 1 or input.shape[1] % groups:
        raise RuntimeError(f"num_groups is {groups}; expected a divisor of the channels of {shape_of(input)}")
    if input.numel() == groups:
        raise ValueError(f"input has shape {shape_of(input)}; expected more than 1 value for each of {groups} groups")
    options = ops.channel_steps.Options(int(groups), number(eps, "eps"), activation_name(activation))
    thin.remember(thin.channel_norm.channel_norm(input, None, weight, bias, options), *call)
    input, weight, bias = autocast(input, weight, bias)
    return ops.channel_norm.channel_norm(input, None, weight, bias, None, None, options)[0]


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    activation: Activation = "identity",
) -> Tensor:
    r"""InstanceNorm and an activation in one op.

    .. math::
        y = \mathrm{act}\left(\frac{x - \mu_{n,c}}{\sqrt{\sigma_{n,c}^2 + \epsilon}}\, w_c + b_c\right)

    With `use_input_stats`, mean and biased variance are taken over space, and their means over samples update the
    running statistics, if given, as in `batch_norm`. Otherwise the running statistics are used.

    Args:
        input: x, `(N, C, *)`; float32, bfloat16, float16 or float64.
        running_mean: `(C)`, or None.
        running_var: `(C)`, or None.
        weight: w, `(C)`, of any of these dtypes; None means 1.
        bias: b, `(C)`, of any of these dtypes; None means 0.
        use_input_stats: whether the statistics are those of the input.
        momentum: the weight of the new statistics in the running ones.
        eps: added to the variance.
        activation: act, applied to the normalised value.

    Returns:
        The input's shape and dtype, contiguous, as in torch.

    Kept for backward:
        The input (for channels-last inputs a contiguous copy) and two numbers per channel of each sample.

    Raises:
        RuntimeError: a shape, dtype or device is not as described above; or `use_input_stats` is False and a
            running statistic is None.
        ValueError: the activation is unknown, or space has one element.
        TypeError: an argument is not of the expected type.

    Example:
        >>> x = torch.randn(2, 4, 8, 8)
        >>> y = F.instance_norm(x, activation="relu")
        >>> torch.allclose(y, torch.relu(torch.nn.functional.instance_norm(x)), atol=1e-5)
        True

    Source:
        Ulyanov et al., "Instance Normalization", 2016; `torch.nn.functional.instance_norm`.
    """
    tensors = (input, running_mean, running_var, weight, bias)
    call = "instance_norm", tensors, (use_input_stats, momentum, eps, activation)
    plan = thin.plan_of(*call)
    if plan is not None and input.is_contiguous() and not require_gradients(running_mean, running_var):
        output, mean, var = plan(input, None, weight, bias, None, None)
        if running_mean is not None or running_var is not None:
            size = input.numel() // mean.numel()
            update_both(running_mean, running_var, mean.mean(0), var.mean(0), float(momentum), size / (size - 1))
        return output
    check_channels(input, weight, bias)
    check_running(running_mean, running_var, input)
    eps, momentum, name = number(eps, "eps"), number(momentum, "momentum"), activation_name(activation)
    if memory_format(input) != torch.contiguous_format:
        # Torch's instance norm computes from a contiguous copy and returns a contiguous output.
        input = input.contiguous()
    if not flag(use_input_stats, "use_input_stats"):
        return _by_running_statistics(input, None, running_mean, running_var, weight, bias, eps, name)
    size = math.prod(input.shape[2:])
    if size == 1:
        raise ValueError(f"input has shape {shape_of(input)}; expected more than 1 element in space")
    options = ops.channel_steps.Options(input.shape[1], eps, name)
    thin.remember(thin.channel_norm.channel_norm(input, None, weight, bias, options), *call)
    output, mean, var = ops.channel_norm.channel_norm(input, None, weight, bias, None, None, options)
    if is_updated_by_torch():
        update_by_torch(F.instance_norm, input, running_mean, running_var, momentum, eps)
    elif input.numel():
        update_both(running_mean, running_var, mean.mean(0), var.mean(0), momentum, size / max(size - 1, 1))
    return output


def _by_running_statistics(
    input: Tensor,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str,
) -> Tensor:
    if running_mean is None or running_var is None:
        raise RuntimeError("running_mean or running_var is None; expected both where they are to be used")
    options = ops.channel_steps.Options(0, eps, activation)
    found = ops.channel_norm.channel_norm(input, residual, weight, bias, running_mean, running_var, options)
    return found[0]
