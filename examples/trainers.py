"""Trains a small Llama with each trainer, unconverted and with the flag: losses, memory, and the time of a step.

    python examples/trainers.py --steps 50

Needs transformers, and also runs accelerate, TRL with PEFT, and Lightning, if installed. The text is the sources of
Python's standard library, as bytes.
"""

import argparse
import copy
import importlib.util
import json
import os
import pathlib
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from side_by_side import RAISED_THRESHOLDS
from torch import nn
from train_lm import corpus

from ckpt_kernels.memory import peak_bytes, saved_bytes

LAYERS, WIDTH, BATCH, TOKENS = 3, 128, 4, 128
# The values of the flag: none, a level, and a budget of half of eager's peak.
WAYS = {"eager": None, '"output"': "output", "budget 0.5": 0.5}
Rows = list[dict[str, torch.Tensor]]


class Watch:
    """Records the losses that a model returns, and the seconds between forward passes: whole steps of any trainer."""

    def __init__(self, model: nn.Module) -> None:
        self.losses: list[float] = []
        self.starts: list[float] = []
        model.register_forward_pre_hook(lambda *_: self.starts.append(time.perf_counter()))
        model.register_forward_hook(lambda module, args, output: self.losses.append(output.loss.item()))

    def seconds(self) -> float:
        return statistics.median(b - a for a, b in zip(self.starts[1:], self.starts[2:], strict=False))


def steps_to_time(text: str) -> int:
    """The number of steps; at least enough for a median of the steps after the first."""
    if not text.isdecimal() or int(text) < 3:
        raise argparse.ArgumentTypeError(f"{text!r} given; expected a whole number from 3")
    return int(text)


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=WIDTH, intermediate_size=8 * WIDTH // 3, num_hidden_layers=LAYERS,
        num_attention_heads=4, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).train()


def rows(steps: int) -> Rows:
    text, generator = corpus(), torch.Generator().manual_seed(1)
    starts = torch.randint(len(text) - TOKENS, (steps * BATCH,), generator=generator)
    return [{"input_ids": row, "labels": row} for row in (text[s : s + TOKENS].long() for s in starts.tolist())]


def batch_of(data: Rows) -> dict[str, torch.Tensor]:
    return {name: torch.stack([row[name] for row in data]) for name in data[0]}


def callbacks(recompute: Any, data: Rows) -> list:
    from ckpt_kernels.integrations.transformers import CheckpointKernelsCallback

    return [] if recompute is None else [CheckpointKernelsCallback(recompute, inputs=batch_of(data[:BATCH]))]


def arguments(steps: int, where: str) -> dict[str, Any]:
    return {
        "output_dir": where, "max_steps": steps, "per_device_train_batch_size": BATCH, "use_cpu": True,
        "report_to": [], "save_strategy": "no", "disable_tqdm": True, "learning_rate": 1e-3, "logging_strategy": "no",
    }  # fmt: skip


def by_transformers(recompute: Any, data: Rows, steps: int) -> tuple[nn.Module, Watch]:
    from transformers import Trainer, TrainingArguments

    with tempfile.TemporaryDirectory() as where:
        args = TrainingArguments(**arguments(steps, where))
        trainer = Trainer(llama(), args, train_dataset=data, callbacks=callbacks(recompute, data))
        watch = Watch(trainer.model)
        trainer.train()
    return trainer.model, watch


