"""Running statistics of channel norms: checks and updates."""

from collections.abc import Callable

import torch
from torch import Tensor

from .. import ops
from .checks import check_coefficient


def check_running(mean: Tensor | None, var: Tensor | None, input: Tensor) -> None:
    if (mean is None) != (var is None):
        given, missing = ("running_mean", "running_var") if var is None else ("running_var", "running_mean")
        raise ValueError(f"{given} is given, and {missing} is None; expected both or neither")
    for tensor, argument in ((mean, "running_mean"), (var, "running_var")):
        check_coefficient(tensor, argument, input, input.shape[1])
        if require_gradients(tensor):
            raise RuntimeError(f"{argument} requires a gradient, and has none; expected one that requires none")


def require_gradients(*statistics: Tensor | None) -> bool:
    # A loop, because a generator takes as long as a small kernel.
    for statistic in statistics:
        if statistic is not None and statistic.requires_grad:
            return torch.is_grad_enabled()
    return False


def update_both(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    mean: Tensor,
    var: Tensor,
    momentum: float,
    unbiased: float | Tensor,
) -> None:
    """Update running statistics by those of a batch. The variance times `unbiased` is the unbiased one."""
    if running_mean is None and running_var is None:
        return
    if isinstance(unbiased, Tensor):  # computed from a size under torch.jit.trace
        var, unbiased = var * unbiased, 1.0
    is_hidden = not (torch.compiler.is_compiling() or _is_recorded())
    for running, target, factor in ((running_mean, mean, momentum), (running_var, var, momentum * unbiased)):
        if running is not None:
            # Detached, because an interrupt within torch's no_grad context would leave gradients off. `.data` hides the
            # write from autograd where no mode records it: as in torch's norm, a pass in training does not break the
            # backward pass of an earlier one in evaluation.
            values = running.data if is_hidden and type(running) is Tensor else running.detach()
            values.mul_(1 - momentum).add_(target, alpha=factor)


def _is_recorded() -> bool:
    """Whether a dispatch mode or torch.jit.trace sees each op."""
    return torch._C._len_torch_dispatch_stack() > 0 or torch._C._get_tracing_state() is not None


def is_updated_by_torch() -> bool:
    """Whether `update_by_torch` must update running statistics: within transforms.

    Not under torch.jit.trace, which removes ops without used outputs, and their writes.
    """
    return ops.registration.is_transformed() and torch._C._get_tracing_state() is None


def update_by_torch(
    norm: Callable[..., Tensor],
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
) -> None:
    """Update running statistics by a call of torch's norm.

    Transforms allow no other op to write to captured tensors. Where they reject the norm too, the error is torch's.
    """
    if running_mean is not None or running_var is not None:
        with torch.no_grad():
            norm(input, running_mean, running_var, None, None, True, momentum, eps)
