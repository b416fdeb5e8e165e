"""Trains with axolotl on a CPU, for trainers.py and the tests, from the same configuration that its command reads."""

import contextlib
import json
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import nn

PLUGIN = "ckpt_kernels.integrations.axolotl.CheckpointKernelsPlugin"
# No model is loaded from the hub, and no figures are sent.
OFFLINE = {
    "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "AXOLOTL_DO_NOT_TRACK": "1", "DO_NOT_TRACK": "1",
    "WANDB_MODE": "disabled", "WANDB_CONSOLE": "off", "ACCELERATE_USE_CPU": "true",
}  # fmt: skip


def save_model(where: pathlib.Path, config: Any) -> None:
    """Saves a model of random weights, with a tokenizer whose tokens are bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = Tokenizer(models.BPE({character: i for i, character in enumerate(alphabet)}, merges=[]))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    tokenizer.save_pretrained(where)
    config.vocab_size, config.pad_token_id = len(tokenizer), tokenizer.pad_token_id
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(where)


def configuration(recompute: Any, where: pathlib.Path, texts: list[str], steps: int, **keys: Any) -> dict[str, Any]:
    """A configuration of axolotl, and the files that the configuration names.

    Args:
        recompute: the flag; None for no plugin.
        where: the folder of a saved model.
        texts: the texts to train on.
        steps: the number of steps.
        keys: further keys.
    """
    (where / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    flag = {} if recompute is None else {"plugins": [PLUGIN], "ckpt_kernels_recompute": recompute}
    return {
        "base_model": str(where), "output_dir": str(where / "out"), "dataset_prepared_path": str(where / "prepared"),
        "datasets": [{"path": str(where / "texts.jsonl"), "ds_type": "json", "type": "completion"}],
        "dataset_num_proc": 1, "shuffle_merged_datasets": False,
        "max_steps": steps, "num_epochs": 1, "gradient_accumulation_steps": 1, "logging_steps": 1,
        "optimizer": "adamw_torch", "lr_scheduler": "constant", "learning_rate": 1e-3, "seed": 0,
        "bf16": False, "fp16": False, "tf32": False, "gradient_checkpointing": False, "sdp_attention": True,
        "pad_to_sequence_len": True, "save_strategy": "no", **flag, **keys,
    }  # fmt: skip


@contextlib.contextmanager
def watched(watch: Callable[[nn.Module], None] | None) -> Iterator[None]:
    """Calls `watch` with each model that axolotl loads."""
    from axolotl.loaders import ModelLoader

    load = ModelLoader.load

    def loaded(self: Any) -> Any:
        model, config = load(self)
        if watch is not None:
            watch(model)
        return model, config

    with mock.patch.object(ModelLoader, "load", loaded):
        yield


@contextlib.contextmanager
def trained(
    recompute: Any,
    where: pathlib.Path,
    texts: list[str],
    steps: int,
    watch: Callable[[nn.Module], None] | None = None,
    **keys: Any,
) -> Iterator[Any]:
    """The Trainer of axolotl, after training; see `configuration`. `watch` is called with the model when loaded."""
    with mock.patch.dict(os.environ, OFFLINE):
        from axolotl.cli.args import TrainerCliArgs
        from axolotl.cli.config import load_cfg
        from axolotl.common.datasets import load_datasets
        from axolotl.integrations.base import PluginManager
        from axolotl.train import train
        from axolotl.utils.dict import DictDefault

        try:
            cfg = load_cfg(DictDefault(configuration(recompute, where, texts, steps, **keys)))
            data = load_datasets(cfg=cfg, cli_args=TrainerCliArgs())
            # axolotl draws adapters from the generator as it finds it.
            torch.manual_seed(0)
            with watched(watch):
                *_, trainer = train(cfg=cfg, dataset_meta=data)
            yield trainer
        finally:
            # The manager is one for the process.
            PluginManager.get_instance().plugins.pop(PLUGIN, None)
