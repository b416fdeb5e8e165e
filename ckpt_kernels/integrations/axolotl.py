"""axolotl: a plugin, and its keys of the configuration.

plugins:
  - ckpt_kernels.integrations.axolotl.CheckpointKernelsPlugin
ckpt_kernels_recompute: output      # or a plan's file, or a budget: 12GiB
gradient_checkpointing: false
"""

from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel, Field
from torch import nn

from .common import Planned, converted, mixed_precision, parsed, tokens, warn_of_checkpointing


class CheckpointKernelsArgs(BaseModel):
    """The keys that the plugin adds to axolotl's configuration.

    Attributes:
        ckpt_kernels_recompute: a level, levels by names of modules, a plan's file, or a budget of memory; see
            `common.parsed`, which refuses true and false.
        ckpt_kernels_logits: the name of the head, such as "lm_head"; `logits` of `ckpt_kernels.convert`.
        ckpt_kernels_tiles: `tiles` of `ckpt_kernels.convert`.

    Example:
        >>> from ckpt_kernels.integrations.axolotl import CheckpointKernelsArgs
        >>> CheckpointKernelsArgs(ckpt_kernels_recompute="12GiB").ckpt_kernels_logits is None
        True
    """

    ckpt_kernels_recompute: bool | int | float | str | dict[str, str] = Field(default="output")
    ckpt_kernels_logits: str | None = Field(default=None)
    ckpt_kernels_tiles: int = Field(default=1)


class CheckpointKernelsPlugin(BasePlugin):
    """Converts the model when it is loaded, with its adapters, before a trainer wraps the model.

    The plan for a budget is made for `micro_batch_size` sequences of `sequence_len` tokens.

    Example:
        >>> from types import SimpleNamespace
        >>> from ckpt_kernels.integrations.axolotl import CheckpointKernelsArgs, CheckpointKernelsPlugin
        >>> cfg = SimpleNamespace(
        ...     **CheckpointKernelsArgs().model_dump(), gradient_checkpointing=False, bf16=False, fp16=False
        ... )
        >>> model = torch.nn.Sequential(torch.nn.LayerNorm(64), torch.nn.GELU(), torch.nn.Linear(64, 64))
        >>> CheckpointKernelsPlugin().post_model_load(cfg, model)
        >>> ckpt_kernels.is_converted(model)
        True
    """

    def get_input_args(self) -> str:
        """The qualified name of the arguments' class, by which axolotl finds the class."""
        return f"{__name__}.{CheckpointKernelsArgs.__name__}"

    def post_model_load(self, cfg: Any, model: nn.Module) -> None:
        """Converts the model.

        Args:
            cfg: axolotl's configuration.
            model: the model.

        Raises:
            TypeError, ValueError: `ckpt_kernels_recompute` has no known form, or is a budget and the configuration
                has no `micro_batch_size` or no `sequence_len`.
            DoesNotFit: no choice fits the budget.
        """
        warn_of_checkpointing(cfg.gradient_checkpointing)
        configured = cfg.ckpt_kernels_recompute
        recompute = parsed("output" if configured is None else configured)
        inputs = _largest_batch(cfg) if isinstance(recompute, Planned) else None
        autocast = mixed_precision(model, cfg.bf16, cfg.fp16)
        logits, tiles = cfg.ckpt_kernels_logits, cfg.ckpt_kernels_tiles or 1
        converted(model, recompute, inputs=inputs, autocast=autocast, logits=logits, tiles=tiles)


def _largest_batch(cfg: Any) -> dict[str, Any]:
    """The batch for which the plan for a budget is made."""
    if cfg.micro_batch_size is None:
        raise ValueError("micro_batch_size is None; expected the number of sequences, which a budget is planned for")
    if cfg.sequence_len is None:
        raise ValueError("sequence_len is None; expected the length of a sequence, which a budget is planned for")
    return tokens(cfg.micro_batch_size, cfg.sequence_len)
