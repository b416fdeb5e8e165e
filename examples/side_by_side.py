"""The shared code of the examples: trains one model several times at once, with eager torch's layers, and with ours at
recompute levels, planned for a budget, or checkpointed.

All models start from the same weights and see the same batches, so their loss curves coincide. They differ in the
memory kept for backward, the peak, and the time of a step.
"""

import argparse
import json
import os
import pathlib
import platform
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn

from ckpt_kernels.integrations.common import converted
from ckpt_kernels.memory import peak_bytes, saved_bytes
from ckpt_kernels.palette import color_of
from ckpt_kernels.recompute import discard_outputs

# For all runs alike, the C library keeps freed blocks instead of returning them to the system.
RAISED_THRESHOLDS = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**33)}
LEVELS = ("block", "output", "all")
CHECKPOINT = "checkpoint"
# torch's profiler, which measures the peak, logs each start and stop.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
# A function of a model and a batch that returns the loss.
Batch = tuple[Tensor, ...]


class Run:
    """A model, the optimiser, and the measurements."""

    def __init__(self, level: str, model: nn.Module, learning_rate: float) -> None:
        ours = f"ours, {level}" if level in (*LEVELS, "layer") else f"planned, {level}"
        self.name = {"eager": "eager", CHECKPOINT: "checkpointed"}.get(level, ours)
        self.model = model
        self.forward = discard_outputs()(model.forward) if level in ("output", "all") else model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.saved = self.peak = 0

    def step(self, batch: Batch) -> None:
        start = time.perf_counter()
        loss = self.forward(*batch)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.losses.append(loss.item())
        self.seconds.append(time.perf_counter() - start)

    def measure_memory(self, batch: Batch, beside_gradients: bool) -> None:
        """Measures the kept bytes of a pass, and the peak of a forward and backward pass beside the model; if
        `beside_gradients`, gradients are allocated before and do not count."""
        self.model.zero_grad(set_to_none=not beside_gradients)
        self.saved = saved_bytes(self.forward, *batch, parameters_of=self.model)
        self.peak = peak_bytes(lambda: self.forward(*batch).backward(), batch[0].device)
        self.model.zero_grad(set_to_none=True)


def arrange(model: nn.Module, way: str, inputs: Any) -> None:
    """Leaves a model of transformers or diffusers unchanged, checkpoints or converts the model.

    Checkpointing uses the model's own switch. Converting uses our flag: a level, or a budget in bytes, such as 64MiB,
    or as a fraction of eager's peak, such as 0.5.
    """
    if way == CHECKPOINT:
        switches = ("activation_checkpointing_enable", "gradient_checkpointing_enable", "enable_gradient_checkpointing")
        next(getattr(model, name) for name in switches if hasattr(model, name))()
    elif way != "eager":
        converted(model, float(way) if way.replace(".", "").isdigit() else way, inputs=inputs)


def apart(runs: dict[str, Any]) -> float:
    """The greatest relative difference from eager's loss in the first 20 steps."""
    eager, *others = (run["losses"][:20] for run in runs.values())
    return max(abs(a - b) / abs(a) for other in others for a, b in zip(eager, other, strict=True))


def draw(results: dict[str, Any], path: pathlib.Path) -> None:
    """Draws the loss curves over each other, and the kept bytes and the time of each run, from the results in JSON."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    runs = results["runs"]
    figure, (curves, kept, peak, times) = plt.subplots(
        1, 4, figsize=(15, 4.2), width_ratios=(3, 1.2, 1.2, 1.2), layout="constrained"
    )
    for name, run in runs.items():
        # Eager's curve is wide and pale, below the others.
        below = {"linewidth": 5, "alpha": 0.35} if name == "eager" else {"linewidth": 1.2}
        curves.plot(run["losses"], label=name, color=color_of(name), **below)
    curves.set(xlabel="step", ylabel="loss", title=f"Training loss: {apart(runs):.0e} apart in the first 20 steps")
    curves.grid(alpha=0.3)
    curves.legend()
    colors = [color_of(name) for name in runs]
    for axis, title, values in (
        (kept, "Kept for backward, MiB", [run["saved_bytes"] / 2**20 for run in runs.values()]),
        (peak, "Peak of a step, MiB", [run["peak_bytes"] / 2**20 for run in runs.values()]),
        (times, "Step, ms (median)", [statistics.median(run["seconds"]) * 1e3 for run in runs.values()]),
    ):
        axis.bar_label(axis.bar(list(runs), values, color=colors), fmt="%.1f", fontsize=8)
        axis.margins(y=0.08)
        # The table has ratios of times: medians of the ratios of single steps.
        found = "" if axis is times else f":\n{values[-1] / values[0]:.0%} of eager's, {list(runs)[-1]}"
        axis.set_title(title + found, fontsize=10)
        axis.tick_params("x", rotation=30, labelsize=8)
    machine = results.get("machine", results["device"])
    figure.supxlabel(f"{machine}, torch {results['torch']}", fontsize=8, color="gray")
    figure.savefig(path, dpi=110)
    plt.close(figure)


class Picture:
    """A picture in a file. A notebook shows the picture if it is the last value of a cell."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path

    def _repr_png_(self) -> bytes:
        return self.path.read_bytes()


