"""Trains a small pre-norm transformer language model on real text, with eager torch's layers and with ours.

The text is the source code of Python's standard library, as bytes. Both runs start from the same weights and see
the same batches, so their loss curves lie on each other; what differs is the memory kept for backward and the
time of a step.
"""

import argparse
import json
import os
import pathlib
import statistics
import sys
import sysconfig
import time
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn

import ckpt_kernels
from ckpt_kernels.memory import saved_bytes

# The C library keeps freed blocks instead of giving them back to the system, for both runs alike.
RAISED_THRESHOLDS = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**33)}


@dataclass(frozen=True)
class Sizes:
    width: int
    layers: int
    heads: int
    context: int
    batch: int


CPU_SIZES = Sizes(width=128, layers=3, heads=4, context=128, batch=8)
GPU_SIZES = Sizes(width=768, layers=8, heads=12, context=512, batch=16)


class EagerAddNorm(nn.LayerNorm):
    """residual + input and its norm, as two steps of eager torch."""

    def forward(self, input: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        total = residual + input
        return super().forward(total), total


class EagerNormAct(nn.LayerNorm):
    """The norm and its activation, as two steps of eager torch."""

    def forward(self, input: Tensor) -> Tensor:
        return F.gelu(super().forward(input), approximate="tanh")


class Attention(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.heads = sizes.heads
        self.qkv = nn.Linear(sizes.width, 3 * sizes.width)
        self.out = nn.Linear(sizes.width, sizes.width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """Pre-norm attention, and a pre-norm MLP whose hidden layer is normalised before its activation."""

    def __init__(self, sizes: Sizes, ours: bool) -> None:
        super().__init__()
        add_norm = ckpt_kernels.nn.AddLayerNorm if ours else EagerAddNorm
        self.norm1 = add_norm(sizes.width)
        self.attention = Attention(sizes)
        self.norm2 = add_norm(sizes.width)
        self.up = nn.Linear(sizes.width, 4 * sizes.width)
        self.hidden = (
            ckpt_kernels.nn.LayerNorm(4 * sizes.width, activation="gelu_tanh")
            if ours
            else EagerNormAct(4 * sizes.width)
        )
        self.down = nn.Linear(4 * sizes.width, sizes.width)

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        y, residual = self.norm1(x, residual)
        y, residual = self.norm2(self.attention(y), residual)
        return self.down(self.hidden(self.up(y))), residual


class LanguageModel(nn.Module):
    """Bytes in, the loss of predicting the next byte out."""

    def __init__(self, sizes: Sizes, ours: bool) -> None:
        super().__init__()
        self.token = nn.Embedding(256, sizes.width)
        self.position = nn.Embedding(sizes.context, sizes.width)
        self.layers = nn.ModuleList(Layer(sizes, ours) for _ in range(sizes.layers))
        self.norm = (ckpt_kernels.nn.AddLayerNorm if ours else EagerAddNorm)(sizes.width)
        self.head = nn.Linear(sizes.width, 256)

    def forward(self, tokens: Tensor) -> Tensor:
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        x = self.token(inputs)
        residual = self.position.weight.expand_as(x)
        for layer in self.layers:
            x, residual = layer(x, residual)
        logits = self.head(self.norm(x, residual)[0])
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def corpus() -> Tensor:
    """The standard library's own sources, end to end."""
    files = sorted(pathlib.Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return torch.frombuffer(bytearray(b"\n".join(path.read_bytes() for path in files)), dtype=torch.uint8)


class Run:
    """One model, its optimiser, and what it measured."""

    def __init__(self, name: str, sizes: Sizes, ours: bool, device: str) -> None:
        torch.manual_seed(0)
        self.name, self.device = name, device
        self.model = LanguageModel(sizes, ours).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.saved = 0

    def step(self, batch: Tensor) -> None:
        if not self.losses:
            self.saved = saved_bytes(self.model, batch)
        start = time.perf_counter()
        loss = self.model(batch)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.losses.append(loss.item())
        self.seconds.append(time.perf_counter() - start)


def draw(runs: list[Run], path: pathlib.Path) -> None:
    """Loss curves laid over each other, and what each run kept and took."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (curves, memory, times) = plt.subplots(1, 3, figsize=(13, 4), width_ratios=(3, 1, 1), layout="constrained")
    for run, style in zip(runs, ({"linewidth": 4, "alpha": 0.45}, {"linewidth": 1.2}), strict=True):
        curves.plot(run.losses, label=run.name, **style)
    curves.set(xlabel="step", ylabel="loss, nats a byte", title="Training loss")
    curves.grid(alpha=0.3)
    curves.legend()
    names = [run.name for run in runs]
    colors = ["tab:blue", "tab:orange"]
    bars = memory.bar(names, [run.saved / 2**20 for run in runs], color=colors)
    memory.bar_label(bars, fmt="%.1f")
    memory.set(title="Kept for backward, MiB")
    bars = times.bar(names, [statistics.median(run.seconds) * 1e3 for run in runs], color=colors)
    times.bar_label(bars, fmt="%.1f")
    times.set(title="Step, ms (median)")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/train_lm"))
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and any(name not in os.environ for name in RAISED_THRESHOLDS):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | RAISED_THRESHOLDS)
    sizes = GPU_SIZES if device == "cuda" else CPU_SIZES
    text = corpus()
    generator = torch.Generator().manual_seed(1)
    runs = [Run("eager", sizes, False, device), Run("ckpt_kernels", sizes, True, device)]
    runs[1].model.load_state_dict(runs[0].model.state_dict())

    console = Console()
    console.print(f"{len(text) / 2**20:.1f} MiB of text; {asdict(sizes)}; {device}")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("training", total=options.steps)
        for step in range(options.steps):
            starts = torch.randint(len(text) - sizes.context - 1, (sizes.batch, 1), generator=generator)
            batch = text[starts + torch.arange(sizes.context + 1)].long().to(device)
            # In turn, and each first every other time.
            for run in runs if step % 2 else reversed(runs):
                run.step(batch)
            progress.update(task, advance=1, description=f"loss {runs[0].losses[-1]:.4f} / {runs[1].losses[-1]:.4f}")

    eager, ours = runs
    apart = max(abs(a - b) / a for a, b in zip(eager.losses[:20], ours.losses[:20], strict=True))
    table = Table("", "eager", "ckpt_kernels", "ratio", title="Training on real text", title_justify="left")
    for name, values in (
        ("final loss (mean of last 10)", [statistics.mean(run.losses[-10:]) for run in runs]),
        ("kept for backward, MiB", [run.saved / 2**20 for run in runs]),
        ("step, ms (median)", [statistics.median(run.seconds) * 1e3 for run in runs]),
    ):
        table.add_row(name, *(f"{value:.4f}" for value in values), f"{values[1] / values[0]:.4f}")
    console.print(table)
    console.print(f"greatest relative difference of the losses over the first 20 steps: {apart:.1e}")
    options.out.mkdir(parents=True, exist_ok=True)
    results = {
        "device": device,
        "sizes": asdict(sizes),
        "torch": torch.__version__,
        "runs": {run.name: {"losses": run.losses, "saved_bytes": run.saved, "seconds": run.seconds} for run in runs},
    }
    (options.out / "train_lm.json").write_text(json.dumps(results))
    draw(runs, options.out / "train_lm.png")
    console.print(f"train_lm.json and train_lm.png are in {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
