"""Helpers for all pictures: panels side by side, one legend, and a footer with the measured machine."""

import pathlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def panels(count: int, columns: int, width: float, height: float, **options: Any) -> "tuple[Figure, list[Axes]]":
    """A figure of `count` panels in rows of `columns`, each `width` by `height` inches."""
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
    """The points, where a point that would cover another is moved to the right by `width`."""
    shown: list[tuple[float, float]] = []
    for x, y in points:
        while near := [a for a, b in shown if abs(x - a) < 0.99 * width and abs(y - b) < height]:
            x = max(near) + width
        shown.append((x, y))
    return shown


# The places of a name beside its point, from the best on: the shift in points, and the horizontal alignment.
_PLACES = (
    (9, 4, "left"),
    (-9, 4, "right"),
    (9, -12, "left"),
    (-9, -12, "right"),
    (0, 10, "center"),
    (0, -18, "center"),
)


def names(axis: "Axes", named: "Sequence[tuple[str, tuple[float, float], str]]") -> None:
    """Writes names beside their points, in the given colours, where they cover no point and no other name."""
    from matplotlib.transforms import Bbox

    canvas: Any = axis.figure.canvas
    canvas.draw()
    renderer = canvas.get_renderer()
    corners = [axis.transData.transform(point) for _, point, _ in named]
    taken = [Bbox.from_extents(x - 7, y - 7, x + 7, y + 7) for x, y in corners]
    inside = axis.get_window_extent(renderer)
    for name, point, color in named:
        for dx, dy, side in _PLACES:
            text = axis.annotate(
                name,
                point,
                xytext=(dx, dy),
                textcoords="offset points",
                horizontalalignment=side,
                fontsize=9,
                color=color,
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5},
            )
            box = text.get_window_extent(renderer)
            if (
                not any(box.overlaps(other) for other in taken)
                and inside.containsx(box.x1)
                and inside.containsx(box.x0)
            ):
                break
            if (dx, dy, side) != _PLACES[-1]:
                text.remove()
        taken.append(box)


def legend(figure: "Figure", axes: "list[Axes]", columns: int, title: str | None = None) -> None:
    """Adds one legend for all panels, above them."""
    found = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(found.values(), found.keys(), loc="outside upper center", ncols=columns, fontsize=9, title=title)


def save(figure: "Figure", path: pathlib.Path, about: dict[str, Any]) -> None:
    """Saves the figure with the machine, torch's version and the date below the panels."""
    import matplotlib.pyplot as plt

    known = {"device": "{}", "threads": "{} threads", "torch": "torch {}", "date": "{}"}
    said = ", ".join(text.format(about[name]) for name, text in known.items() if name in about)
    figure.supxlabel(said, fontsize=8, color="gray")
    figure.savefig(path, dpi=110)
    plt.close(figure)
