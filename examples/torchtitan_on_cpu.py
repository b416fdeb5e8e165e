"""Trains with torchtitan's own Trainer on a CPU, for trainers.py and the tests: versions 0.2 and 0.3.

Some parts of torchtitan are for GPUs only, and others stand in for them here:

- torchtitan looks for an accelerator, and otherwise calls torch.cuda. Here torch.cpu, with no statistics of memory.
- Version 0.3: the attentions of language models have no backward pass on a CPU. Here torch's attention, with a causal
  mask. And torch 2.13 lacks `torch.distributed.set_timeout`.
"""

import collections
import contextlib
import dataclasses
import gc
import importlib
import importlib.util
import json
import os
import pathlib
import time
import types
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

# The name of the data set and of the model's size in torchtitan's registries.
NAME = "small"


class CpuModule(types.ModuleType):
    """torch.cpu, with the functions of torch.cuda that torchtitan calls besides."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cpu, name)

    def current_device(self) -> int:
        return 0

    def get_device_name(self, device: Any = None) -> str:
        return "cpu"

    def get_device_properties(self, device: Any = None) -> Any:
        return types.SimpleNamespace(name="cpu", total_memory=2**34)

    def memory_stats(self, device: Any = None) -> dict[str, int]:
        return collections.defaultdict(int)

    def reset_peak_memory_stats(self, device: Any = None) -> None:
        pass

    def empty_cache(self) -> None:
        pass


def import_for_cpu() -> None:
    """Imports torchtitan's look for a device, the first time with the CPU as the result."""
    with (
        mock.patch("torch._utils._get_available_device_type", lambda: "cpu"),
        mock.patch("torch._utils._get_device_module", lambda kind: CpuModule("cpu")),
    ):
        utils = importlib.import_module("torchtitan.tools.utils")
    assert utils.device_type == "cpu", "torchtitan was imported before"


def is_new() -> bool:
    """Whether torchtitan is 0.3, and not 0.2."""
    return importlib.util.find_spec("torchtitan.protocols.model_spec") is not None


def save_tokenizer(where: pathlib.Path) -> None:
    """Saves a tokenizer whose tokens are bytes."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: i for i, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(where / "tokenizer.json"))
    (where / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))


def register(texts: list[str]) -> None:
    """Registers texts as a data set of torchtitan."""
    from datasets import Dataset
    from datasets.table import InMemoryTable
    from torchtitan.hf_datasets import DatasetConfig, text_datasets

    rows = Dataset(InMemoryTable.from_pydict({"text": texts}), fingerprint="rows")
    text_datasets.DATASETS[NAME] = DatasetConfig("", lambda path: rows, lambda sample: sample["text"])


def configured_02(recompute: Any, where: pathlib.Path, layers: int, training: dict[str, Any]) -> Any:
    from torchtitan.config import JobConfig
    from torchtitan.models.llama3 import llama3_args
    from torchtitan.protocols import model_converter

    from ckpt_kernels.integrations.torchtitan import converter

    llama3_args[NAME] = dataclasses.replace(
        llama3_args["debugmodel"], dim=128, n_layers=layers, n_heads=4, vocab_size=258, multiple_of=32
    )
    config = JobConfig()
    config.model.name, config.model.flavor, config.model.hf_assets_path = "llama3", NAME, str(where)
    config.job.dump_folder, config.training.dataset = str(where), NAME
    config.activation_checkpoint.mode, config.debug.seed = "none", 0
    config.lr_scheduler.warmup_steps = 2
    for name, value in training.items():
        setattr(config.training, name, value)
    if recompute is not None:
        model_converter._registry_model_converter_cls["ckpt_kernels"] = converter(recompute)
        config.model.converters = ["ckpt_kernels"]
    return config


def causal_attention() -> Any:
    """The configuration of torch's attention with a causal mask, as a module of torchtitan 0.3."""
    from torchtitan.models.common.attention import ScaledDotProductAttention

    class CausalAttention(ScaledDotProductAttention):
        @dataclasses.dataclass(kw_only=True, slots=True)
        class Config(ScaledDotProductAttention.Config):
            pass

        def forward(self, q_BLNH: Tensor, k_BLNH: Tensor, v_BLNH: Tensor, **options: Any) -> Tensor:
            heads = (x.transpose(1, 2) for x in (q_BLNH, k_BLNH, v_BLNH))
            grouped = options.get("enable_gqa", False)
            product = nn.functional.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=grouped)
            return product.transpose(1, 2)

    return CausalAttention.Config()


