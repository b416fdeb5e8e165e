"""Trains a small Llama with each trainer, unconverted and with the flag: losses, memory, and the time of a step.

    python examples/trainers.py --steps 50

Runs the trainers that are installed: transformers', TRL's with PEFT, accelerate's loop, Lightning's, axolotl's and
torchtitan's. The text is the sources of Python's standard library, as bytes. Figures of other trainers in the folder
`--out` stay, so that frameworks that need different versions of a package can be run one after the other.
"""

import argparse
import copy
import dataclasses
import importlib.metadata
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

import axolotl_on_cpu
import torch
import torchtitan_on_cpu
from side_by_side import RAISED_THRESHOLDS
from torch import nn
from train_lm import corpus

import ckpt_kernels
from ckpt_kernels.memory import peak_bytes, saved_bytes

LAYERS, WIDTH, BATCH, TOKENS = 3, 128, 4, 128
# The budget of the plan in the file.
OF_FILE = 0.7
# The values of the flag: none, a level, the file of a plan, and a budget of half of eager's peak. The file is made with
# the model of the trainer.
FILE = "plan.json"
BUDGETS = (0.5,)
WAYS = {"eager": None, '"output"': "output", f"plan's file, {OF_FILE}": FILE, "budget 0.5": 0.5}
Rows = list[dict[str, torch.Tensor]]


@dataclasses.dataclass
class Run:
    """A training that ended.

    Attributes:
        losses: the loss of each step.
        starts: the seconds of processor time at which the steps began.
        kept: the bytes that a step keeps for backward.
        peak: the most bytes at one time in a step.
        model: the model.
        inputs: a batch for the model, as positional and named arguments.
    """

    losses: list[float]
    starts: list[float]
    kept: int
    peak: int
    model: nn.Module
    inputs: tuple[tuple, dict[str, Any]]

    def results(self) -> dict[str, Any]:
        seconds = statistics.median(b - a for a, b in zip(self.starts[1:], self.starts[2:], strict=False))
        return {"losses": self.losses, "kept": self.kept, "peak": self.peak, "seconds": seconds}


class Watch:
    """Records the losses of a model of transformers, and the processor times at which the forward passes began."""

    def __init__(self, model: nn.Module) -> None:
        self.losses: list[float] = []
        self.starts: list[float] = []
        self.hooks = [
            model.register_forward_pre_hook(lambda *_: self.starts.append(time.process_time())),
            model.register_forward_hook(lambda module, args, output: self.losses.append(output.loss.item())),
        ]

    def run(self, model: nn.Module, data: Rows, plain: nn.Module | None = None) -> Run:
        """The run, with the memory of a step of the model that was trained. `plain` is a model like it without the
        changes of the trainer; None means the model itself."""
        for hook in self.hooks:
            hook.remove()
        model, batch = copy.deepcopy(model.train()), batch_of(data[:BATCH]) | {"use_cache": False}

        def step() -> None:
            model(**batch).loss.backward()

        kept = saved_bytes(model, **batch)
        step()
        return Run(self.losses, self.starts, kept, peak_bytes(step), plain or model, ((), batch))


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


def by_transformers(recompute: Any, data: Rows, steps: int) -> Run:
    from transformers import Trainer, TrainingArguments

    with tempfile.TemporaryDirectory() as where:
        args = TrainingArguments(**arguments(steps, where))
        trainer = Trainer(llama(), args, train_dataset=data, callbacks=callbacks(recompute, data))
        watch = Watch(trainer.model)
        trainer.train()
    return watch.run(trainer.model, data)


def by_trl(recompute: Any, data: Rows, steps: int) -> Run:
    """Trains adapters on a frozen base with TRL."""
    from datasets import Dataset
    from datasets.table import InMemoryTable
    from peft import LoraConfig, get_peft_model
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
        adapters = LoraConfig(r=8, target_modules="all-linear")
        torch.manual_seed(0)
        trainer = SFTTrainer(
            llama(), args, train_dataset=Dataset(table, fingerprint="rows"), processing_class=tokenizer,
            peft_config=adapters, callbacks=callbacks(recompute, data),
        )  # fmt: skip
        watch = Watch(trainer.model)
        trainer.train()
    return watch.run(trainer.model, data, get_peft_model(llama(), adapters).train())


def by_accelerate(recompute: Any, data: Rows, steps: int) -> Run:
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
    return watch.run(accelerator.unwrap_model(model), data)


def by_lightning(recompute: Any, data: Rows, steps: int) -> Run:
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
    return task.watch.run(task.model, data)


