"""Running statistics of channel norms: what they may be, and how they follow those of batches."""

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
        if want_gradients(tensor):
            raise RuntimeError(f"{argument} requires a gradient, and has none; expected one that requires none")


def want_gradients(*statistics: Tensor | None) -> bool:
    return any(t is not None and t.requires_grad for t in statistics) and torch.is_grad_enabled()


def move_both(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    mean: Tensor,
    var: Tensor,
    momentum: float,
    unbiased: float | Tensor,
) -> None:
    """The running statistics towards those of a batch, whose variance times `unbiased` is unbiased."""
    _move(running_mean, mean, momentum)
    _move(running_var, var, momentum, unbiased)


def _move(running: Tensor | None, towards: Tensor, momentum: float, factor: float | Tensor = 1.0) -> None:
    """running = (1 - momentum) * running + momentum * factor * towards."""
    if isinstance(factor, Tensor):  # of a size that torch.jit.trace follows
        towards, factor = towards * factor, 1.0
    if running is not None:
        # Detached, not under no_grad: an interrupt in torch's own context would leave gradients off. And by its data,
        # where nobody follows what is written: in torch's own norm, too, a pass in training does not stand in the way
        # of the backward pass of one in evaluation.
        plain = type(running) is Tensor and not torch.compiler.is_compiling() and not _is_followed()
        held = running.data if plain else running.detach()
        held.mul_(1 - momentum).add_(towards, alpha=momentum * factor)


def _is_followed() -> bool:
    """Whether a mode sees each op, or torch.jit.trace."""
    return torch._C._len_torch_dispatch_stack() > 0 or torch._C._get_tracing_state() is not None


def is_moved_by_torch() -> bool:
    """Within transforms. Not under torch.jit.trace: an output that nobody reads is removed, and the write with it."""
    return ops.registration.is_transformed() and torch._C._get_tracing_state() is None


def move_by_torch(
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
