"""Rules for torch's norms over channels: batch, group and instance norms."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ... import functional as F
from ... import thin
from ...nn.channel_norms_of_torch import batch_norm_of, group_of, instance_norm_of
from ..operands import has_steps_of
from ..torch_patches import are_patched
from .norms import Norm, are_coefficients, is_dense_map

# The methods that the forward of torch's instance norms calls, which an instance may override.
_STEPS = frozenset(("_apply_instance_norm", "_handle_no_batch_input"))


@dataclass(frozen=True)
class BatchNorm(Norm):
    """The rule for torch.nn's batch norms, synchronised or not."""

    description = "batch_norm"

    def compute(self, module: Any, input: Tensor, activation: str) -> Tensor | None:
        # Where torch's batch norm raises an error, the batch has been counted before, so the original must run.
        if input.dim() < 2 or input.shape[1] != module.num_features or input.numel() <= input.shape[1]:
            return None
        if not _are_of_channels(module, input) or not has_running_statistics(input, module):
            return None
        if not (module.num_batches_tracked is None or is_plain_counter(module.num_batches_tracked)):
            return None
        if type(module.eps) is not float or not module.eps > 0:
            return None
        group = group_of(module) if isinstance(module, nn.SyncBatchNorm) and module.training else None
        return batch_norm_of(module, input, None, activation, group, repeat_updates=True)


@dataclass(frozen=True)
class GroupNorm(Norm):
    """The rule for `torch.nn.GroupNorm`."""

    description = "group_norm"

    def by_plan(self, module: Any, input: Any) -> Tensor | None:
        plan, *tensors = self._plan_of(module, input, "identity")
        return None if plan is None or are_patched() else plan(*tensors)[0]

    def _plan_of(self, module: Any, input: Any, activation: str) -> tuple:
        """The plan for a module and an input, with the tensors that the plan takes; None with these if there is none.

        A plan exists only for shapes and dtypes that torch's group norm takes too. The conditions here are all others
        of `compute`.
        """
        weight, bias = module.weight, module.bias
        options = module.num_groups, module.eps, activation
        plan = thin.plan_of("group_norm", (input, weight, bias), options)
        if plan is not None and ((weight is None) is not (bias is None) or not _is_map(input, module.num_channels)):
            plan = None
        return plan, input, None, weight, bias, None, None

    def compute(self, module: Any, input: Tensor, activation: str) -> Tensor | None:
        plan, *tensors = self._plan_of(module, input, activation)
        if plan is not None:
            return plan(*tensors)[0]
        # For inputs of shape (N, C) eager torch keeps less.
        if input.dim() < 3 or input.shape[1] != module.num_channels or not _are_of_channels(module, input):
            return None
        has_both_or_neither = (module.weight is None) is (module.bias is None)
        if not has_both_or_neither or type(module.num_groups) is not int or module.num_groups <= 0:
            return None
        # Torch refuses one value for each group.
        if input.numel() == module.num_groups:
            return None
        # For other layouts eager torch keeps a contiguous copy, and not the tensor that the input may be a view of.
        input = input if is_dense_map(input) else input.contiguous()
        return F.group_norm(input, module.num_groups, module.weight, module.bias, module.eps, activation=activation)


@dataclass(frozen=True)
class InstanceNorm(Norm):
    """The rule for torch.nn's instance norms, whose inputs may lack the batch dimension."""

    description = "instance_norm"

    def compute(self, module: Any, input: Tensor, activation: str) -> Tensor | None:
        if not has_steps_of(type(module), nn.InstanceNorm1d) or not _STEPS.isdisjoint(vars(module)):
            return None
        module._check_input_dim(input)
        single = input.dim() == module._get_no_batch_dim()
        if input.shape[0 if single else 1] != module.num_features:
            return None
        if not _are_of_channels(module, input) or not has_running_statistics(input, module):
            return None
        input = input.unsqueeze(0) if single else input
        # As in torch, the output is contiguous, and the saved input is no view of a larger tensor.
        input = input if is_dense_map(input) else input.contiguous()
        output = instance_norm_of(module, input, activation, repeat_updates=True).contiguous()
        return output.squeeze(0) if single else output


def _is_map(input: Tensor, channels: int) -> bool:
    return input.dim() > 2 and input.shape[1] == channels and is_dense_map(input)


def _are_of_channels(module: Any, input: Tensor) -> bool:
    """Whether weight and bias have one element for each channel, and a dtype that torch's norms take."""
    weight, bias = module.weight, module.bias
    if not are_coefficients(input, weight, bias):
        return False
    return weight is None or (weight.dim() == 1 and (bias is None or bias.shape == weight.shape))


def has_running_statistics(input: Tensor, module: nn.Module) -> bool:
    """Whether the fused norm can use and update the module's running statistics as torch's norm does.

    Both statistics are there or neither, the weight has their dtype, and the settings for the update are plain values.
    """
    mean, variance, momentum = module.running_mean, module.running_var, module.momentum
    if type(module.training) is not bool or type(module.track_running_stats) is not bool:
        return False
    if mean is None and variance is None:
        return True
    if mean is None or variance is None or not (momentum is None or type(momentum) in (float, int)):
        return False
    return are_coefficients(input, module.weight, mean, variance) and are_running_statistics(
        mean, variance, module.num_features
    )


def are_running_statistics(mean: Tensor, variance: Tensor, channels: int) -> bool:
    """Whether these are running statistics of that many channels, and need no gradient."""
    return mean.shape == variance.shape == (channels,) and not (mean.requires_grad or variance.requires_grad)


def is_plain_counter(tensor: Any) -> bool:
    """Whether the value is a counter of batches as torch makes it: an int64 tensor without dimensions."""
    return type(tensor) is Tensor and tensor.dtype == torch.int64 and tensor.dim() == 0