def by_trl(recompute: Any, data: Rows, steps: int) -> tuple[nn.Module, Watch]:
    """Trains adapters on a frozen base with TRL."""
    from datasets import Dataset
    from datasets.table import InMemoryTable
    from peft import LoraConfig
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    numbers = Tokenizer(models.WordLevel({str(i): i for i in range(256)}, unk_token="0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=numbers, pad_token="0", eos_token="1")
    table = InMemoryTable.from_pydict({"input_ids": [row["input_ids"].tolist() for row in data]})
    with tempfile.TemporaryDirectory() as where:
        args = SFTConfig(
            **arguments(steps, where) | {"learning_rate": 2e-3}, bf16=False, gradient_checkpointing=False,
            max_length=TOKENS, dataset_kwargs={"skip_prepare_dataset": True},
        )  # fmt: skip
        torch.manual_seed(0)
        trainer = SFTTrainer(
            llama(), args, train_dataset=Dataset(table, fingerprint="rows"), processing_class=tokenizer,
            peft_config=LoraConfig(r=8, target_modules="all-linear"), callbacks=callbacks(recompute, data),
        )  # fmt: skip
        watch = Watch(trainer.model)
        trainer.train()
    return trainer.model, watch


def by_accelerate(recompute: Any, data: Rows, steps: int) -> tuple[nn.Module, Watch]:
    from accelerate import Accelerator

    from ckpt_kernels.integrations.accelerate import prepare

    model = llama()
    accelerator, optimizer = Accelerator(cpu=True), torch.optim.AdamW(model.parameters(), lr=1e-3)
    if recompute is None:
        model, optimizer = accelerator.prepare(model, optimizer)
    else:
        model, optimizer = prepare(
            accelerator, model, optimizer, recompute=recompute, inputs=batch_of(data[:BATCH])
        )  # fmt: skip
    watch = Watch(model)
    for step in range(steps):
        accelerator.backward(model(**batch_of(data[step * BATCH : (step + 1) * BATCH])).loss)
        optimizer.step()
        optimizer.zero_grad()
    return accelerator.unwrap_model(model), watch


def by_lightning(recompute: Any, data: Rows, steps: int) -> tuple[nn.Module, Watch]:
    from lightning.pytorch import LightningModule, Trainer

    from ckpt_kernels.integrations.lightning import CheckpointKernelsCallback

    class Task(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = llama()

        def training_step(self, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
            return self.model(**batch).loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

        def on_fit_start(self) -> None:
            self.watch = Watch(self.model)

    task = Task()
    mine = [] if recompute is None else [CheckpointKernelsCallback(recompute, inputs=batch_of(data[:BATCH]))]
    trainer = Trainer(
        max_steps=steps, accelerator="cpu", callbacks=mine, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(task, torch.utils.data.DataLoader(data, BATCH))
    return task.model, task.watch


Trained = Callable[[Any, Rows, int], tuple[nn.Module, Watch]]
# The trainers, with the packages that each needs.
TRAINERS: dict[str, tuple[Trained, tuple[str, ...]]] = {
    "transformers.Trainer": (by_transformers, ("transformers", "accelerate")),
    "trl.SFTTrainer, LoRA": (by_trl, ("trl", "peft", "datasets")),
    "accelerate": (by_accelerate, ("transformers", "accelerate")),
    "lightning.Trainer": (by_lightning, ("transformers", "lightning")),
}


def measured(train: Trained, recompute: Any, data: Rows, steps: int) -> dict[str, Any]:
    model, watch = train(recompute, data, steps)
    model = copy.deepcopy(model.train())
    for module in model.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    batch = batch_of(data[:BATCH]) | {"use_cache": False}

    def step() -> None:
        model(**batch).loss.backward()

    kept = saved_bytes(model, **batch)
    step()
    return {"losses": watch.losses, "kept": kept, "peak": peak_bytes(step), "seconds": watch.seconds()}


def table(found: dict[str, dict[str, dict[str, Any]]]) -> str:
    lines = [
        "| trainer | way | last loss | losses differ at most by | keeps, MiB | peak of a step, MiB | step, ms |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, ways in found.items():
        eager = ways["eager"]
        for way, run in ways.items():
            apart = max(abs(a - b) / abs(a) for a, b in zip(eager["losses"], run["losses"], strict=True))
            sizes = (f"{run[key] / 2**20:.2f} ({run[key] / eager[key]:.2f})" for key in ("kept", "peak"))
            time_ = f"{run['seconds'] * 1e3:.0f} ({run['seconds'] / eager['seconds']:.2f})"
            lines.append(f"| {name} | {way} | {run['losses'][-1]:.4f} | {apart:.1e} | {' | '.join(sizes)} | {time_} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=steps_to_time, default=50)
    parser.add_argument("--trainers", nargs="+", choices=TRAINERS, default=list(TRAINERS))
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out") / "trainers")
    options = parser.parse_args()
    if any(name not in os.environ for name in RAISED_THRESHOLDS):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | RAISED_THRESHOLDS)
    warnings.filterwarnings("ignore")
    data, found = rows(options.steps), {}
    for name in options.trainers:
        train, needs = TRAINERS[name]
        if absent := [package for package in needs if importlib.util.find_spec(package) is None]:
            print(f"{name}: without {', '.join(absent)} it cannot run", flush=True)
            continue
        found[name] = {}
        for way, recompute in WAYS.items():
            found[name][way] = measured(train, recompute, data, options.steps)
            print(f"{name}, {way}: last loss {found[name][way]['losses'][-1]:.4f}", flush=True)
    print(table(found))
    options.out.mkdir(parents=True, exist_ok=True)
    result = {"torch": torch.__version__, "threads": torch.get_num_threads(), "steps": options.steps, "runs": found}
    (options.out / "trainers.json").write_text(json.dumps(result))
    (options.out / "trainers.md").write_text(table(found) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
