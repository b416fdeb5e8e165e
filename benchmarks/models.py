"""`python -m benchmarks.models`: kept bytes, peak and time of a step of whole models at each level, and the largest
batch that fits into the memory of eager torch's step."""

import pathlib
import statistics
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from rich.table import Table
from torch import nn

import ckpt_kernels
from ckpt_kernels import palette
from ckpt_kernels.cli_arguments import positive
from ckpt_kernels.levels import OF_MODELS
from ckpt_kernels.memory import peak_bytes, saved_bytes

from . import figures, full_size, larger, report, start
from .architectures import Built, outputs_of
from .measure import now


class Model(NamedTuple):
    """A function that builds a model with inputs of a batch, and the batch of the timed steps."""

    build: Callable[..., Built]
    batch: int


ON_CPU = {
    "Llama, bfloat16": Model(larger.llama_bfloat16, 8),
    "ViT": Model(larger.vit, 8),
    "ResNet": Model(larger.resnet, 8),
    "UNet": Model(larger.unet, 8),
}
ON_GPU = {
    "Llama, 8 layers": Model(full_size.llama, 8),
    "ViT-L/16": Model(full_size.vit, 64),
    "ResNet-50": Model(full_size.resnet, 128),
    "UNet": Model(full_size.unet, 8),
}
# Peaks of equal computations may differ by the statistics of a norm.
SLACK = 1.01


@dataclass
class Run:
    """A model, computed in one way."""

    provider: str
    model: nn.Module
    call: Callable[..., Any]
    inputs: dict[str, Any]
    peaks: dict[int, int] = field(default_factory=dict)

    def step(self, inputs: dict[str, Any] | None = None) -> None:
        """Runs forward and backward, and discards the gradients."""
        outputs = outputs_of(self.call, self.inputs if inputs is None else inputs)
        torch.autograd.backward([y.float().square().mean() for y in outputs])
        self.model.zero_grad()

    def peak(self, batch: int, device: str) -> int:
        """The bytes that a step of this batch needs beside the model and the inputs."""
        if batch not in self.peaks:
            inputs = {key: _repeated(value, batch) for key, value in self.inputs.items()}
            self.peaks[batch] = peak_bytes(lambda: self.step(inputs), device)
        return self.peaks[batch]


def _repeated(value: Any, batch: int) -> Any:
    """The samples of an input, in turn, until there are as many as the batch has. Other arguments stay."""
    if not isinstance(value, torch.Tensor):
        return value
    picked = value[torch.arange(batch, device=value.device) % len(value)]
    is_channels_last = value.dim() == 4 and value.is_contiguous(memory_format=torch.channels_last)
    return picked.to(memory_format=torch.channels_last) if is_channels_last else picked


def runs(sized: Model, device: str, compiled: bool) -> Iterator[Run]:
    """Eager, ours at each level, the model's own checkpointing if available, and torch.compile."""

    def build(batch: int) -> Built:
        torch.manual_seed(0)
        with torch.device(device):
            return sized.build(batch=batch)

    def run(provider: str, change: Callable[[nn.Module], Any]) -> Run:
        model, inputs = build(sized.batch)
        call = change(model.train())
        return Run(provider, model, call if callable(call) else model, inputs)

    yield run("eager", lambda model: None)
    for level in OF_MODELS:
        yield run(f"ours, {level}", lambda model, level=level: (ckpt_kernels.convert(model, recompute=level), None)[1])
    probe = build(1)[0]
    # transformers and diffusers name the switch differently.
    for supports, enable in (
        ("supports_gradient_checkpointing", "gradient_checkpointing_enable"),
        ("_supports_gradient_checkpointing", "enable_gradient_checkpointing"),
    ):
        if getattr(probe, supports, False) and hasattr(probe, enable):
            yield run("checkpoint", lambda model, enable=enable: getattr(model, enable)())
    if compiled:
        yield run("torch.compile", lambda model: torch.compile(model, dynamic=False))


def largest_batch(run: Run, batch: int, budget: int, device: str) -> int:
    """The largest batch whose step needs at most `budget` bytes, found by running steps, first of `batch`."""
    low, high = 0, None
    while high is None or high - low > 1:
        needed = run.peak(batch, device)
        low, high = (batch, high) if needed <= budget else (low, batch)
        # The need of a step is nearly linear in the batch: the next guess is the batch that would meet the budget.
        guess = int(batch * budget / needed)
        batch = min(max(guess, low + 1), high - 1 if high else 8 * batch)
    return low


def measure(sized: Model, device: str, rounds: int, compiled: bool) -> list[dict[str, Any]]:
    """The kept bytes, the peak and the median time (taken in turn) of each way of computing."""
    everyone = list(runs(sized, device, compiled))
    seconds: dict[str, list[float]] = {run.provider: [] for run in everyone}
    for round in range(rounds + 2):
        for run in everyone[round % len(everyone) :] + everyone[: round % len(everyone)]:
            start = now(device)
            run.step()
            if round >= 2:
                seconds[run.provider].append(now(device) - start)
    budget = int(SLACK * everyone[0].peak(sized.batch, device))
    found = []
    for run in everyone:
        # torch would compile the model again for every batch.
        is_searched = run.provider != "torch.compile"
        found.append(
            {
                "provider": run.provider,
                "step_ms": statistics.median(seconds[run.provider]) * 1e3,
                "times_eager": statistics.median(seconds[run.provider]) / statistics.median(seconds["eager"]),
                "spread": report.spread(seconds[run.provider]),
                "saved_bytes": saved_bytes(outputs_of, run.call, run.inputs, parameters_of=run.model),
                "peak_bytes": run.peak(sized.batch, device),
                "budget_bytes": budget,
                "batch": sized.batch,
                "largest_batch": largest_batch(run, sized.batch, budget, device) if is_searched else None,
            }
        )
    return found


