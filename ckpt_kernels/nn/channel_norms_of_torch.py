"""The forward passes of torch's channel norm modules, computed by the functions of this package."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from .. import functional as F
from ..functional.running_statistics import update_by_torch
from .extras import weight_and_bias


def batch_norm_of(
    module: nn.modules.batchnorm._BatchNorm,
    input: Tensor,
    residual: Tensor | None,
    activation: str,
    process_group: "torch.distributed.ProcessGroup | None" = None,
    *,
    repeat_updates: bool = False,
) -> Tensor:
    """The output of a batch norm of torch, with its running statistics updated.

    When a checkpoint repeats the forward pass, the statistics stay as they are, so each step updates them once. With
    `repeat_updates` they are updated again, as torch's batch norm does.
    """
    module._check_input_dim(input)
    is_repeated = _is_recomputing()
    is_counted = module.training and module.track_running_stats and (repeat_updates or not is_repeated)
    momentum = 0.0 if module.momentum is None else module.momentum
    # The count is read only for a cumulative average.
    batches = module.num_batches_tracked if is_counted else None
    if batches is not None and module.momentum is None:
        momentum = 1.0 / float(batches + 1)
    # Without running statistics, those of the batch are used in eval mode too.
    training = module.training or (module.running_mean is None and module.running_var is None)
    if is_counted and is_repeated and process_group is None:
        _update_first(functional.batch_norm, module, input, momentum)
        if batches is not None:
            batches.add_(1)
        is_counted, batches = False, None
    tracked = is_counted or not module.training
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
    # After an error the counter is unchanged, so it is updated last.
    if batches is not None:
        batches.add_(1)
    return output


def instance_norm_of(
    module: nn.modules.instancenorm._InstanceNorm, input: Tensor, activation: str, *, repeat_updates: bool = False
) -> Tensor:
    """The output of an instance norm of torch for a batch, with running statistics updated as in `batch_norm_of`."""
    training = module.training or not module.track_running_stats
    momentum = module.momentum if module.momentum is not None else 0.0
    tracked = repeat_updates or not (training and _is_recomputing())
    # Torch's instance norm updates the statistics after it has saved its tensors, and before an activation saves.
    # Only with an activation in the block must they be updated first.
    if tracked and training and _is_recomputing() and activation != "identity":
        _update_first(functional.instance_norm, module, input, momentum)
        tracked = False
    return F.instance_norm(
        input,
        module.running_mean if tracked else None,
        module.running_var if tracked else None,
        module.weight,
        module.bias,
        training,
        momentum,
        module.eps,
        activation=activation,
    )


def _update_first(
    norm: Callable[..., Tensor], module: nn.modules.batchnorm._NormBase, input: Tensor, momentum: float
) -> None:
    """Update the running statistics before a checkpoint repeats the block.

    A checkpoint stops a repeated forward pass when the last tensor that the backward pass needs is saved. Torch's code
    has updated the statistics by then, and the block has not.
    """
    update_by_torch(norm, input, module.running_mean, module.running_var, momentum, module.eps)


def group_of(module: nn.SyncBatchNorm) -> "torch.distributed.ProcessGroup | None":
    """The processes that the module is synchronised with; None if there is only one process."""
    dist = torch.distributed
    if not dist.is_available() or not dist.is_initialized():
        return None
    group = module.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


def _is_recomputing() -> bool:
    """Whether this forward pass runs within a backward pass."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
