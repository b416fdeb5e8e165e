"""Channel norms as modules: torch.nn's own, with an activation, and of batch norms a residual before it."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from .. import functional as F
from ..activations import Activation, activation_name
from .extras import extras, recorded, weight_and_bias


def batch_norm_of(
    module: nn.modules.batchnorm._BatchNorm,
    input: Tensor,
    residual: Tensor | None,
    activation: str,
    process_group: "torch.distributed.ProcessGroup | None" = None,
    *,
    again: bool = False,
) -> Tensor:
    """What a batch norm of torch's makes of `input`, its running statistics moved as torch's forward moves them.

    Once a step: where a checkpoint runs the forward pass again for the backward pass, they stay where they are, but
    with `again`, by which they move again, as torch's do.
    """
    module._check_input_dim(input)
    counted = module.training and module.track_running_stats and (again or not _recomputing())
    momentum = 0.0 if module.momentum is None else module.momentum
    # Of what is counted nothing but a cumulative average is computed.
    batches = module.num_batches_tracked if counted else None
    if batches is not None and module.momentum is None:
        momentum = 1.0 / float(batches + 1)
    # Without running statistics those of the batch serve in eval mode too.
    training = module.training or (module.running_mean is None and module.running_var is None)
    tracked = counted or not module.training
    weight, bias = weight_and_bias(module)
    output = F.batch_norm(
        input,
        module.running_mean if tracked else None,
        module.running_var if tracked else None,
        weight,
        bias,
        training,
        momentum,
        module.eps,
        activation=activation,
        residual=residual,
        process_group=process_group,
    )
    # An error leaves the counter, too, as it was.
    if batches is not None:
        batches.add_(1)
    return output


def instance_norm_of(module: nn.modules.instancenorm._InstanceNorm, input: Tensor, activation: str) -> Tensor:
    """What an instance norm of torch's makes of a batch, its running statistics moved once a step."""
    training = module.training or not module.track_running_stats
    tracked = not training or not _recomputing()
    return F.instance_norm(
        input,
        module.running_mean if tracked else None,
        module.running_var if tracked else None,
        module.weight,
        module.bias,
        training,
        module.momentum if module.momentum is not None else 0.0,
        module.eps,
        activation=activation,
    )


def group_of(module: nn.SyncBatchNorm) -> "torch.distributed.ProcessGroup | None":
    """The processes that it is synchronised with; None where there are none."""
    dist = torch.distributed
    if not dist.is_available() or not dist.is_initialized():
        return None
    group = module.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


def _recomputing() -> bool:
    """Whether this forward pass is one within a backward pass."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class _BatchNorm:
    """What the batch norms add to torch's, of which they are subclasses as well."""

    def __init__(self, *args: Any, activation: Activation = "identity", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.activation = activation_name(activation)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        if isinstance(input, Proxy) and (call := recorded(self, input, residual)) is not None:
            return call
        return batch_norm_of(self, input, residual, self.activation)

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

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        if isinstance(input, Proxy) and (call := recorded(self, input, residual)) is not None:
            return call
        return batch_norm_of(self, input, residual, self.activation, group_of(self) if self.training else None)

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"input has {input.dim()} dimensions; expected at least 2")


class GroupNorm(nn.GroupNorm):
    """`torch.nn.GroupNorm` with `activation=`; see `functional.group_norm`."""

    def __init__(self, *args: Any, activation: Activation = "identity", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.activation = activation_name(activation)

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Proxy) and (call := recorded(self, input)) is not None:
            return call
        weight, bias = weight_and_bias(self)
        return F.group_norm(input, self.num_groups, weight, bias, self.eps, activation=self.activation)

    def extra_repr(self) -> str:
        return super().extra_repr() + extras(activation=(self.activation, "identity"))


class _InstanceNorm:
    """What the instance norms add to torch's, of which they are subclasses as well."""

    def __init__(self, *args: Any, activation: Activation = "identity", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.activation = activation_name(activation)

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Proxy) and (call := recorded(self, input)) is not None:
            return call
        return super().forward(input)

    def _apply_instance_norm(self, input: Tensor) -> Tensor:
        return instance_norm_of(self, input, self.activation)

    def extra_repr(self) -> str:
        return super().extra_repr() + extras(activation=(self.activation, "identity"))


class InstanceNorm1d(_InstanceNorm, nn.InstanceNorm1d):
    """`torch.nn.InstanceNorm1d` with `activation=`; see `functional.instance_norm`."""


class InstanceNorm2d(_InstanceNorm, nn.InstanceNorm2d):
    """`torch.nn.InstanceNorm2d` with `activation=`; see `functional.instance_norm`."""


class InstanceNorm3d(_InstanceNorm, nn.InstanceNorm3d):
    """`torch.nn.InstanceNorm3d` with `activation=`; see `functional.instance_norm`."""
