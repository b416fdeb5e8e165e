"""Draws a Llama layer and the tensors kept for backward at each level: docs/llama_layer.png.

    python -m benchmarks.llama_layer

The numbers in the drawing are first checked against `memory.saved_bytes`.
"""

import functools
import pathlib
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from ckpt_kernels import palette
from ckpt_kernels.memory import saved_bytes

from . import figures
from .networks import LEVELS, LlamaLayer, runner

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PATH = pathlib.Path(__file__).parent.parent / "docs" / "llama_layer.png"
F = 2.69
# How the backward pass gets a tensor that is not kept.
KERNEL, PRODUCT = "recomputed in the block's kernel", "recomputed by the matrix product"


class Row(NamedTuple):
    """A tensor, and for each level the size in T*h elements of bfloat16 if kept, else how the tensor is recomputed."""

    name: str
    kept: tuple[float | str, ...]


class Step(NamedTuple):
    """A computation of the layer between two tensors."""

    name: str
    is_block: bool


LAYER: tuple[Row | Step, ...] = (
    Row("x, the layer's input", (2, 1, 1, 1, 1)),
    Step("RMSNorm", True),
    Row("x normalised", (2, KERNEL, KERNEL, KERNEL, KERNEL)),
    Row("output of the norm", (1, 1, KERNEL, KERNEL, KERNEL)),
    Step("q, k, v: Linear; rotation", False),
    Row("q, k, v, as attention reads them", (3, 3, 3, 3, PRODUCT)),
    Step("attention", False),
    Row("output of attention", (1, 1, 1, 1, 1)),
    Step("Linear", False),
    Step("add, RMSNorm", True),
    Row("sum, which is the residual", (2, 1, 1, 1, PRODUCT)),
    Row("sum normalised", (2, KERNEL, KERNEL, KERNEL, KERNEL)),
    Row("output of the norm", (1, 1, KERNEL, KERNEL, KERNEL)),
    Step("gate, up: Linear", False),
    Row("gate", (F, F, F, PRODUCT, PRODUCT)),
    Row("up", (F, F, F, PRODUCT, PRODUCT)),
    Step("silu(gate) * up", True),
    Row("silu(gate)", (F, KERNEL, KERNEL, KERNEL, KERNEL)),
    Row("silu(gate) * up", (F, F, KERNEL, KERNEL, KERNEL)),
    Step("down: Linear; add", False),
)


def totals() -> dict[str, float]:
    """The kept sizes in the drawing, by level, in T*h."""
    rows = [row for row in LAYER if isinstance(row, Row)]
    return {
        level: sum(k for k in (row.kept[i] for row in rows) if not isinstance(k, str)) for i, level in enumerate(LEVELS)
    }


def measured(width: int = 256, tokens: int = 128) -> dict[str, float]:
    """The measured kept sizes of such a layer, by level, in T*h, including statistics."""
    x = torch.randn(1, tokens, width, dtype=torch.bfloat16, requires_grad=True)
    found = {}
    for level in LEVELS:
        layer = LlamaLayer(width, 4, int(F * width), tokens, level).to(torch.bfloat16)
        owner = nn.Module()
        owner.layer = layer  # so that its parameters and buffers do not count
        owner.forward = functools.partial(runner(layer, level))
        found[level] = saved_bytes(owner, x) / x.nbytes
    return found


