"""accelerate: `prepare`, for training loops written by hand, such as diffusers' training scripts.

unet, optimizer, loader = prepare(accelerator, unet, optimizer, loader, recompute="output")
"""

from typing import Any

from accelerate import Accelerator
from torch import nn

from ..model_argument import check_model
from .common import Recompute, converted


def prepare(
    accelerator: Accelerator,
    model: nn.Module,
    *others: Any,
    recompute: Recompute = "output",
    inputs: Any = None,
    logits: str | None = None,
    tiles: int = 1,
) -> tuple[Any, ...]:
    """Converts the model, and then prepares everything as `accelerator.prepare(model, *others)` does.

    The order matters: `prepare` may wrap the model's forward for mixed precision, and the model for several devices.

    Args:
        accelerator: an Accelerator.
        model: a module that is not prepared yet.
        others: the optimizer, the data loaders, the scheduler, as `accelerator.prepare` takes them.
        recompute: a level, levels by name, a plan or its file, or a budget of memory; see `common.parsed`.
        inputs: for a budget, the inputs of the model in a step of the largest size.
        logits, tiles: see `ckpt_kernels.convert`.

    Returns:
        The result of `accelerator.prepare`: the model and the others, in this order.

    Raises:
        TypeError: `model` is no module, or is compiled already.
        TypeError, ValueError: `recompute` has no known form, or is a budget without inputs.
        DoesNotFit: no choice fits the budget.

    Example:
        >>> from accelerate import Accelerator
        >>> from ckpt_kernels.integrations.accelerate import prepare
        >>> model = torch.nn.Sequential(torch.nn.LayerNorm(64), torch.nn.GELU(), torch.nn.Linear(64, 64))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> model, optimizer = prepare(Accelerator(cpu=True), model, optimizer)
        >>> ckpt_kernels.is_converted(model)
        True
    """
    check_model(model, "prepare")
    if accelerator.device_placement:
        # The plan for a budget must run on the device of the steps.
        model.to(accelerator.device)
    converted(model, recompute, inputs=inputs, autocast=accelerator.autocast(), logits=logits, tiles=tiles)
    prepared = accelerator.prepare(model, *others)
    return prepared if isinstance(prepared, tuple) else (prepared,)
