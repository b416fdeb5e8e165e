"""transformers: a callback for Trainer, and so for TRL's trainers; and layers that convert themselves when built.

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
    """Converts the model of a Trainer when the Trainer is created, before the Trainer wraps the model.

    Args:
        recompute: a level, levels by name, a plan or its file, or a memory budget; see `common.parsed`. The file of a
            plan is read in the constructor.
        inputs: for a budget, the inputs of the model in a step of the largest size, such as a batch of the data
            collator. None means a batch of tokens of `per_device_train_batch_size` by `max_length`. TRL's arguments
            have `max_length`, those of Trainer do not.
        logits, tiles: see `ckpt_kernels.convert`.

    Attributes:
        report: the report of `convert`; None before the conversion.

    Raises:
        TypeError, ValueError: `recompute` has no known form.

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
        # The names of the flag in transformers 5.24 and in earlier versions.
        names = ("activation_checkpointing", "gradient_checkpointing")
        warn_of_checkpointing(any(getattr(args, name, False) for name in names))
        self.report = self._converted(model, args)
        self._model = weakref.ref(model)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Checks that the model that trains is the one that was converted.

        Raises:
            RuntimeError: another model trains. A model that is already wrapped can no longer be converted.
        """
        converted_model = self._model and self._model()
        if converted_model is None or not any(module is converted_model for module in kwargs["model"].modules()):
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
            # The Trainer sets this too, a line later.
            model.config.use_cache = args.use_cache
        autocast = mixed_precision(model, args.bf16, args.fp16)
        return converted(model, self.recompute, inputs=inputs, autocast=autocast, **self.options)


def patch_mapping(*layers: type[nn.Module], recompute: str = "output") -> dict[str, type[nn.Module]]:
    """Layers that convert themselves when built, for `transformers.monkey_patching.register_patch_mapping`.

    Models built by `from_pretrained` or `from_config` then contain them. After construction each is an instance of the
    class that was replaced, so that `revert`, `isinstance` and saving work.

    Args:
        layers: classes of layers, such as `LlamaDecoderLayer`.
        recompute: "block", "output" or "all".

    Returns:
        Subclasses by the names of the classes that they replace.

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
    return {layer.__name__: _self_converting(layer, recompute) for layer in layers}


def _self_converting(layer: type[nn.Module], recompute: str) -> type[nn.Module]:
    """A subclass whose instances convert themselves at the end of their constructor."""

    def init(self: nn.Module, /, *args: Any, **kwargs: Any) -> None:
        layer.__init__(self, *args, **kwargs)
        if type(self) is subclass:
            self.__class__ = layer
            convert(self, recompute=recompute)

    subclass = type(layer.__name__, (layer,), {"__init__": init, "__module__": layer.__module__})
    return subclass
