"""What torch's own channel norms compute, by our functions."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from .. import functional as F
from ..functional.running_statistics import move_by_torch
from .extras import weight_and_bias


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
    repeated = _recomputing()
    counted = module.training and module.track_running_stats and (again or not repeated)
    momentum = 0.0 if module.momentum is None else module.momentum
    # Of what is counted nothing but a cumulative average is computed.
    batches = module.num_batches_tracked if counted else None
    if batches is not None and module.momentum is None:
        momentum = 1.0 / float(batches + 1)
    # Without running statistics those of the batch serve in eval mode too.
    training = module.training or (module.running_mean is None and module.running_var is None)
    if counted and repeated and process_group is None:
        _move_first(functional.batch_norm, module, input, momentum)
        if batches is not None:
            batches.add_(1)
        counted, batches = False, None
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


def instance_norm_of(
    module: nn.modules.instancenorm._InstanceNorm, input: Tensor, activation: str, *, again: bool = False
) -> Tensor:
    """What an instance norm of torch's makes of a batch, its running statistics moved once a step, or `again`."""
    training = module.training or not module.track_running_stats
    momentum = module.momentum if module.momentum is not None else 0.0
    tracked = again or not (training and _recomputing())
    # Torch's instance norm, unlike the batch norm, moves them after the norm has saved, and so before the activation
    # does: ours are to move first only where an activation is in the block.
    if tracked and training and _recomputing() and activation != "identity":
        _move_first(functional.instance_norm, module, input, momentum)
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


def _move_first(
    norm: Callable[..., Tensor], module: nn.modules.batchnorm._NormBase, input: Tensor, momentum: float
) -> None:
    """Moves the running statistics before the block runs again: a checkpoint stops a forward where the last tensor that
    it wants is saved, which torch's code does after the statistics have moved, and the block before."""
    move_by_torch(norm, input, module.running_mean, module.running_var, momentum, module.eps)


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
