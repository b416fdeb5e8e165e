"""What all pictures share: a colour for each provider, panels side by side, and the machine that was measured."""

import pathlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Ours are blue, the darker the less is kept, and layers teal; torch.compile's are green.
COLORS = {
    "eager": "#3c3c3c",
    "ours": "#3182bd",
    "ours, block": "#8fc3e3",
    "ours, output": "#3182bd",
    "ours, all": "#08306b",
    "ours, layer": "#00796b",
    "ours, output, compiled": "#7b5fc0",
    "ours (triton)": "#0b3c75",
    "checkpoint": "#e6550d",
    "torch.compile": "#31a354",
    "torch.compile, budget 0.9": "#8cc878",
    "torch.compile, budget 0.5": "#0b5c2a",
    "liger": "#d6a000",
    "quack": "#c51b7d",
    "flash-attention": "#8c564b",
    "apex": "#9e9e9e",
}
# Blocks beside each other in one picture.
CASE_COLORS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22")


def color_of(provider: str) -> str:
    """That of the longest name which the provider's begins with."""
    fitting = [name for name in COLORS if provider.lower().startswith(name)]
    return COLORS[max(fitting, key=len)] if fitting else "#d62728"


def panels(count: int, columns: int, width: float, height: float, **options: Any) -> "tuple[Figure, list[Axes]]":
    """So many panels in rows of `columns`, each so many inches wide and high."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(count, columns)
    rows = -(-count // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(width * columns, height * rows), squeeze=False, layout="constrained", **options
    )
    shown = list(axes.flat)
    for axis in shown[count:]:
        axis.set_visible(False)
    return figure, shown[:count]


def apart(points: "Sequence[tuple[float, float]]", width: float, height: float) -> list[tuple[float, float]]:
    """The points, those that would lie on others moved to the right of these by `width`."""
    shown: list[tuple[float, float]] = []
    for x, y in points:
        while near := [a for a, b in shown if abs(x - a) < 0.99 * width and abs(y - b) < height]:
            x = max(near) + width
        shown.append((x, y))
    return shown


def legend(figure: "Figure", axes: "list[Axes]", columns: int, title: str | None = None) -> None:
    """One for all panels, above them."""
    found = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(found.values(), found.keys(), loc="outside upper center", ncols=columns, fontsize=9, title=title)


def save(figure: "Figure", path: pathlib.Path, about: dict[str, Any]) -> None:
    """With the machine, torch's version and the date below the panels."""
    import matplotlib.pyplot as plt

    known = {"device": "{}", "threads": "{} threads", "torch": "torch {}", "date": "{}"}
    said = ", ".join(text.format(about[name]) for name, text in known.items() if name in about)
    figure.supxlabel(said, fontsize=8, color="gray")
    figure.savefig(path, dpi=110)
    plt.close(figure)