def draw(path: pathlib.Path = PATH) -> None:
    """Draws a column of boxes for the layer, and a column of bars for each level."""
    figure, (axis,) = figures.panels(1, 1, 14.4, 8.6)
    axis.set(xlim=(0, 31.1), ylim=(len(LAYER) + 2.4, -2.2))
    axis.axis("off")
    colors = [palette.COLORS[name] for name in ("eager", "ours, block", "ours, output", "ours, all", "ours, layer")]
    starts = [11.2 + 4.1 * index for index in range(len(LEVELS))]
    axis.plot([2.6, 2.6], [-0.4, len(LAYER) - 0.2], color="gray", linewidth=1.5, zorder=0)
    for place, item in enumerate(LAYER):
        if isinstance(item, Step):
            _box(axis, item, place)
            continue
        axis.plot([2.6], [place], "o", color="gray", markersize=5)
        axis.text(5.6, place, item.name, va="center", fontsize=10)
        for start, color, kept in zip(starts, colors, item.kept, strict=True):
            _bar(axis, start, place, color, kept, max(k for k in item.kept if not isinstance(k, str)))
    sums = totals()
    heads = ("eager torch", '"block"', '"output"', '"all"', '"layer"')
    for start, color, head, level in zip(starts, colors, heads, LEVELS, strict=True):
        axis.barh(-0.75, 3, 0.12, start, color=color)
        axis.text(start, -1.1, head, fontsize=12, fontweight="bold")
        share = "" if level == "eager" else f"   {sums[level] / sums['eager']:.0%}"
        axis.text(start, len(LAYER) + 0.6, f"{sums[level]:.1f}{share}", fontsize=13, fontweight="bold")
    axis.plot([5.6, 30.7], [len(LAYER) - 0.2] * 2, color="black", linewidth=0.8)
    axis.text(5.6, len(LAYER) + 0.6, "kept in all, in T·h", fontsize=11, va="baseline")
    _legend(axis, len(LAYER) + 1.9)
    figure.suptitle(
        f"A Llama layer keeps {sums['eager']:.1f} T·h for backward; {sums['output']:.1f} where outputs of blocks are "
        f"discarded, {sums['all']:.1f} where gate and up run again, {sums['layer']:.1f} where all products do but the "
        "last",
        fontsize=12,
    )
    about = (
        "T tokens of width h in bfloat16, an MLP of width 2.69 h; a bar's length is its bytes. Eager torch's RMSNorm "
    )
    figure.supxlabel(
        about + "keeps two tensors of float32. Statistics, up to 0.06 T·h, are left out.", fontsize=9, color="gray"
    )
    figure.savefig(path, dpi=110)


def _box(axis: "Axes", step: Step, place: int) -> None:
    color = palette.COLORS["ours"] if step.is_block else "gray"
    style = {
        "boxstyle": "round,pad=0.35",
        "facecolor": "white",
        "edgecolor": color,
        "linewidth": 2 if step.is_block else 1,
    }
    axis.text(2.6, place, step.name, ha="center", va="center", fontsize=9, bbox=style)


def _bar(axis: "Axes", start: float, place: int, color: str, kept: float | str, size: float) -> None:
    if isinstance(kept, str):
        hatch = "////" if kept == PRODUCT else ""
        axis.barh(place, size, 0.5, start, facecolor="none", edgecolor=color, linestyle=":", hatch=hatch, alpha=0.7)
        return
    axis.barh(place, kept, 0.62, start, color=color)
    axis.text(start + kept + 0.1, place, f"{kept:g}", va="center", fontsize=9)


def _legend(axis: "Axes", place: float) -> None:
    gray = "#3c3c3c"
    axis.barh(place, 0.9, 0.55, 5.6, color=gray)
    axis.text(6.7, place, "kept", va="center", fontsize=10)
    axis.barh(place, 0.9, 0.5, 9.0, facecolor="none", edgecolor=gray, linestyle=":")
    axis.text(10.1, place, KERNEL, va="center", fontsize=10)
    axis.barh(place, 0.9, 0.5, 16.6, facecolor="none", edgecolor=gray, linestyle=":", hatch="////")
    axis.text(17.7, place, PRODUCT, va="center", fontsize=10)
    style = {"boxstyle": "round,pad=0.35", "facecolor": "white", "edgecolor": palette.COLORS["ours"], "linewidth": 2}
    axis.text(2.6, place, "a block", ha="center", va="center", fontsize=9, bbox=style)


def check() -> None:
    """Raises RuntimeError if the numbers in the drawing differ from the measured ones."""
    drawn, found = totals(), measured()
    for level in LEVELS:
        if not 0 <= found[level] - drawn[level] < 0.1:
            raise RuntimeError(f"{level}: {drawn[level]:.2f} T*h are drawn, and {found[level]:.2f} are kept")


if __name__ == "__main__":
    check()
    draw()
