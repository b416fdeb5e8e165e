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
    return any(t is not None and t.requires_grad for t in statistics) and torch.is_grad_enabled()


def update_both(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    mean: Tensor,
    var: Tensor,
    momentum: float,
    unbiased: float | Tensor,
) -> None:
    """Update running statistics by those of a batch. The variance times `unbiased` is the unbiased one."""
    _update(running_mean, mean, momentum)
    _update(running_var, var, momentum, unbiased)


def _update(running: Tensor | None, target: Tensor, momentum: float, factor: float | Tensor = 1.0) -> None:
    """running = (1 - momentum) * running + momentum * factor * target."""
    if isinstance(factor, Tensor):  # computed from a size under torch.jit.trace
        target, factor = target * factor, 1.0
    if running is not None:
        # Detached, because an interrupt within torch's no_grad context would leave gradients off. `.data` hides the
        # write from autograd where no mode records it: as in torch's norm, a pass in training does not break the
        # backward pass of an earlier one in evaluation.
        plain = type(running) is Tensor and not torch.compiler.is_compiling() and not _is_recorded()
        values = running.data if plain else running.detach()
        values.mul_(1 - momentum).add_(target, alpha=momentum * factor)


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