def configured_03(recompute: Any, where: pathlib.Path, layers: int, training: dict[str, Any]) -> Any:
    from torchtitan.components.optimizer import default_adamw
    from torchtitan.models.llama3 import config_registry

    from ckpt_kernels.integrations.torchtitan import with_conversion

    config = config_registry.llama3_debugmodel()
    model = config.model_spec.model
    model.layers = model.layers[:layers]
    for layer in model.layers:
        layer.attention.inner_attention = causal_attention()
    config.hf_assets_path = config.dump_folder = str(where)
    config.training = dataclasses.replace(config.training, disable_cuda_graphs=True, **training)
    config.dataloader.dataset, config.validator.enable = NAME, False
    config.activation_checkpoint, config.optimizer = None, default_adamw(lr=8e-4)
    config.debug.seed = 0
    if recompute is not None:
        config.model_spec = with_conversion(config.model_spec, recompute)
    return config


@dataclasses.dataclass
class Record:
    """What the steps of a Trainer were called with, and gave."""

    losses: list[float]
    starts: list[float]
    model_inputs: tuple[tuple, dict[str, Any]] | None = None
    step_inputs: dict[str, Any] | None = None


def record(made: Any) -> Record:
    """Records the losses and times of a Trainer's steps, and the last inputs of model and step."""
    found = Record([], [])
    step = made.forward_backward_step

    def recorded(**inputs: Any) -> Tensor:
        found.starts.append(time.process_time())
        loss = step(**inputs)
        found.losses.append(loss.item())
        found.step_inputs = inputs
        return loss

    def watch(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        found.model_inputs = args, kwargs

    made.forward_backward_step = recorded
    made.model_parts[0].register_forward_pre_hook(watch, with_kwargs=True)
    return found


@contextlib.contextmanager
def trainer(
    recompute: Any, texts: list[str], where: pathlib.Path, *, layers: int = 3, change: Any = None, **training: Any
) -> Iterator[tuple[Any, Record]]:
    """A Trainer of torchtitan, and the record of the steps that its `train` will run.

    Args:
        recompute: the flag; None for a model that is not converted.
        texts: the texts to train on.
        where: a folder.
        layers: the number of layers.
        change: a function that changes the configuration; None changes nothing.
        training: `steps`, `local_batch_size`, `seq_len`, and other fields of torchtitan's `training`.
    """
    import_for_cpu()
    save_tokenizer(where)
    register(texts)
    training = {"mixed_precision_param": "float32"} | training
    config = (configured_03 if is_new() else configured_02)(recompute, where, layers, training)
    if change is not None:
        change(config)
    one_process = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    with mock.patch.dict(os.environ, one_process), contextlib.ExitStack() as stack:
        if is_new():
            from torchtitan.models.llama3 import Llama3Model

            stack.enter_context(mock.patch.object(Llama3Model, "get_attention_masks", lambda *args, **kwargs: None))
            stack.enter_context(mock.patch("torch.distributed.set_timeout", lambda *args: None, create=True))
            made = config.build()
        else:
            made = importlib.import_module("torchtitan.train").Trainer(config)
        # torchtitan collects garbage itself.
        stack.callback(gc.enable)
        stack.callback(torch.distributed.destroy_process_group)
        stack.callback(made.close)
        yield made, record(made)


def plain_model(made: Any) -> nn.Module:
    """A model like that of a Trainer, with new weights, which is neither sharded nor converted: for a plan."""
    model = made.model_config.build() if is_new() else type(made.model_parts[0])(made.model_args)
    with torch.no_grad():
        model.init_weights()
    return model.train()