def compare(
    name: str,
    make: Callable[[str], nn.Module],
    draw_batch: Callable[[torch.Generator], Batch],
    device: str,
    steps: int,
    learning_rate: float = 1e-3,
    ways: tuple[str, ...] = (),
    beside_gradients: bool = True,
    out: pathlib.Path | None = None,
) -> Picture:
    """Trains the models that `make(way)` returns, for "eager" and each of the ways, on the same batches.

    The models return the loss. Prints the kept bytes and the time of each, and writes the results and a picture to
    `out`, by default out/NAME.
    """
    runs = []
    for way in ("eager", *ways):
        torch.manual_seed(0)
        runs.append(Run(way, make(way).to(device), learning_rate))
        runs[-1].model.load_state_dict(runs[0].model.state_dict())

    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    generator = torch.Generator().manual_seed(1)
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("training", total=steps)
        for step in range(steps):
            batch = tuple(tensor.to(device) for tensor in draw_batch(generator))
            # In turn, and each model is first in some steps.
            for run in runs[step % len(runs) :] + runs[: step % len(runs)]:
                run.step(batch)
            progress.update(task, advance=1, description=f"loss {' / '.join(f'{r.losses[-1]:.4f}' for r in runs)}")
    for run in runs:
        run.measure_memory(batch, beside_gradients)
    console.print(table_of(runs))
    results = {
        "device": device,
        "machine": torch.cuda.get_device_name() if device == "cuda" else platform.processor() or device,
        "torch": torch.__version__,
        "runs": {
            run.name: {
                "losses": run.losses,
                "saved_bytes": run.saved,
                "peak_bytes": run.peak,
                "seconds": run.seconds,
            }
            for run in runs
        },
    }
    out = out or pathlib.Path("out") / name
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps(results))
    difference = apart(results["runs"])
    console.print(f"greatest relative difference of the losses over the first 20 steps: {difference:.1e}")
    draw(results, out / f"{name}.png")
    console.print(f"{name}.json and {name}.png are in {out}")
    return Picture(out / f"{name}.png")


def table_of(runs: list[Run]) -> Table:
    """The table of kept bytes, peaks and times of the runs."""
    table = Table("", *(run.name for run in runs), title="Training", title_justify="left")
    for title, values in (
        ("final loss (mean of last 10)", [f"{statistics.mean(run.losses[-10:]):.4f}" for run in runs]),
        ("kept for backward, MiB", [f"{run.saved / 2**20:.2f}" for run in runs]),
        ("peak of a step, MiB", [f"{run.peak / 2**20:.2f}" for run in runs]),
        ("step, ms (median)", [f"{statistics.median(run.seconds) * 1e3:.2f}" for run in runs]),
        ("step, x eager", [f"{statistics.median(a / b for a, b in zip(run.seconds, runs[0].seconds, strict=True)):.3f}"
                           for run in runs]),
    ):  # fmt: skip
        table.add_row(title, *values)
    return table


def main(
    description: str,
    make: Callable[[str], nn.Module],
    draw_batch: Callable[[torch.Generator], Batch],
    device: str,
    steps: int,
    learning_rate: float = 1e-3,
    ways: tuple[str, ...] = (),
) -> int:
    """Runs `compare` from the command line of an example, for the requested levels.

    An example with other ways than levels, as `arrange` takes them, passes the default ways. The peaks of such an
    example exclude gradients, as budgets do.
    """
    name = pathlib.Path(sys.argv[0]).stem
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--steps", type=int, default=steps)
    if ways:
        text = "levels, budgets (64MiB, or 0.5 of eager's peak), or checkpoint"
        parser.add_argument("--recompute", nargs="+", default=ways, help=text)
    else:
        parser.add_argument("--recompute", nargs="+", choices=LEVELS, default=["output", "all"], help="levels to run")
    parser.add_argument("--out", type=pathlib.Path)
    options = parser.parse_args()
    if device == "cpu" and any(name not in os.environ for name in RAISED_THRESHOLDS):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | RAISED_THRESHOLDS)
    Console().print(description)
    asked = tuple(options.recompute)
    compare(name, make, draw_batch, device, options.steps, learning_rate, asked, bool(ways), options.out)
    return 0