COLUMNS = ["model", "batch", "provider", "step ms", "x eager", "kept MiB", "x eager's", "peak MiB", "largest batch"]


def row(result: dict[str, Any], eager: dict[str, Any]) -> list[str]:
    """One provider's figures, formatted for a table."""
    return [
        result["model"],
        str(result["batch"]),
        result["provider"],
        f"{result['step_ms']:.0f}",
        f"{result['times_eager']:.2f}",
        f"{result['saved_bytes'] / 2**20:.1f}",
        f"{result['saved_bytes'] / eager['saved_bytes']:.2f}",
        f"{result['peak_bytes'] / 2**20:.1f}",
        "-" if result["largest_batch"] is None else str(result["largest_batch"]),
    ]


def draw(results: list[dict[str, Any]], path: pathlib.Path, about: dict[str, Any]) -> None:
    """Draws a panel for each model: the time of a step against the kept bytes, each point with the largest batch."""
    names = list(dict.fromkeys(result["model"] for result in results))
    figure, axes = figures.panels(len(names), 2, 6.5, 4.4)
    for axis, name in zip(axes, names, strict=True):
        own = [result for result in results if result["model"] == name]
        levels = [result for result in own if result["provider"] == "eager" or result["provider"].startswith("ours")]
        axis.plot(
            [result["saved_bytes"] / 2**20 for result in levels],
            [result["times_eager"] for result in levels],
            color="gray",
            linewidth=1,
            zorder=1,
        )
        for result in own:
            x, y = result["saved_bytes"] / 2**20, result["times_eager"]
            axis.scatter(x, y, s=90, color=palette.color_of(result["provider"]), label=result["provider"], zorder=2)
        axis.set_title(_finding(own), fontsize=11)
        axis.set(xlabel="kept for backward, MiB", ylabel="time of a step, x eager")
        axis.set_xlim(left=0)
        axis.margins(x=0.15, y=0.25)
        axis.grid(alpha=0.3)
    figures.legend(figure, axes, 6 if len(names) > 1 else 3, "down and left is better")
    for axis, name in zip(axes, names, strict=True):
        own = [result for result in results if result["model"] == name and result["largest_batch"]]
        points = [(result["saved_bytes"] / 2**20, result["times_eager"]) for result in own]
        figures.names(axis, [(f"batch {r['largest_batch']}", xy, "black") for r, xy in zip(own, points, strict=True)])
    figures.save(figure, path, about)


def _finding(results: list[dict[str, Any]]) -> str:
    """A sentence on the effect of the level "output" on a model."""
    found = {result["provider"]: result for result in results}
    ours, eager = found["ours, output"], found["eager"]
    part = ours["saved_bytes"] / eager["saved_bytes"]
    title = f"{ours['model']}: {part:.0%} of eager's memory, {ours['times_eager']:.2f} of its time ('output')"
    if not ours["largest_batch"]:
        return title
    return f"{title};\nbatches of {ours['largest_batch']} in the memory of eager's {eager['largest_batch']}"


def main() -> int:
    parser = start.parser("benchmarks.models", __doc__)
    parser.add_argument("--rounds", type=positive, default=3, help="counted steps of each provider")
    parser.add_argument("--case", default="", help="only models whose name contains this")
    parser.add_argument("--compile", action="store_true", help="torch.compile too, which takes minutes a model")
    options = parser.parse_args()
    models = ON_GPU if torch.cuda.is_available() else ON_CPU
    names = start.named(parser, options.case, list(models))
    device, about, console = start.start("benchmarks.models", options)
    warnings.filterwarnings("ignore", module=r"diffusers\.|transformers\.")
    chosen = {name: models[name] for name in names}
    results: list[dict[str, Any]] = []
    rows = []
    with start.progress(console) as progress:
        task = progress.add_task("measuring", total=len(chosen))
        for name, sized in chosen.items():
            progress.update(task, description=f"{name:<30}")
            torch._dynamo.reset()
            found = [{"model": name} | result for result in measure(sized, device, options.rounds, options.compile)]
            rows += [row(result, found[0]) for result in found]
            results += found
            progress.advance(task)
    table = Table(*COLUMNS, title="A step, forward and backward", title_justify="left")
    for cells in rows:
        if cells[2] == "eager":
            table.add_section()
        table.add_row(*cells, style="bold" if cells[2].startswith("ours") else "")
    console.print(table)
    for line in report.noise([result["spread"] for result in results]):
        console.print(line, style="bold red")
    report.write_table(options.out, "models", about, results, COLUMNS, rows)
    draw(results, options.out / "models.png", about)
    console.print(f"models.json, models.md and models.png are in {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
