"""`python -m benchmarks.layers`: the kept memory and the time of whole layers at each recompute level, beside
torch.compile and checkpointing."""

import functools
import pathlib
import statistics
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ckpt_kernels import palette
from ckpt_kernels.cli_arguments import positive
from ckpt_kernels.memory import peak_bytes, saved_bytes
from ckpt_kernels.recompute import selective_contexts

from . import figures, report, start
from .measure import Stopwatch
from .networks import LEVELS, Bottleneck, GPT2Layer, LlamaLayer, UNetBlock, runner


@dataclass(frozen=True)
class Layer:
    """A layer for a level, and the shapes of the inputs. Kept bytes are counted in multiples of `unit`."""

    name: str
    make: Callable[[str], nn.Module]
    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype
    unit: int
    channels_last: bool = False

    def inputs(self, device: str) -> list[Tensor]:
        found = []
        for shape in self.shapes:
            x = torch.randn(shape, device=device).to(self.dtype)
            if self.channels_last and x.dim() == 4:
                x = x.to(memory_format=torch.channels_last)
            found.append(x.requires_grad_())
        return found


def layers(device: str) -> list[Layer]:
    """The layers; on the CPU they are small, so that a run stays short."""
    width, heads, tokens, batch = (4096, 32, 2048, 4) if device == "cuda" else (1024, 16, 512, 1)
    hidden = int(2.69 * width)
    images = 64 if device == "cuda" else 8
    shape, tokens_width = (batch, tokens, width), batch * tokens * width

    def images_of(*image: int) -> tuple[tuple[int, ...], int]:
        return image, torch.Size(image).numel() * convolved.itemsize

    half, full = torch.bfloat16, torch.float32
    convolved = half if device == "cuda" else full
    _, bottleneck = images_of(images, 64, 28, 28)
    wide, unet = images_of(max(images // 8, 1), 320, 32, 32)
    return [
        Layer(
            "Llama layer, bfloat16",
            lambda level: LlamaLayer(width, heads, hidden, tokens, level),
            (shape,),
            half,
            tokens_width * half.itemsize,
        ),
        Layer(
            "GPT-2 layer, float32",
            lambda level: GPT2Layer(width, heads, level),
            (shape,),
            full,
            tokens_width * full.itemsize,
        ),
        Layer(
            "3 ResNet bottlenecks",
            lambda level: nn.Sequential(*(Bottleneck(64, level) for _ in range(3))),
            ((images, 256, 28, 28),),
            convolved,
            bottleneck,
            channels_last=True,
        ),
        Layer(
            "UNet block",
            lambda level: UNetBlock(320, level),
            (wide, (wide[0], 320)),
            convolved,
            unet,
            channels_last=True,
        ),
    ]


def _compiled(module: Callable[..., Tensor], budget: float | None) -> Callable[..., Tensor]:
    """The compiled module with an `activation_memory_budget`, which torch reads at the first call."""

    def forward(*inputs: Tensor) -> Tensor:
        return module(*inputs)

    # torch caches compiled code by code object, and functions of different budgets must not share the cache.
    own = types.FunctionType(forward.__code__.replace(), globals(), "forward", None, forward.__closure__)
    call = torch.compile(own, dynamic=False)

    def with_budget(*inputs: Tensor) -> Tensor:
        with torch._functorch.config.patch(activation_memory_budget=1.0 if budget is None else budget):
            return call(*inputs)

    return with_budget


def providers(layer: Layer, device: str, compiled: bool) -> Iterator[tuple[str, nn.Module, Callable[..., Tensor]]]:
    def make(level: str) -> nn.Module:
        torch.manual_seed(0)
        module = layer.make(level).to(device, layer.dtype)
        return module.to(memory_format=torch.channels_last) if layer.channels_last else module

    for level in LEVELS:
        module = make(level)
        yield "eager" if level == "eager" else f"ours, {level}", module, runner(module, level)
    module = make("eager")
    yield "checkpoint", module, functools.partial(checkpoint, module, use_reentrant=False)
    if compiled:
        module = make("output")
        again = functools.partial(checkpoint, module, use_reentrant=False, context_fn=selective_contexts)
        yield "ours, output, compiled", module, _compiled(again, None)
        for budget in (None, 0.9, 0.5):
            module = make("eager")
            name = "torch.compile" if budget is None else f"torch.compile, budget {budget}"
            yield name, module, _compiled(module, budget)


class Turn:
    """One provider's forward and backward pass."""

    def __init__(self, name: str, module: nn.Module, call: Callable[..., Tensor], inputs: list[Tensor]) -> None:
        self.name, self.module, self.call, self.inputs = name, module, call, inputs
        self.wanted = [*inputs, *module.parameters()]
        self.incoming = torch.randn_like(call(*inputs))
        self.forward: list[float] = []
        self.backward: list[float] = []

    def take(self, device: str, record: bool) -> None:
        # The host's clock, because users see this time.
        watch = Stopwatch(device, host=True)
        output = self.call(*self.inputs)
        watch.mark()
        gradients = torch.autograd.grad(output, self.wanted, self.incoming)
        watch.mark()
        forward, backward = watch.between()
        del gradients
        if record:
            self.forward.append(forward)
            self.backward.append(backward)

    def saved(self) -> int:
        return saved_bytes(self.call, *self.inputs, parameters_of=self.module)


def measure(layer: Layer, device: str, rounds: int, compiled: bool) -> list[dict[str, Any]]:
    """Median times (taken in turn), kept bytes and peak of every provider."""
    inputs = layer.inputs(device)
    turns = [Turn(name, module, call, inputs) for name, module, call in providers(layer, device, compiled)]
    for round in range(rounds + 2):
        for turn in turns[round % len(turns) :] + turns[: round % len(turns)]:
            turn.take(device, record=round >= 2)
    results = []
    for turn in turns:
        saved = turn.saved()
        results.append(
            {
                "layer": layer.name,
                "provider": turn.name,
                "forward_ms": statistics.median(turn.forward),
                "backward_ms": statistics.median(turn.backward),
                "total_ms": statistics.median(f + b for f, b in zip(turn.forward, turn.backward, strict=True)),
                "spread": report.spread([f + b for f, b in zip(turn.forward, turn.backward, strict=True)]),
                "saved_bytes": saved,
                "saved_units": saved / layer.unit,
                "peak_bytes": peak_bytes(lambda turn=turn: turn.take(device, record=False), device),
            }
        )
    eager = results[0]
    for result in results:
        result["times_eager"] = result["total_ms"] / eager["total_ms"]
    return results


COLUMNS = ["layer", "provider", "forward ms", "backward ms", "x eager", "kept, units", "kept MiB", "peak MiB"]


def row(result: dict[str, Any]) -> list[str]:
    """One provider's figures, formatted for a table."""
    return [
        result["layer"],
        result["provider"],
        f"{result['forward_ms']:.1f}",
        f"{result['backward_ms']:.1f}",
        f"{result['times_eager']:.2f}",
        f"{result['saved_units']:.2f}",
        f"{result['saved_bytes'] / 2**20:.1f}",
        f"{result['peak_bytes'] / 2**20:.1f}",
    ]


def draw(results: list[dict[str, Any]], path: pathlib.Path, about: dict[str, Any]) -> None:
    """Draws a panel for each layer: the kept bytes of every provider against the time of a step."""
    names = list(dict.fromkeys(result["layer"] for result in results))
    figure, axes = figures.panels(len(names), 2, 6.5, 4.2)
    for axis, name in zip(axes, names, strict=True):
        own = [result for result in results if result["layer"] == name]
        _draw_layer(axis, own)
        axis.set_title(_finding(own), fontsize=11)
    figures.legend(figure, axes, 4, "down and left is better; points that coincide stand side by side")
    figures.save(figure, path, about)


def _finding(results: list[dict[str, Any]]) -> str:
    """A sentence on the effect of the level "output" on a layer."""
    found = {result["provider"]: result for result in results}
    ours, eager = found["ours, output"], found["eager"]
    part = ours["saved_units"] / eager["saved_units"]
    return f"{ours['layer']}: {part:.0%} of eager's memory, {ours['times_eager']:.2f} of its time ('output')"


def _draw_layer(axis: Any, results: list[dict[str, Any]]) -> list[tuple[float, float]]:
    """Draws the points, and returns where they are shown."""
    points = [(result["saved_units"], result["times_eager"]) for result in results]
    width, height = 0.025 * max(x for x, _ in points), 0.04 * (max(y for _, y in points) - min(y for _, y in points))
    shown = figures.apart(points, width, height)
    for result, (x, y) in zip(results, shown, strict=True):
        ours = result["provider"].startswith("ours")
        axis.scatter(
            x,
            y,
            s=110 if ours else 70,
            marker="o" if ours else "s",
            color=palette.color_of(result["provider"]),
            label=result["provider"],
            alpha=0.85,
            zorder=2,
        )
    axis.axhline(1, color="black", linewidth=0.8, linestyle=":", zorder=1)
    axis.set(xlabel="kept for backward, in tensors of the layer's width", ylabel="time of a step, x eager")
    axis.set_xlim(left=0)
    axis.margins(x=0.1, y=0.15)
    axis.grid(alpha=0.3)
    return shown


def draw_overview(results: list[dict[str, Any]], path: pathlib.Path, about: dict[str, Any]) -> None:
    """Draws only the first layer, with the names of the points."""
    own = [result for result in results if result["layer"] == results[0]["layer"]]
    figure, (axis,) = figures.panels(1, 1, 10, 4.4)
    shown = _draw_layer(axis, own)
    providers = [result["provider"] for result in own]
    figures.names(axis, [(p, xy, palette.color_of(p)) for p, xy in zip(providers, shown, strict=True)])
    axis.set_title(_finding(own), fontsize=11)
    figures.save(figure, path, about)


def main() -> int:
    parser = start.parser("benchmarks.layers", __doc__)
    parser.add_argument("--rounds", type=positive, default=5, help="counted turns of each provider")
    parser.add_argument("--case", default="", help="only layers whose name contains this")
    parser.add_argument("--full", action="store_true", help="torch.compile for the convolutional layers too")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    options = parser.parse_args()
    every = layers("cuda" if torch.cuda.is_available() else "cpu")
    names = start.named(parser, options.case, [layer.name for layer in every])
    device, about, console = start.start("benchmarks.layers", options)
    results: list[dict[str, Any]] = []
    table = Table(*COLUMNS, title="Layers: forward and backward", title_justify="left")
    with start.progress(console) as progress:
        chosen = [layer for layer in every if layer.name in names]
        task = progress.add_task("measuring", total=len(chosen))
        for layer in chosen:
            progress.update(task, description=f"{layer.name:<30}")
            torch._dynamo.reset()
            # Compiling convolutional layers takes longer than measuring all others.
            compiled = not options.no_compile and (options.full or not layer.channels_last)
            found = measure(layer, device, options.rounds, compiled)
            for result in found:
                table.add_row(*row(result), style="bold" if result["provider"].startswith("ours") else "")
            table.add_section()
            results += found
            progress.advance(task)
    console.print(table)
    rows = [row(result) for result in results]
    for line in report.noise([result["spread"] for result in results]):
        console.print(line, style="bold red")
    report.write_table(options.out, "layers", about, results, COLUMNS, rows)
    draw(results, options.out / "layers.png", about)
    draw_overview(results, options.out / "overview.png", about)
    console.print(f"layers.json, layers.md and layers.png are in {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
