"""Lightning: a callback for its Trainer, from `lightning` or, where that is not installed, from `pytorch_lightning`.

trainer = Trainer(callbacks=[CheckpointKernelsCallback("output")])
"""

from collections.abc import Iterator
from typing import Any

from torch import nn

from ..convert import Report
from .common import Planned, Recompute, converted, parsed

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError:
    from pytorch_lightning import Callback, LightningModule, Trainer


class CheckpointKernelsCallback(Callback):
    """Converts what a LightningModule calls, before the Trainer wraps it.

    A LightningModule's own forward is not what trains, `training_step` is; so the modules in it are converted one by
    one. Models that `configure_model` makes come later: convert these there, by `ckpt_kernels.convert`.

    Args:
        recompute: a level, or a budget of memory; see `common.parsed`. Levels by name and a plan are for one model:
            they need `module`.
        module: the name of the attribute that holds the model, such as "model"; None is all that hold modules.
        inputs: for a budget, what that model is called with in a step of the largest size; needs `module`, too, unless
            the LightningModule holds one alone.
        logits, tiles: see `ckpt_kernels.convert`; `logits` needs `module`, too.

    Attributes:
        reports: what `convert` said, by the names of the modules.

    Raises:
        TypeError, ValueError: `recompute` is nothing that is known.

    Example:
        >>> from ckpt_kernels.integrations.lightning import CheckpointKernelsCallback
        >>> callback = CheckpointKernelsCallback("output")  # Trainer(callbacks=[callback])
        >>> callback.reports
        {}
    """

    def __init__(
        self,
        recompute: Recompute = "output",
        *,
        module: str | None = None,
        inputs: Any = None,
        logits: str | None = None,
        tiles: int = 1,
    ) -> None:
        self.recompute = parsed(recompute)
        self.module = module
        self.inputs = inputs
        self.options: Any = {"logits": logits, "tiles": tiles}
        self.reports: dict[str, Report] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Converts, when the stage is "fit".

        Raises:
            ValueError: there is no such module, or there are several for what is meant for one.
            DoesNotFit: no choice fits the budget.
        """
        if stage != "fit":
            return
        found = self._chosen(pl_module)
        if isinstance(self.recompute, Planned):
            # A budget is planned for where the steps run. Lightning moves the model there only later.
            pl_module.to(trainer.strategy.root_device)
        context = trainer.precision_plugin.forward_context()
        for name, model in found.items():
            self.reports[name] = converted(model, self.recompute, inputs=self.inputs, autocast=context, **self.options)

    def _chosen(self, pl_module: LightningModule) -> dict[str, nn.Module]:
        found = dict(_called_below(pl_module))
        if self.module is not None:
            found = {name: module for name, module in pl_module.named_modules() if name == self.module and name}
            if not found:
                raise ValueError(f"module is {self.module!r}; expected the name of a module of the LightningModule")
        is_for_one = not isinstance(self.recompute, str) or self.options["logits"] is not None
        if is_for_one and len(found) != 1:
            raise ValueError(
                f"recompute or logits is for one model, and the LightningModule holds {', '.join(found) or 'none'}; "
                'expected module="NAME"'
            )
        return found


def _called_below(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The outermost modules below one that can be called: its children, and those of lists and dicts of modules."""
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from ((f"{name}.{below}", found) for below, found in _called_below(child))
        else:
            yield name, child
