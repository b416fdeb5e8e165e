"""Channel norms as modules: torch.nn's own, with an activation, and of batch norms a residual before it."""

from typing import Any

import torch
from torch import Tensor, nn

from .. import functional as F
from ..activations import Activation, activation_name
from .extras import extras


class _BatchNorm:
    """What the batch norms add to torch's, of which they are subclasses as well."""

    def __init__(self, *args: Any, activation: Activation = "identity", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.activation = activation_name(activation)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        self._check_input_dim(input)
        momentum = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            batches = self.num_batches_tracked + 1
            if self.momentum is None:
                momentum = 1.0 / float(batches)
        # Without running statistics those of the batch serve in eval mode too.
        training = self.training or (self.running_mean is None and self.running_var is None)
        tracked = not self.training or self.track_running_stats
        output = F.batch_norm(
            input,
            self.running_mean if tracked else None,
            self.running_var if tracked else None,
            self.weight,
            self.bias,
            training,
            momentum,
            self.eps,
            activation=self.activation,
            residual=residual,
            process_group=self._group() if self.training else None,
        )
        # An error leaves the counter, too, as it was.
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.copy_(batches)
        return output

    def _group(self) -> "torch.distributed.ProcessGroup | None":
        return None

    def extra_repr(self) -> str:
        return super().extra_repr() + extras(activation=(self.activation, "identity"))


class BatchNorm1d(_BatchNorm, nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d` with `activation=`; `forward(input, residual=None)`. See `functional.batch_norm`."""


class BatchNorm2d(_BatchNorm, nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` with `activation=`; `forward(input, residual=None)`. See `functional.batch_norm`."""


class BatchNorm3d(_BatchNorm, nn.BatchNorm3d):
    """`torch.nn.BatchNorm3d` with `activation=`; `forward(input, residual=None)`. See `functional.batch_norm`."""


class SyncBatchNorm(_BatchNorm, nn.SyncBatchNorm):
    """`torch.nn.SyncBatchNorm` with `activation=`; `forward(input, residual=None)`. See `functional.batch_norm`.

    On the CPU as well as on GPUs, over any torch.distributed backend. Where no process group was set up, or in eval
    mode, it is a batch norm.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"input has {input.dim()} dimensions; expected at least 2")

    def _group(self) -> "torch.distributed.ProcessGroup | None":
        dist = torch.distributed
        if not dist.is_available() or not dist.is_initialized():
            return None
        group = self.process_group or dist.group.WORLD
        return group if dist.get_world_size(group) > 1 else None


class GroupNorm(nn.GroupNorm):
    """`torch.nn.GroupNorm` with `activation=`; see `functional.group_norm`."""

    def __init__(self, *args: Any, activation: Activation = "identity", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.activation = activation_name(activation)

    def forward(self, input: Tensor) -> Tensor:
        return F.group_norm(input, self.num_groups, self.weight, self.bias, self.eps, activation=self.activation)

    def extra_repr(self) -> str:
        return super().extra_repr() + extras(activation=(self.activation, "identity"))


class _InstanceNorm:
    """What the instance norms add to torch's, of which they are subclasses as well."""

    def __init__(self, *args: Any, activation: Activation = "identity", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.activation = activation_name(activation)

    def _apply_instance_norm(self, input: Tensor) -> Tensor:
        return F.instance_norm(
            input,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.training or not self.track_running_stats,
            self.momentum if self.momentum is not None else 0.0,
            self.eps,
            activation=self.activation,
        )

    def extra_repr(self) -> str:
        return super().extra_repr() + extras(activation=(self.activation, "identity"))


class InstanceNorm1d(_InstanceNorm, nn.InstanceNorm1d):
    """`torch.nn.InstanceNorm1d` with `activation=`; see `functional.instance_norm`."""


class InstanceNorm2d(_InstanceNorm, nn.InstanceNorm2d):
    """`torch.nn.InstanceNorm2d` with `activation=`; see `functional.instance_norm`."""


class InstanceNorm3d(_InstanceNorm, nn.InstanceNorm3d):
    """`torch.nn.InstanceNorm3d` with `activation=`; see `functional.instance_norm`."""
