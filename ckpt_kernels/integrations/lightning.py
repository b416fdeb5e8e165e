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
    """Converts the modules that a LightningModule calls, before the Trainer wraps the LightningModule.

    Training calls `training_step` and not the LightningModule's forward, so the modules in it are converted one by one.
    Models that `configure_model` creates come later: convert them there with `ckpt_kernels.convert`.

    Args:
        recompute: a level, or a memory budget; see `common.parsed`. Levels by name and a plan are for one model, and
            need `module`.
        module: the name of the attribute that holds the model, such as "model"; None means all that hold modules.
        inputs: for a budget, the inputs of that model in a step of the largest size; needs `module` unless the
            LightningModule holds only one module.
        logits, tiles: see `ckpt_kernels.convert`; `logits` needs `module`.

    Attributes:
        reports: the reports of `convert`, by the names of the modules.

    Raises:
        TypeError, ValueError: `recompute` has no known form.

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
        """Converts, if the stage is "fit".

        Raises:
            ValueError: there is no such module, or there are several and `recompute` or `logits` is for one.
            DoesNotFit: no choice fits the budget.
        """
        if stage != "fit":
            return
        models = self._chosen(pl_module)
        if isinstance(self.recompute, Planned):
            # The plan for a budget must run on the device of the steps. Lightning moves the model there only later.
            pl_module.to(trainer.strategy.root_device)
        context = trainer.precision_plugin.forward_context()
        for name, model in models.items():
            self.reports[name] = converted(model, self.recompute, inputs=self.inputs, autocast=context, **self.options)

    def _chosen(self, pl_module: LightningModule) -> dict[str, nn.Module]:
        """The modules to convert, by name."""
        models = dict(_callable_children(pl_module))
        if self.module is not None:
            # With duplicates, because two attributes may name one module.
            named = dict(pl_module.named_modules(remove_duplicate=False))
            models = {self.module: named[self.module]} if self.module and self.module in named else {}
            if not models:
                raise ValueError(f"module is {self.module!r}; expected the name of a module of the LightningModule")
        is_for_one = not isinstance(self.recompute, str) or self.options["logits"] is not None
        if is_for_one and len(models) != 1:
            raise ValueError(
                f"recompute or logits is for one model, and the LightningModule holds {', '.join(models) or 'none'}; "
                'expected module="NAME"'
            )
        return models


def _callable_children(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The outermost callable modules inside one: the children, and those in lists and dicts of modules."""
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from ((f"{name}.{subname}", submodule) for subname, submodule in _callable_children(child))
        else:
            yield name, child
