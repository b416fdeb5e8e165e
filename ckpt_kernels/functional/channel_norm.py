"""Channel norms: of (N, C, ...)."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops, thin
from ..activations import Activation, activation_name
from .checks import (
    autocast,
    check_channels,
    check_coefficient,
    check_like,
    memory_format,
    number,
    promoted,
    shape_of,
)


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
    """activation((input - mean) / sqrt(var + eps) * weight + bias + residual), of (N, C, ...), by channel.

    In training mean and (biased) variance are over N and space, and the running ones, if given, move towards them by
    `momentum`, the variance unbiased; else they are the running ones. `residual` has the input's shape. With a
    `process_group` the statistics of training are over the batches of all its processes, which may differ in size.
    Contiguous and channels-last inputs are computed as they lie, and so is the output; others as if contiguous. An
    input without elements leaves the running statistics as they are. ValueError for an eps that torch refuses: below 0,
    and in training 0.

    Keeps the input and five numbers a channel; with a residual also, for relu and leaky_relu, the output, which
    whatever reads it keeps too, or, for other activations but the identity, the residual. Errors leave the running
    statistics as they were. Source: Ioffe and Szegedy, "Batch Normalization", 2015; `torch.nn.functional.batch_norm`.
    """
    tensors = (input, residual, running_mean, running_var, weight, bias)
    call = "batch_norm", tensors, (training, momentum, eps, activation, process_group)
    plan = thin.plan_of(*call)
    if plan is not None:
        output, mean, var = plan(input, residual, weight, bias, None, None)
        count = input.numel() // input.shape[1]
        _move_both(running_mean, running_var, mean, var, float(momentum), count / (count - 1))
        return output
    input, residual = promoted(input, residual)
    if isinstance(input, Tensor) and input.dim() == 1 and input.numel() == 0:
        # torch's own takes it, too: nothing of no channels.
        if residual is not None:
            check_like(residual, "residual", input)
            residual = residual.view(0, 0)
        options = {"activation": activation, "residual": residual, "process_group": process_group}
        rest = (running_mean, running_var, weight, bias, training, momentum, eps)
        return batch_norm(input.view(0, 0), *rest, **options).view(0)
    check_channels(input, weight, bias)
    if residual is not None:
        check_like(residual, "residual", input)
    check_coefficient(running_mean, "running_mean", input, input.shape[1])
    check_coefficient(running_var, "running_var", input, input.shape[1])
    name, eps, momentum = activation_name(activation), number(eps, "eps"), number(momentum, "momentum")
    if eps < 0 or (training and eps == 0):
        raise ValueError(f"eps is {eps}; expected a positive number, or, where training is False, 0")
    if not training:
        return _by_running_statistics(input, residual, running_mean, running_var, weight, bias, eps, name)
    if process_group is not None:
        if not isinstance(process_group, torch.distributed.ProcessGroup):
            raise TypeError(f"process_group is {process_group!r}; expected a torch.distributed.ProcessGroup")
        output, mean, var, count = ops.sync_batch_norm.sync_batch_norm(
            input, residual, weight, bias, eps, name, process_group
        )
    else:
        count = input.numel() // max(input.shape[1], 1)
        if count == 1:
            raise ValueError(
                f"input has shape {shape_of(input)}; expected more than 1 value per channel where training is True"
            )
        options = (0, eps, name)
        thin.remember(thin.channel_norm.channel_norm(input, residual, weight, bias, options), *call)
        output, mean, var = ops.channel_norm.channel_norm(input, residual, weight, bias, None, None, *options)
    if process_group is None and _is_moved_by_torch():
        _move_by_torch(F.batch_norm, input, running_mean, running_var, momentum, eps)
    elif count:
        _move_both(running_mean, running_var, mean, var, momentum, count / max(count - 1, 1))
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
    """activation((input - mean) / sqrt(var + eps) * weight + bias), of (N, C, ...), by sample and group of channels.

    Mean and (biased) variance are over the C / num_groups channels of a group and space. Contiguous and channels-last
    inputs are computed as they lie, and so is the output. Keeps the input, two numbers a group and three a channel, of
    each sample. Source: Wu and He, "Group Normalization", 2018; `torch.nn.functional.group_norm`.
    """
    call = "group_norm", (input, weight, bias), (num_groups, eps, activation)
    plan = thin.plan_of(*call)
    if plan is not None:
        return plan(input, None, weight, bias, None, None)[0]
    check_channels(input, weight, bias)
    if not hasattr(num_groups, "__index__"):
        raise TypeError(f"num_groups is {num_groups!r}; expected an integer")
    if num_groups < 1 or input.shape[1] % num_groups:
        raise RuntimeError(f"num_groups is {num_groups}; expected a divisor of the channels of {shape_of(input)}")
    options = (int(num_groups), number(eps, "eps"), activation_name(activation))
    thin.remember(thin.channel_norm.channel_norm(input, None, weight, bias, options), *call)
    input, weight, bias = autocast(input, weight, bias)
    return ops.channel_norm.channel_norm(input, None, weight, bias, None, None, *options)[0]


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
    """activation((input - mean) / sqrt(var + eps) * weight + bias), of (N, C, ...), by sample and channel.

    With `use_input_stats` mean and (biased) variance are over space, and the running ones, if given, move by `momentum`
    towards their means over the samples, the variance unbiased; without, they are the running ones. The output is
    contiguous, as torch's own. Keeps the input (of one that is channels last a contiguous copy) and five numbers for
    each channel of each sample. Source: Ulyanov et al., "Instance Normalization", 2016;
    `torch.nn.functional.instance_norm`.
    """
    tensors = (input, running_mean, running_var, weight, bias)
    call = "instance_norm", tensors, (use_input_stats, momentum, eps, activation)
    plan = thin.plan_of(*call)
    if plan is not None and input.is_contiguous():
        output, mean, var = plan(input, None, weight, bias, None, None)
        if running_mean is not None or running_var is not None:
            size = input.numel() // mean.numel()
            _move_both(running_mean, running_var, mean.mean(0), var.mean(0), float(momentum), size / (size - 1))
        return output
    check_channels(input, weight, bias)
    check_coefficient(running_mean, "running_mean", input, input.shape[1])
    check_coefficient(running_var, "running_var", input, input.shape[1])
    eps, momentum, name = number(eps, "eps"), number(momentum, "momentum"), activation_name(activation)
    if memory_format(input) != torch.contiguous_format:
        # torch's own computes in a contiguous copy, and gives one back.
        input = input.contiguous()
    if not use_input_stats:
        return _by_running_statistics(input, None, running_mean, running_var, weight, bias, eps, name)
    size = math.prod(input.shape[2:])
    if size == 1:
        raise ValueError(f"input has shape {shape_of(input)}; expected more than 1 element in space")
    options = (input.shape[1], eps, name)
    thin.remember(thin.channel_norm.channel_norm(input, None, weight, bias, options), *call)
    output, mean, var = ops.channel_norm.channel_norm(input, None, weight, bias, None, None, *options)
    if _is_moved_by_torch():
        _move_by_torch(F.instance_norm, input, running_mean, running_var, momentum, eps)
    elif input.numel():
        _move_both(running_mean, running_var, mean.mean(0), var.mean(0), momentum, size / max(size - 1, 1))
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
    found = ops.channel_norm.channel_norm(input, residual, weight, bias, running_mean, running_var, 0, eps, activation)
    return found[0]


def _move_both(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    mean: Tensor,
    var: Tensor,
    momentum: float,
    unbiased: float | Tensor,
) -> None:
    """The running statistics towards those of a batch, whose variance times `unbiased` is unbiased."""
    with torch.no_grad():
        _move(running_mean, mean, momentum)
        _move(running_var, var, momentum, unbiased)


def _move(running: Tensor | None, towards: Tensor, momentum: float, factor: float | Tensor = 1.0) -> None:
    """running = (1 - momentum) * running + momentum * factor * towards."""
    if isinstance(factor, Tensor):  # of a size that torch.jit.trace follows
        towards, factor = towards * factor, 1.0
    if running is not None:
        running.mul_(1 - momentum).add_(towards, alpha=momentum * factor)


def _is_moved_by_torch() -> bool:
    """Within transforms. Not under torch.jit.trace: an output that nobody reads is removed, and the write with it."""
    return ops.registration.is_transformed() and torch._C._get_tracing_state() is None


def _move_by_torch(
    norm: Callable[..., Tensor],
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
) -> None:
    """The same by torch's own norm, the one writer to captured tensors that transforms know, or refuse in its words."""
    if running_mean is not None or running_var is not None:
        with torch.no_grad():
            norm(input, running_mean, running_var, None, None, True, momentum, eps)
