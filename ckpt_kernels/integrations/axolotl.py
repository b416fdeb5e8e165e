"""axolotl: a plugin, and its key of the configuration.

plugins:
  - ckpt_kernels.integrations.axolotl.CheckpointKernelsPlugin
ckpt_kernels_recompute: output      # or a plan's file, or a budget: 12GiB
gradient_checkpointing: false
"""

from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel, Field
from torch import nn

from .common import converted, mixed_precision, tokens, warn_of_checkpointing


class CheckpointKernelsArgs(BaseModel):
    """The key that the plugin adds to axolotl's configuration.

    Attributes:
        ckpt_kernels_recompute: a level, a plan's file, or a budget of memory; see `common.parsed`.
    """

    ckpt_kernels_recompute: str | float = Field(default="output")


class CheckpointKernelsPlugin(BasePlugin):
    """Converts the model when it is loaded, its adapters too, and before a trainer wraps it.

    A budget is planned for `micro_batch_size` sequences of `sequence_len` tokens.
    """

    def get_input_args(self) -> str:
        """The name of the class of the arguments, by which axolotl finds it."""
        return f"{__name__}.{CheckpointKernelsArgs.__name__}"

    def post_model_load(self, cfg: Any, model: nn.Module) -> None:
        """Converts the model.

        Args:
            cfg: axolotl's configuration.
            model: the model.

        Raises:
            TypeError, ValueError: `ckpt_kernels_recompute` is nothing that is known.
            DoesNotFit: no choice fits the budget.
        """
        warn_of_checkpointing(cfg.gradient_checkpointing)
        inputs = tokens(cfg.micro_batch_size or 1, cfg.sequence_len or 1)
        autocast = mixed_precision(model, cfg.bf16, cfg.fp16)
        converted(model, cfg.ckpt_kernels_recompute or "output", inputs=inputs, autocast=autocast)