def texts(data: Rows) -> list[str]:
    return ["".join(map(chr, row["input_ids"].tolist())) for row in data]


def by_axolotl(recompute: Any, data: Rows, steps: int) -> Run:
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=WIDTH, intermediate_size=8 * WIDTH // 3, num_hidden_layers=LAYERS, num_attention_heads=4
    )
    sizes = {"sequence_len": TOKENS, "micro_batch_size": BATCH}
    with tempfile.TemporaryDirectory() as where:
        folder = pathlib.Path(where)
        axolotl_on_cpu.save_model(folder, config)
        watched: list[Watch] = []
        with axolotl_on_cpu.trained(
            recompute, folder, texts(data), steps, watch=lambda model: watched.append(Watch(model)), **sizes
        ) as trainer:
            return watched[0].run(trainer.model, data)


def by_torchtitan(recompute: Any, data: Rows, steps: int) -> Run:
    sizes = {"steps": steps, "seq_len": TOKENS, "local_batch_size": BATCH}
    with (
        tempfile.TemporaryDirectory() as where,
        torchtitan_on_cpu.trainer(recompute, texts(data), pathlib.Path(where), layers=LAYERS, **sizes) as (made, found),
    ):
        made.train()
        losses, (args, kwargs) = list(found.losses), found.model_inputs
        kept = saved_bytes(made.model_parts[0], *args, **kwargs)
        peak = peak_bytes(lambda: made.forward_backward_step(**found.step_inputs))
        return Run(losses, found.starts[: len(losses)], kept, peak, torchtitan_on_cpu.plain_model(made), (args, kwargs))


Trained = Callable[[Any, Rows, int], Run]
# The trainers, with the packages that each needs.
TRAINERS: dict[str, tuple[Trained, tuple[str, ...]]] = {
    "transformers.Trainer": (by_transformers, ("transformers", "accelerate")),
    "trl.SFTTrainer, LoRA": (by_trl, ("trl", "peft", "datasets", "transformers")),
    "accelerate": (by_accelerate, ("accelerate", "transformers")),
    "lightning.Trainer": (by_lightning, ("lightning", "transformers")),
    "axolotl": (by_axolotl, ("axolotl", "transformers", "trl")),
    "torchtitan": (by_torchtitan, ("torchtitan",)),
}


def save_plan(train: Trained, data: Rows, path: pathlib.Path) -> None:
    """Saves a plan for the model of a trainer."""
    eager = train(None, data, 2)
    args, kwargs = eager.inputs
    eager.model.zero_grad()
    ckpt_kernels.plan(eager.model, *args, budget=OF_FILE, progress=lambda line: None, **kwargs).save(path)


def measured(train: Trained, data: Rows, steps: int) -> dict[str, Any]:
    """The results of all ways that the trainer takes."""
    found = {}
    with tempfile.TemporaryDirectory() as where:
        file = pathlib.Path(where) / FILE
        for way, recompute in WAYS.items():
            if train is by_torchtitan and recompute in BUDGETS:
                continue
            if recompute == FILE:
                save_plan(train, data, file)
                recompute = str(file)
            found[way] = train(recompute, data, steps).results()
            print(f"{way}: last loss {found[way]['losses'][-1]:.4f}", flush=True)
    return found


def versions(packages: tuple[str, ...]) -> str:
    return ", ".join(f"{package} {importlib.metadata.version(package)}" for package in packages)


def table(found: dict[str, Any]) -> str:
    lines = [
        "| trainer | way | last loss | losses differ at most by | keeps, MiB | peak of a step, MiB | step, ms of CPU |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, ways in found.items():
        eager = ways["runs"]["eager"]
        for way, run in ways["runs"].items():
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
    data, saved = rows(options.steps), options.out / "trainers.json"
    found = json.loads(saved.read_text())["trainers"] if saved.is_file() else {}
    for name in options.trainers:
        train, needs = TRAINERS[name]
        if absent := [package for package in needs if importlib.util.find_spec(package) is None]:
            print(f"{name}: without {', '.join(absent)} it cannot run", flush=True)
            continue
        used = versions(needs)
        print(f"{name} ({used})", flush=True)
        label = f"{name} {importlib.metadata.version('torchtitan')}" if name == "torchtitan" else name
        found[label] = {"packages": used, "steps": options.steps, "runs": measured(train, data, options.steps)}
    print(table(found))
    options.out.mkdir(parents=True, exist_ok=True)
    result = {"torch": torch.__version__, "threads": torch.get_num_threads(), "trainers": found}
    saved.write_text(json.dumps(result))
    saved.with_suffix(".md").write_text(table(found) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
