"""transformers: a callback for Trainer, and so for TRL's trainers; and layers that are converted as they are built.

trainer = Trainer(..., callbacks=[CheckpointKernelsCallback("output")])
trainer = SFTTrainer(..., callbacks=[CheckpointKernelsCallback("12GiB")])
register_patch_mapping(patch_mapping(LlamaDecoderLayer))
"""

import weakref
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..convert import Report, convert
from ..levels import OF_FUNCTIONS
from .common import Planned, Recompute, converted, mixed_precision, parsed, tokens, warn_of_checkpointing


class CheckpointKernelsCallback(TrainerCallback):
    """Converts the model of a Trainer when the Trainer is made, before it wraps the model.

    Args:
        recompute: a level, levels by name, a plan or its file, or a budget of memory; see `common.parsed`. A plan's
            file is read here.
        inputs: for a budget, what the model is called with in a step of the largest size, such as a batch of the data
            collator. None is a batch of tokens of `per_device_train_batch_size` by `max_length`, which TRL's arguments
            have and Trainer's do not.
        logits, tiles: see `ckpt_kernels.convert`.

    Attributes:
        report: what `convert` said; None before.

    Raises:
        TypeError, ValueError: `recompute` is nothing that is known.

    Example:
        >>> from ckpt_kernels.integrations.transformers import CheckpointKernelsCallback
        >>> callback = CheckpointKernelsCallback("output")  # Trainer(..., callbacks=[callback])
        >>> callback.report is None
        True
    """

    def __init__(
        self, recompute: Recompute = "output", *, inputs: Any = None, logits: str | None = None, tiles: int = 1
    ) -> None:
        self.recompute = parsed(recompute)
        self.inputs = inputs
        self.options: Any = {"logits": logits, "tiles": tiles}
        self.report: Report | None = None
        self._model: weakref.ref[nn.Module] | None = None

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Converts the model.

        Raises:
            ValueError: a budget needs `inputs`.
            DoesNotFit: no choice fits the budget.
        """
        model = kwargs["model"]
        # Its name in transformers 5.24 and before it.
        names = ("activation_checkpointing", "gradient_checkpointing")
        warn_of_checkpointing(any(getattr(args, name, False) for name in names))
        self.report = self._converted(model, args)
        self._model = weakref.ref(model)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Looks whether it is the model that was converted which trains.

        Raises:
            RuntimeError: it is another. A model that is wrapped already cannot be converted any more.
        """
        mine = self._model and self._model()
        if mine is None or not any(module is mine for module in kwargs["model"].modules()):
            raise RuntimeError(
                "the model that trains is not the one that was converted; expected this callback in the argument "
                "callbacks of the Trainer, not in add_callback, and a Trainer without model_init"
            )

    def _converted(self, model: Any, args: TrainingArguments) -> Report:
        if not isinstance(self.recompute, Planned):
            return converted(model, self.recompute, **self.options)
        inputs, length = self.inputs, getattr(args, "max_length", None)
        if inputs is None and length is not None:
            inputs = tokens(args.per_device_train_batch_size, length)
        if hasattr(model, "config"):
            # The Trainer sets it too, a line after this.
            model.config.use_cache = args.use_cache
        autocast = mixed_precision(model, args.bf16, args.fp16)
        return converted(model, self.recompute, inputs=inputs, autocast=autocast, **self.options)


def patch_mapping(*layers: type[nn.Module], recompute: str = "output") -> dict[str, type[nn.Module]]:
    """For `transformers.monkey_patching.register_patch_mapping`: layers that convert themselves when they are built.

    A model that `from_pretrained` or `from_config` builds then has them. They are of the class that they replace, so
    that `revert`, `isinstance` and saving find what they look for.

    Args:
        layers: classes of layers, such as `LlamaDecoderLayer`.
        recompute: "block", "output" or "all".

    Returns:
        A class by the name of the class that it stands for.

    Raises:
        TypeError: one of `layers` is no class of modules.
        ValueError: the level is none of these.

    Example:
        >>> from transformers.models.llama.modeling_llama import LlamaMLP
        >>> from ckpt_kernels.integrations.transformers import patch_mapping
        >>> list(patch_mapping(LlamaMLP))
        ['LlamaMLP']
    """
    if recompute not in OF_FUNCTIONS:
        raise ValueError(f"recompute is {recompute!r}; expected one of {', '.join(OF_FUNCTIONS)}")
    for layer in layers:
        if not (isinstance(layer, type) and issubclass(layer, nn.Module)):
            raise TypeError(f"layers has {layer!r}; expected classes of modules, such as LlamaDecoderLayer")
    return {layer.__name__: _that_converts_itself(layer, recompute) for layer in layers}


def _that_converts_itself(layer: type[nn.Module], recompute: str) -> type[nn.Module]:
    def init(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        layer.__init__(self, *args, **kwargs)
        if type(self) is made:
            self.__class__ = layer
            convert(self, recompute=recompute)

    made = type(layer.__name__, (layer,), {"__init__": init, "__module__": layer.__module__})
    return made
